"""The networks that take every condition, in detail; what holds for all is in test_network_contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import FULL, NETS, SMALL, case_of

from diffjax import networks as nw


def tree_close(a, b, **kwargs):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **kwargs), a, b)


def test_output_is_float32_of_the_states_shape_and_finite(case, forward):
    y = forward(case)(case.params, case.x, case.t, case.cond)
    assert y.shape == case.x.shape and y.dtype == jnp.float32
    assert np.isfinite(y).all() and np.std(y) > 1e-2


def test_each_input_matters(case, forward):
    f = forward(case)
    y = f(case.params, case.x, case.t, case.cond)
    changed = [(case.x + 0.5, case.t, case.cond), (case.x, case.t * 0.5, case.cond)]
    other = {"label": (case.cond["label"] + 1) % 4, "vector": -case.cond["vector"], "tokens": -case.cond["tokens"]}
    if "image" in case.cond:
        other["image"] = -case.cond["image"]
    changed += [(case.x, case.t, {**case.cond, k: v}) for k, v in other.items()]
    for args in changed:
        assert np.abs(f(case.params, *args) - y).reshape(3, -1).max(1).min() > 1e-4


def test_items_are_independent(case, forward):
    f = forward(case)
    y = f(case.params, case.x, case.t, case.cond)
    other = jax.tree.map(lambda a: np.concatenate([a[:1], np.roll(a[1:], 1, axis=0)]), (case.x, case.t, case.cond))
    z = f(case.params, *other)
    np.testing.assert_array_equal(z[0], y[0])
    np.testing.assert_allclose(z[1], y[2], atol=1e-5)
    assert np.abs(z[1] - y[1]).max() > 1e-3


def test_padding_reaches_nothing(case, forward):
    f = forward(case)
    y = f(case.params, case.x, case.t, case.cond)
    mask, tokens = case.cond["mask"], case.cond["tokens"]
    poisoned = np.where(mask[:, :, None], tokens, np.float32(np.nan))
    np.testing.assert_array_equal(f(case.params, case.x, case.t, {**case.cond, "tokens": poisoned}), y)
    # The last column is padding for all items: leaving it out changes nothing but the order of sums.
    shorter = {**case.cond, "tokens": tokens[:, :4], "mask": mask[:, :4]}
    np.testing.assert_allclose(f(case.params, case.x, case.t, shorter), y, atol=1e-5)


def test_null_condition_fits_and_its_gradient_is_finite(case, forward):
    null = nw.null_condition(num_classes=3, vector_size=2, token_size=4, token_length=5)
    null = jax.tree.map(lambda a: np.broadcast_to(a, (3, *a.shape)), null)
    cond = {**case.cond, **null}
    y = forward(case)(case.params, case.x, case.t, cond)
    assert np.isfinite(y).all()
    loss = lambda p, tokens: jnp.sum(case.fn(p, case.x, case.t, {**cond, "tokens": tokens}) ** 2)
    g, gc = jax.jit(jax.grad(loss, argnums=(0, 1)))(case.params, cond["tokens"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))
    np.testing.assert_array_equal(gc, 0)  # all tokens are padding
    # The null label is a learned row of its own, and only that row is read.
    assert np.abs(g["code"]["label"]["table"][3]).max() > 0
    np.testing.assert_array_equal(g["code"]["label"]["table"][:3], 0)


def test_scan_vmap_and_scalar_time_equal_the_plain_call(case, forward):
    y = forward(case)(case.params, case.x, 0.3 * jnp.ones(3), case.cond)

    @jax.jit
    def others(params, x, cond):
        _, scanned = jax.lax.scan(lambda c, _: (c, case.fn(params, x, 0.3, cond)), 0, None, length=2)
        one = lambda tree: jax.tree.map(lambda a: a[None], tree)
        each = jax.vmap(lambda x, cond: case.fn(params, one(x), 0.3, one(cond))[0])(x, cond)
        return scanned[1], each

    for z in others(case.params, case.x, case.cond):
        np.testing.assert_allclose(z, y, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_remat_changes_no_gradient_and_bfloat16_little(name, forward):
    plain, remat, half = (case_of(name, **SMALL[name], **c) for c in ({}, {"remat": "full"}, {"dtype": jnp.bfloat16}))
    loss = lambda case: lambda p: jnp.mean(jnp.square(case.fn(p, case.x, case.t, case.cond)))
    values, grads = zip(
        *(jax.jit(jax.value_and_grad(loss(c)))(plain.params) for c in (plain, remat, half)), strict=True
    )
    tree_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    for case in (plain, remat):
        assert ("remat2[" in str(jax.make_jaxpr(loss(case))(plain.params))) == (case.net.remat == "full")
    assert abs(values[2] / values[0] - 1) < 0.1  # bfloat16 keeps 8 bits
    assert half.net.dtype == jnp.bfloat16 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads[2]))
    y, z = (jax.jit(c.fn)(plain.params, plain.x, plain.t, plain.cond) for c in (plain, half))
    assert z.dtype == jnp.float32 and 1e-4 < np.abs(y - z).max() < 0.2 * np.abs(y).max()


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_scanned_layers_equal_the_loop(name):
    loop, scan = case_of(name), case_of(name, scan_layers=True, remat="full")
    stacked = nw.stack_blocks(loop.params)
    shapes = lambda p: jax.tree.map(np.shape, p)
    assert shapes(stacked) == shapes(scan.params)
    tree_close(nw.unstack_blocks(stacked), loop.params)

    loss = lambda case: lambda p: jnp.sum(jnp.square(case.fn(p, case.x, case.t, case.cond)))
    a, ga = jax.jit(jax.value_and_grad(loss(loop)))(loop.params)
    b, gb = jax.jit(jax.value_and_grad(loss(scan)))(stacked)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    tree_close(nw.stack_blocks(ga), gb, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="block_0"):
        nw.stack_blocks(stacked)
    with pytest.raises(ValueError, match="blocks"):
        nw.unstack_blocks(loop.params)


@pytest.mark.parametrize("name", FULL)
def test_dropout_needs_a_key_and_uses_it(name, key):
    case = case_of(name, **SMALL[name], dropout=0.5)
    fn, args = jax.jit(case.fn), (case.x, case.t, case.cond)
    off = fn(case.params, *args)
    plain = case_of(name, **SMALL[name])
    np.testing.assert_allclose(off, jax.jit(plain.fn)(case.params, *args), atol=1e-5)
    a, b, again = (fn(case.params, *args, jax.random.fold_in(key, i)) for i in (0, 1, 0))
    np.testing.assert_array_equal(again, a)
    assert np.abs(a - off).max() > 1e-3 and np.abs(a - b).max() > 1e-3


def test_dropout_with_a_key_per_item_does_not_depend_on_the_batch(key):
    case = case_of("mlp", dropout=0.5)
    keys = jax.random.split(key, 3)
    f = jax.jit(case.fn)
    y = f(case.params, case.x, case.t, case.cond, keys)
    part = jax.tree.map(lambda a: a[1:], (case.x, case.t, case.cond, keys))
    np.testing.assert_allclose(f(case.params, *part), y[1:], atol=1e-6)


def test_initialise_starts_at_zero_output_and_float32(key):
    for name in ("mlp", "dit"):
        case = case_of(name, depth=1)
        params = nw.initialise(case.net, key, case.x, case.t, case.cond)
        assert all(type(p) is not np.ndarray and p.dtype == jnp.float32 for p in jax.tree.leaves(params))
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, case.params)
        np.testing.assert_array_equal(case.fn(params, case.x, case.t, case.cond), 0)
        kernel = params["block_0"]["hidden"]["kernel"]
        np.testing.assert_allclose(np.var(kernel) * kernel.shape[0], 1, rtol=0.3)  # variance 1 / fan_in


@pytest.mark.slow
def test_the_unet_of_the_digits_initialises_at_zero_output(key):
    net = nw.UNet(num_classes=10, vector_size=6)
    shape = lambda *s, d="float32": jax.ShapeDtypeStruct(s, d)
    x, t, cond = shape(2, 8, 8, 1), shape(2), {"label": shape(2, d="int32"), "vector": shape(2, 6)}
    params = nw.initialise(net, key, x, t, cond)
    y = jax.jit(nw.from_linen(net))(
        params, np.ones(x.shape, np.float32), np.ones(2, np.float32), nw.functional.zeros(cond)
    )
    np.testing.assert_array_equal(y, 0)


def test_initialise_works_inside_jit(key):
    case = case_of("mlp", depth=1)
    params = jax.jit(lambda k: nw.initialise(case.net, k, case.x, case.t, case.cond))(key)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, case.params)


# ------------------------------------------------------------------------------------- parameter counts, by arithmetic


def dense(i, o, bias=True):
    return i * o + o * bias


def code(w, classes, vector):
    return dense(w, w) + dense(w, w) + (classes + 1) * w + dense(vector, w, bias=False)


def test_parameter_count_of_the_mlp():
    d, w, e, classes, vector, tokens, depth = 5, 8, 2, 3, 2, 4, 2
    cross = dense(w, w) + dense(tokens, 2 * w) + dense(w, w, bias=False)
    block = dense(w, 3 * w) + dense(w, e * w) + dense(e * w, w) + cross
    want = code(w, classes, vector) + dense(d, w) + depth * block + dense(w, 2 * w) + dense(w, d)
    assert nw.parameter_count(case_of("mlp").params) == want


def test_parameter_count_of_the_dit():
    w, e, p, c, classes, vector, tokens, depth, head = 8, 2, 2, 2, 3, 2, 4, 2, 4
    norms = 2 * head
    attention = dense(w, 3 * w) + dense(w, w) + norms
    cross = dense(w, w) + dense(tokens, 2 * w) + dense(w, w, bias=False) + norms
    block = dense(w, 6 * w) + attention + cross + dense(w, e * w) + dense(e * w, w)
    ends = dense(p * p * (c + 1), w) + dense(w, 2 * w) + dense(w, p * p * c)
    assert nw.parameter_count(case_of("dit").params) == code(w, classes, vector) + depth * block + ends


def test_parameter_count_of_the_unet_of_the_digits():
    e, classes, vector = 64, 10, 6
    conv = lambda i, o: 9 * i * o + o

    def block(i, o, attend):
        n = 2 * i + conv(i, o) + dense(e, 2 * o) + 2 * o + conv(o, o) + (dense(i, o) if i != o else 0)
        return n + (2 * o + dense(o, 3 * o) + dense(o, o) if attend else 0)

    down = block(16, 16, False) + block(16, 32, True)
    middle = block(32, 32, True) + block(32, 32, False)
    up = block(64, 32, True) + block(48, 32, True) + block(48, 16, False) + block(32, 16, False)
    want = code(e, classes, vector) + conv(1, 16) + down + middle + up + 2 * 16 + conv(16, 1)
    net = nw.UNet(num_classes=10, vector_size=6)
    x, cond = (
        np.zeros((1, 8, 8, 1), np.float32),
        {"label": np.zeros(1, np.int32), "vector": np.zeros((1, 6), np.float32)},
    )
    assert nw.parameter_count(nw.random_parameters(net, x, 0.5, cond)) == want == 182961


# -------------------------------------------------------------------------------------------------------- other shapes


def test_networks_take_any_size_that_divides(case):
    if case.x.ndim == 2:
        return
    x = np.zeros((2, 8, 2, 2), np.float32)
    cond = jax.tree.map(lambda a: a[:2], case.cond) | {"image": np.zeros((2, 8, 2, 1), np.float32)}
    assert jax.eval_shape(case.fn, case.params, x, 0.5, cond).shape == x.shape


def test_out_channels_and_out_features():
    for name, field in (("mlp", "out_features"), ("unet", "out_channels"), ("dit", "out_channels")):
        case = case_of(name, **{field: 7})
        assert jax.eval_shape(case.fn, case.params, case.x, case.t, case.cond).shape == (*case.x.shape[:-1], 7)


def test_mlp_with_frames_takes_a_time_per_frame():
    net = nw.MLP(width=8, depth=1, num_classes=3)
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    label = np.array([0, 1, 3], np.int32)
    params = nw.random_parameters(net, x, 0.5, label)
    f = jax.jit(nw.from_linen(net))
    same = f(params, x, np.full(3, 0.5, np.float32), label)
    np.testing.assert_allclose(f(params, x, np.full((1, 4), 0.5, np.float32), label), same, atol=1e-6)
    t = np.full((3, 4), 0.5, np.float32)
    t[1, 2] = 0.9
    y = f(params, x, t, label)
    moved = np.abs(y - same).max(-1) > 1e-5
    assert moved[1, 2] and moved.sum() == 1


def test_a_float64_state_gives_float64(x64):
    net = nw.MLP(width=8, depth=1)
    x = jnp.ones((2, 3), jnp.float64)
    params = nw.random_parameters(net, x, 0.5)
    assert nw.from_linen(net)(params, x, 0.5).dtype == jnp.float64


# --------------------------------------------------------------------------------------------------------- bad inputs


def refuse(case, match, **changes):
    args = {"x": case.x, "t": case.t, "cond": case.cond} | changes
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda p: case.fn(p, args["x"], args["t"], args["cond"]), case.params)


def test_bad_times_and_states(case):
    refuse(case, "floating", t=np.array([1, 2, 3]))
    refuse(case, "time code", t=np.zeros(2, np.float32))
    refuse(case, "time code", t=np.zeros((3, 9), np.float32))
    refuse(case, "state x", x=case.x.astype(np.int32))
    refuse(case, "state x", x=case.x[0, ..., 0])


def test_bad_conditions(case):
    for name in ("label", "vector", "tokens"):
        refuse(case, f"needs cond.'{name}'", cond={k: v for k, v in case.cond.items() if k not in (name, "mask")})
    refuse(case, "needs cond.'vector'", cond=case.cond["label"])
    refuse(case, r"'label'. must be an array of integers \[3\]; got list", cond=case.cond | {"label": [0, 1, 2]})
    refuse(case, r"'mask'. must be bool \[3, 5\].*; got list", cond=case.cond | {"mask": [[True] * 5] * 3})
    bare = type(case.net)()
    for name in ("label", "vector", "tokens", "image"):
        if name in case.cond:
            with pytest.raises(ValueError, match=f"takes no {name}"):
                nw.random_parameters(bare, case.x, case.t, {name: case.cond[name]})
    with pytest.raises(ValueError, match="takes no image"):
        nw.random_parameters(nw.MLP(), case.x, case.t, {"image": case.x})


def test_bad_sizes():
    unet, dit = case_of("unet"), case_of("dit")
    for case, match in ((unet, "divisible by 2"), (dit, "patch=2")):
        odd = {**case.cond, "image": np.zeros((3, 5, 6, 1), np.float32)}
        refuse(case, match, x=np.zeros((3, 5, 6, 2), np.float32), cond=odd)
    x = np.zeros((1, 4, 4, 1), np.float32)
    for net, match in (
        (nw.UNet(attention=(2,)), "levels 0 to 1"),
        (nw.UNet(widths=()), "at least one width"),
        (nw.UNet(attention=(), token_size=3), "needs attention"),
        (nw.DiT(width=8, heads=3), "divisible by heads"),
        (nw.DiT(width=6, heads=2), "multiple of 4"),
        (nw.DiT(width=8, heads=2, frequencies=(0.0, 1.0)), "frequencies"),
    ):
        cond = {"tokens": np.zeros((1, 2, 3), np.float32)} if net.token_size else None
        with pytest.raises(ValueError, match=match):
            nw.random_parameters(net, x, 0.5, cond)


def test_networks_are_final_dataclasses_that_hash_by_value():
    for net, _ in NETS.values():
        assert dataclasses.is_dataclass(net) and hash(net) == hash(net.clone()) and net == net.clone()
