"""The contract of a network, for every catalogue entry: few compiled programs for each, so that entries stay cheap.

Shapes, dtypes, every input used, items independent, padding unread; jit, scan, vmap, grad, remat and bfloat16; taps read
and written; rules of partition that fit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from network_cases import NETS, case_of

from diffjax import networks as nw
from diffjax.training import Layout


@pytest.fixture(scope="module", params=list(NETS))
def any_case(request):
    return case_of(request.param)


@pytest.fixture(scope="module")
def plain(any_case):
    """The compiled network of (params, x, t, cond), and its value."""
    fn = jax.jit(any_case.fn)
    return fn, np.asarray(fn(any_case.params, any_case.x, any_case.t, any_case.cond))


def test_every_catalogue_entry_is_tested_here():
    assert {card.build for card in nw.CATALOGUE.values()} == {type(net) for net, _ in NETS.values()}
    for name, (net, _) in NETS.items():
        assert name not in nw.CATALOGUE or nw.CATALOGUE[name].build is type(net)
        assert hash(net) == hash(net.clone()) and net == net.clone()


def test_the_output_reads_every_input_and_mixes_no_items(any_case, plain):
    c = any_case
    f, y = plain
    assert y.dtype == jnp.float32 and y.shape == c.x.shape and np.isfinite(y).all() and np.std(y) > 1e-2
    other = {k: -v for k, v in c.cond.items() if k not in ("label", "mask")}
    if "label" in c.cond:
        other["label"] = (c.cond["label"] + 1) % 4
    changed = {"x": (c.x + 0.5, c.t, c.cond), "t": (c.x, c.t * 0.5, c.cond)}
    changed |= {k: (c.x, c.t, {**c.cond, k: v}) for k, v in other.items()}
    for what, args in changed.items():
        moved = np.abs(f(c.params, *args) - y).reshape(3, -1).max(1)
        assert moved.min() > 1e-6, what  # what is not read changes no bit
    moved = jax.tree.map(lambda a: np.concatenate([a[:1], np.roll(a[1:], 1, axis=0)]), (c.x, c.t, c.cond))
    z = f(c.params, *moved)
    np.testing.assert_array_equal(z[0], y[0])
    np.testing.assert_allclose(z[1], y[2], atol=1e-5)
    assert np.abs(z[1] - y[1]).max() > 1e-3
    if "mask" in c.cond:
        poisoned = np.where(c.cond["mask"][:, :, None], c.cond["tokens"], np.float32(np.nan))
        np.testing.assert_array_equal(f(c.params, c.x, c.t, {**c.cond, "tokens": poisoned}), y)


def test_scan_and_vmap_equal_the_plain_call(any_case, plain):
    c = any_case
    y = plain[0](c.params, c.x, 0.3 * np.ones(3, np.float32), c.cond)

    @jax.jit
    def others(params, x, cond):
        _, scanned = jax.lax.scan(lambda s, _: (s, c.fn(params, x, 0.3, cond)), 0, None, length=2)
        one = lambda tree: jax.tree.map(lambda a: a[None], tree)
        return scanned[1], jax.vmap(lambda x, cond: c.fn(params, one(x), 0.3, one(cond))[0])(x, cond)

    for z in others(c.params, c.x, c.cond):
        np.testing.assert_allclose(z, y, atol=3e-5)


def test_rematerialised_gradients_are_those_of_finite_differences(any_case, plain):
    """Every parameter has a finite gradient; remat leaves the value, and the gradient has the measured slope."""
    c = any_case
    loss = lambda fn: lambda p: jnp.mean(jnp.square(fn(p, c.x, c.t, c.cond)))
    remat = nw.from_linen(c.net.clone(remat="full")) if hasattr(c.net, "remat") else c.fn
    value, grad = jax.jit(jax.value_and_grad(loss(remat)))(c.params)
    if hasattr(c.net, "remat"):
        assert "remat2[" in str(jax.make_jaxpr(loss(remat))(c.params))
    np.testing.assert_allclose(value, np.mean(np.square(plain[1])), rtol=1e-4)
    zero = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grad) if not np.any(g)]
    assert not zero and all(np.isfinite(g).all() for g in jax.tree.leaves(grad)), zero
    h = 1e-2 / np.sqrt(sum(float(np.vdot(g, g)) for g in jax.tree.leaves(grad)))
    at = lambda s: float(
        np.mean(np.square(plain[0](jax.tree.map(lambda p, g: p + s * g, c.params, grad), c.x, c.t, c.cond)))
    )
    slope = (at(h) - at(-h)) / (2 * h)
    np.testing.assert_allclose(slope, sum(float(np.vdot(g, g)) for g in jax.tree.leaves(grad)), rtol=0.05)


def test_bfloat16_changes_little(any_case, plain):
    c = any_case
    z = jax.jit(nw.from_linen(c.net.clone(dtype=jnp.bfloat16)))(c.params, c.x, c.t, c.cond)
    assert z.dtype == jnp.float32
    assert 1e-4 < np.abs(z - plain[1]).max() < 0.25 * np.abs(plain[1]).max()  # it keeps 8 bits


def test_every_tap_is_read_and_written(any_case, plain):
    """What is read at one state and put back at another one gives the first output: taps carry all there is."""
    c = any_case
    names = nw.tap_names(c.fn, c.params, c.x, c.t, c.cond)
    assert names, "a network needs taps"
    # not one factor for all: normalised values would hide it
    bend = lambda v, s: v * (1 + s * jnp.linspace(0.5, 1.5, v.size).reshape(v.shape)).astype(v.dtype)

    @jax.jit
    def slopes(params):
        def out(shift):
            write = {n: lambda v, n=n: bend(v, shift[n]) for n in names}
            y, taps = nw.tapped(c.fn, read=names, write=write)(params, c.x, c.t, c.cond)
            return jnp.sum(jnp.square(y)), (y, taps)

        return jax.grad(out, has_aux=True)({n: jnp.zeros(()) for n in names})

    g, (y, taps) = slopes(c.params)
    np.testing.assert_allclose(y, plain[1], atol=1e-5)
    assert set(taps) == set(names) and all(np.isfinite(v).all() for v in jax.tree.leaves(taps))
    assert all(np.isfinite(v) for v in g.values())
    unread = [n for n, v in g.items() if abs(v) < 1e-9]
    assert not unread, f"writing to {unread} changes nothing"
    bare = jax.make_jaxpr(c.fn)(c.params, c.x, c.t, c.cond)
    assert str(jax.make_jaxpr(nw.tapped(c.fn))(c.params, c.x, c.t, c.cond)) == str(bare)


def test_rules_fit_and_a_cut_network_gives_the_same(any_case, plain):
    c = any_case
    rules = nw.partition_rules(c.net)
    layout = Layout(data=1, model=2, rules=rules)
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    specs = {path(p): layout.spec(path(p), a.shape) for p, a in jax.tree_util.tree_leaves_with_path(c.params)}
    cut = {p for p, s in specs.items() if s != PartitionSpec()}
    assert cut, "a network needs RULES, see diffjax.networks.partition"
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    place = lambda p, a: jax.device_put(a, NamedSharding(mesh, specs[path(p)]))
    params = jax.tree_util.tree_map_with_path(place, c.params)
    args = jax.device_put(
        (c.x[:2], c.t[:2], jax.tree.map(lambda a: a[:2], c.cond)), NamedSharding(mesh, PartitionSpec("data"))
    )
    with jax.set_mesh(mesh):
        z = jax.jit(c.fn)(params, *args)
    np.testing.assert_allclose(z, plain[1][:2], atol=3e-5)


def test_a_float64_state_gives_float64_and_parameters_stay_float32(any_case, x64):
    c = any_case
    args = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, (c.x, c.t, c.cond))
    params = jax.eval_shape(c.net.init, jax.random.key(0), *args)["params"]
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert jax.eval_shape(c.fn, params, *args).dtype == jnp.float64


@pytest.mark.parametrize("bad", ["t", "x", "cond"])
def test_bad_input_is_refused(any_case, bad):
    c = any_case
    args = {"x": c.x, "t": c.t, "cond": c.cond}
    args |= {"t": {"t": np.zeros(2, np.float32)}, "x": {"x": c.x.astype(np.int32)}, "cond": {"cond": {"sound": c.x}}}[
        bad
    ]
    with pytest.raises(ValueError, match={"t": "time code", "x": "state x", "cond": "sound"}[bad]):
        jax.eval_shape(c.fn, c.params, args["x"], args["t"], args["cond"])
