"""Experts: all forms equal a loop over tokens, published sizes, activated work, experts cut over devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from network_cases import case_of

from diffjax import networks as nw
from diffjax.networks import feed_forward as ff
from diffjax.training import flops

FORMS = {"dense": ff.dense, "ragged": ff.ragged, "capacity": ff.capacity(2.0)}  # E / K = 2: all find a seat
B, T, D, E, K = 3, 7, 8, 4, 2


def layer(form=ff.dense, top=K, shared=1, **fields):
    return nw.SparseMLP(E, top, shared, form, expand=2, **fields)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(layer().init, jax.random.key(0), jnp.zeros((1, T, D)))["params"]
    return jax.tree.map(lambda a: (0.5 * rng.standard_normal(a.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)


def by_hand(params, x, top, seats=None):
    """Each token by itself, in float64."""
    p = jax.tree.map(np.float64, params)
    silu = lambda a: a / (1 + np.exp(-a))
    out = np.zeros_like(x, np.float64)
    for b in range(len(x)):
        logits = x[b] @ p["router"]["kernel"]
        prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        order = np.argsort(-prob, axis=-1)[:, :top]
        taken = np.zeros(E, int)
        for choice in range(top):
            for t in range(x.shape[1]):
                i = order[t, choice]
                taken[i] += 1
                if seats is None or taken[i] <= seats:
                    h = silu(x[b, t] @ p["gate"]["kernel"][i]) * (x[b, t] @ p["up"]["kernel"][i])
                    out[b, t] += prob[t, i] * (h @ p["down"]["kernel"][i])
        h = silu(x[b] @ p["shared_gate"]["kernel"]) * (x[b] @ p["shared_up"]["kernel"])
        out[b] += h @ p["shared_down"]["kernel"]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top", [1, 2, E])
def test_every_form_is_the_loop_over_tokens(form, top, params, x):
    """With top = E it is the dense mixture of all experts."""
    chosen = FORMS[form] if form != "capacity" else ff.capacity(E / top)
    y = jax.jit(layer(chosen, top).apply)({"params": params}, x)
    np.testing.assert_allclose(y, by_hand(params, x, top), atol=1e-5)


def test_layers_choose_their_own_precision(params, x):
    """A state of float32 or float64 in layers of bfloat16 or float32."""
    for form in FORMS.values():
        y = layer(form, dtype=jnp.bfloat16).apply({"params": params}, x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(np.float32), by_hand(params, x, K), atol=0.2)
    time = jnp.ones((B, 2))
    v = jax.eval_shape(nw.Switch(3, 2).init, jax.random.key(0), x, time)
    assert jax.eval_shape(nw.Switch(3, 2, jnp.bfloat16).apply, v, x, time).dtype == jnp.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_indices_stay_32_bit_where_64_are_enabled(form, params, x, x64):
    y = layer(FORMS[form]).apply({"params": params}, x.astype(np.float64))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, by_hand(params, x, K), atol=1e-5)


def test_all_forms_have_the_same_gradients(params, x):
    def slopes(form):
        loss = lambda p, x: jnp.sum(jnp.sin(layer(form).apply({"params": p}, x)))
        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    want = slopes(ff.dense)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want))
    for form in (ff.ragged, ff.capacity(2.0)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slopes(form), want)


def test_tokens_without_a_seat_visit_the_shared_part_alone(params, x):
    seats = 2  # ceil(0.5 T K / E)
    y = jax.jit(layer(ff.capacity(0.5)).apply)({"params": params}, x)
    want = by_hand(params, x, K, seats)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert np.abs(want - by_hand(params, x, K)).max() > 0.1
    alone = jax.jit(layer(ff.capacity(0.5)).apply)({"params": params}, x[:1])
    np.testing.assert_allclose(alone, y[:1], atol=1e-6)  # items do not compete for seats


def test_forms_work_in_scanned_rematerialised_vmapped_networks():
    """And what routers say is the same in a loop and in a scan."""
    case = case_of("dit_moe", depth=2, num_classes=0, scan_layers=True, remat="full")
    loop = case.net.clone(scan_layers=False, remat="none")
    params = nw.unstack_blocks(case.params)
    read = nw.tapped(nw.from_linen(loop), read=[f"block_{i}/experts/probabilities" for i in range(2)])
    y, apart = jax.jit(read)(params, case.x, case.t)
    for form in (ff.ragged, ff.capacity(2.0)):
        scan = nw.from_linen(case.net.clone(feed_forward=nw.sparse(4, 2, 1, form)))
        f = nw.tapped(scan, read="blocks/experts/probabilities")
        one = lambda x, t, f=f: jax.vmap(lambda x, t: f(case.params, x[None], t[None])[0][0])(x, t)
        one = one if form is not ff.ragged else lambda x, t, f=f: f(case.params, x, t)[0]  # JAX cannot
        (z, together), single = jax.jit(lambda x, t, f=f, one=one: (f(case.params, x, t), one(x, t)))(case.x, case.t)
        np.testing.assert_allclose(z, y, atol=1e-5)
        np.testing.assert_allclose(single, y, atol=1e-5)
        for i in range(2):
            want = apart[f"block_{i}/experts/probabilities"]
            np.testing.assert_allclose(together["blocks/experts/probabilities"][i], want, atol=1e-5)
    np.testing.assert_allclose(want.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "capacity"])
def test_experts_are_cut_over_devices(form, params, x):
    """Each of two devices holds half of the experts, and the result is that of one device."""
    net = layer(FORMS[form])
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = lambda path: next(s for p, s in EXPERT_SPECS if p in path)
    place = lambda p, a: jax.device_put(a, NamedSharding(mesh, spec(jax.tree_util.keystr(p, separator="/"))))
    cut = jax.tree_util.tree_map_with_path(place, params)
    assert cut["up"]["kernel"].addressable_shards[0].data.shape == (E // 2, D, 2 * D)
    with jax.set_mesh(mesh):
        apply = jax.jit(net.apply).lower({"params": cut}, x[:2]).compile()
    np.testing.assert_allclose(apply({"params": cut}, x[:2]), by_hand(params, x, K)[:2], atol=1e-5)
    assert "all-gather" not in "".join(line for line in apply.as_text().splitlines() if f"[{E},{D},{2 * D}]" in line)


COLUMN, ROW, WHOLE = PartitionSpec(None, "model"), PartitionSpec("model", None), PartitionSpec()
EXPERT_SPECS = (("shared_down", ROW), ("shared", COLUMN), ("router", WHOLE), ("", PartitionSpec("model", None, None)))


def test_the_rules_of_dit_cut_whole_experts():
    from diffjax.training import Layout

    layout = Layout(data=1, model=2, rules=nw.partition_rules(nw.DiT()))
    spec = lambda name, *shape: layout.spec(f"block_3/experts/{name}/kernel", shape)
    for name, want in (("up", ("model",)), ("down", ("model",)), ("shared_up", (None, "model")), ("router", ())):
        shape = (E, D, D) if name in ("up", "down") else (D, D)
        got = tuple(spec(name, *shape))
        assert got[: len(want)] == want and all(a is None for a in got[len(want) :]), name


# ------------------------------------------------------------------------------------------------------- published


def shapes_of(name):
    net = nw.preset(name, num_classes=1000, out_channels=8, scan_layers=True)
    x, t, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return net, jax.eval_shape(net.init, jax.random.key(0), x, t, label)["params"]


def activated(net, shapes):
    """Parameters that one token meets: of the routed experts K of E."""
    f = net.feed_forward
    routed = [shapes["blocks"]["experts"][k] for k in ("gate", "up", "down")]
    return nw.parameter_count(shapes) - nw.parameter_count(routed) * (f.experts - f.top) // f.experts


# Total and activated, in units of the last digit that arXiv:2407.11633 prints; it rounds some and cuts others.
PUBLISHED = {
    "dit-moe-s/2-8e2a": (199, 71, 1e6),
    "dit-moe-b/2-8e2a": (795, 286, 1e6),
    "dit-moe-xl/2-8e2a": (41, 15, 1e8),
    "dit-moe-g/2-16e2a": (165, 31, 1e8),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_those_published(name):
    net, shapes = shapes_of(name)
    total, active, unit = PUBLISHED[name]
    assert abs(nw.parameter_count(shapes) / unit - total) < 1
    assert abs(activated(net, shapes) / unit - active) < 1


def test_dit_moe_s_to_the_last_parameter():
    """By hand, from the layers of the released code: experts and shared part without biases, of widths 4 d and 2 d."""
    d, out = 384, 2 * 2 * 8
    block = 4 * d * d + 4 * d + 6 * d * d + 6 * d + 8 * 3 * 4 * d * d + 3 * 2 * d * d + 8 * d
    rest = 16 * d + d + 256 * d + d + d * d + d + 1001 * d + d * out + out + 2 * d * d + 2 * d
    assert nw.parameter_count(shapes_of("dit-moe-s/2-8e2a")[1]) == 12 * block + rest


def test_the_work_is_that_of_the_activated_parameters():
    """Of 256 tokens through one block of the small network, two operations a parameter that a token meets."""
    d, t, e, k = 384, 256, 8, 2
    x = jax.ShapeDtypeStruct((1, t, d), jnp.float32)
    work = {}
    for form in (ff.ragged, ff.dense):
        net = nw.SparseMLP(e, k, 2, form)
        v = jax.eval_shape(net.init, jax.random.key(0), x)
        work[form] = flops.count(net.apply, v, x).matmul
    expert, shared, router = 3 * d * 4 * d, 3 * d * 2 * d, d * e
    assert work[ff.ragged] == 2 * t * (k * expert + shared + router)
    assert work[ff.dense] == 2 * t * (e * expert + shared + router)
    net = nw.SparseMLP(e, k, 2, ff.ragged)
    train = flops.count(jax.grad(lambda v, x: jnp.sum(net.apply(v, x)), (0, 1)), v, x).matmul
    assert train == 3 * work[ff.ragged]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nw.sparse(4, 5), r"top must be in 1\.\.4.*got 5"),
        (lambda: nw.sparse(4, 0), r"top must be in 1\.\.4.*got 0"),
        (lambda: nw.sparse(4, 2, -1), "shared is a width.*got -1"),
        (lambda: ff.capacity(0.0), "factor must be positive.*got 0"),
    ],
)
def test_impossible_experts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dropout_is_inside_the_experts():
    x = np.ones((1, 2, 8), np.float32)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            fields = dict(expand=2, act=nn.silu, dropout=0.5, train=train, dtype=jnp.float32)
            return nw.sparse(2, 1, 1)(x, **fields), ff.mlp(x, **fields)

    f = jax.jit(lambda v, key, train: Two().apply(v, x, train, rngs={"dropout": key}), static_argnums=2)
    v = jax.jit(lambda key: Two().init(key, x, False))(jax.random.key(0))
    assert sorted(v["params"]) == ["experts", "hidden", "out"]
    for a, b, c in zip(*(f(v, jax.random.key(k), t) for k, t in ((1, True), (2, True), (2, False))), strict=True):
        assert np.abs(a - b).max() > 1e-4 and np.abs(b - c).max() > 1e-4
