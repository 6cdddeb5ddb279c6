"""Routing by time: windows of channels around any block, and learned masks that start at one."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import case_of

from diffjax import networks as nw
from diffjax.networks.layers import Dense
from diffjax.numerics import sliding_window


def test_windows_of_adjacent_times_overlap_and_start_slowly():
    t, channels, size = np.arange(1000) / 999, 384, 307
    mask = np.asarray(sliding_window(t.astype(np.float32), channels, size, 4.0))
    assert (mask.sum(1) == size).all()
    start = mask.argmax(1)
    np.testing.assert_allclose(start, np.round(t**4 * (channels - size)), atol=1)
    assert all(mask[i, s] and mask[i, s + size - 1] for i, s in enumerate(start))  # one piece
    assert ((mask[1:] & mask[:-1]).sum(1) / size).min() > 0.95
    quarters = np.diff(start[[0, 250, 500, 750, 999]])
    assert (np.diff(quarters) > 0).all() and quarters[0] <= 1
    even = np.asarray(sliding_window(t.astype(np.float32), channels, size)).argmax(1)
    assert np.ptp(np.diff(even[[0, 250, 500, 750, 999]])) <= 1
    assert (mask[0] & mask[-1]).sum() == 2 * size - channels


class Step(nn.Module):
    """A block with a residual branch; `skip` where it changes the number of channels."""

    features: int

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(Dense(self.features, name="branch")(x))
        if x.shape[-1] != self.features:
            x = Dense(self.features, name="skip")(x)
        return x + h


class Lossy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dense(3, name="branch")(x)


class Toy(nn.Module):
    """Blocks of 4, 4 and 6 channels."""

    widths: tuple = (4, 4, 6)
    kind: type = Step

    @nn.compact
    def __call__(self, x, t, cond=None):
        for i, n in enumerate(self.widths):
            x = self.kind(n, name=f"step_{i}")(x) if self.kind is Step else self.kind(name=f"step_{i}")(x)
        return x


def test_a_routed_network_is_its_blocks_by_hand():
    """With residual blocks, x + branch(m x): what the mask leaves out passes by."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((3, 5, 4)).astype(np.float32), np.array([0.0, 0.6, 1.0], np.float32)
    net = nw.from_linen(Toy())
    params = nw.random_parameters(net.module, x, t)
    f = nw.task_routed(net, 0.5, 2.0, task=abs, blocks=(Step,))
    y = jax.jit(f)(params, x, -t)
    want = x.astype(np.float64)
    for i in range(3):
        p = params[f"step_{i}"]
        c = want.shape[-1]
        start = np.round(t**2 * (c - c // 2)).astype(int)
        mask = np.zeros((3, 1, c))
        for b, s in enumerate(start):
            mask[b, :, s : s + c // 2] = 1
        h = np.tanh((mask * want) @ p["branch"]["kernel"] + p["branch"]["bias"])
        want = (want @ p["skip"]["kernel"] + p["skip"]["bias"] if "skip" in p else want) + h
    np.testing.assert_allclose(y, want, atol=1e-5)
    same = jax.jit(f)(params, x, np.float32(-0.6))  # a scalar time
    np.testing.assert_allclose(same[1], want[1], atol=1e-5)
    assert f == nw.task_routed(net, 0.5, 2.0, task=abs, blocks=(Step,)) and hash(f) == hash(f)


def test_a_window_has_the_floor_of_its_share():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    params = {"step_0": {"branch": {"kernel": np.eye(100, dtype=np.float32), "bias": np.zeros(100, np.float32)}}}
    y = nw.task_routed(nw.from_linen(Toy((100,))), 0.29, blocks=(Step,))(params, jnp.ones((1, 1, 100)), 0.0)
    assert int((y > 1.5).sum()) == 29


def test_full_windows_leave_the_program_as_it_is():
    for name in ("dit", "unet"):
        c = case_of(name, **({"depth": 1} if name == "dit" else {}))
        routed = jax.make_jaxpr(nw.task_routed(c.fn, 1.0))(c.params, c.x, c.t, c.cond)
        assert str(routed) == str(jax.make_jaxpr(c.fn)(c.params, c.x, c.t, c.cond))


def test_a_routed_dit_is_the_same_looped_scanned_and_rematerialised():
    c = case_of("dit", depth=2, token_size=0, vector_size=0, image_channels=0)
    cond = {"label": c.cond["label"]}
    fn = lambda **changes: nw.task_routed(nw.from_linen(c.net.clone(**changes)), 0.5)
    y = jax.jit(fn())(c.params, c.x, c.t, cond)
    scanned = nw.tapped(fn(scan_layers=True, remat="full"), read="blocks/block")
    z, taps = jax.jit(scanned)(nw.stack_blocks(c.params), c.x, c.t, cond)
    np.testing.assert_allclose(z, y, atol=1e-5)
    assert taps["blocks/block"].shape[:2] == (2, 3)
    assert np.abs(y - jax.jit(c.fn)(c.params, c.x, c.t, cond)).max() > 0.05
    per_item = jax.vmap(lambda x, t, l: fn()(c.params, x[None], t[None], {"label": l[None]})[0])
    np.testing.assert_allclose(jax.jit(per_item)(c.x, c.t, cond["label"]), y, atol=1e-5)


def test_every_block_of_a_unet_is_routed():
    """With the branches at zero a block passes all channels, whatever the window; with branches the window matters."""
    c = case_of("unet", widths=(4, 8), attention=(), num_classes=0, vector_size=0, token_size=0, image_channels=0)
    routed, plain = (jax.jit(f) for f in (nw.task_routed(c.fn, 0.5), c.fn))
    assert np.abs(routed(c.params, c.x, c.t) - plain(c.params, c.x, c.t)).max() > 0.05
    no_branch = lambda p, a: np.zeros_like(a) if "conv_out" in jax.tree_util.keystr(p) else a
    bare = jax.tree_util.tree_map_with_path(no_branch, c.params)
    np.testing.assert_allclose(routed(bare, c.x, c.t), plain(bare, c.x, c.t), atol=1e-5)


def test_wrong_uses_of_task_routing_are_refused():
    for beta, alpha in ((0.0, 4.0), (1.1, 4.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match=f"beta in .*got beta={beta} and alpha={alpha}"):
            nw.task_routed(Toy().apply, beta, alpha)
    with pytest.raises(ValueError, match="got a jitted function"):
        nw.task_routed(jax.jit(Toy().apply))
    with pytest.raises(ValueError, match="no network was called"):
        nw.task_routed(lambda x, t: x)(1.0, 0.5)
    x = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match="beta=0.2 leaves none of the 4 channels of block step_0; give at least 0.25"):
        nw.task_routed(nw.from_linen(Toy()), 0.2, blocks=(Step,))(nw.random_parameters(Toy(), x, 0.5), x, 0.5)
    lossy = nw.from_linen(Toy((3,), Lossy))
    with pytest.raises(ValueError, match="step_0 makes .*without a layer `skip`"):
        nw.task_routed(lossy, 0.5, blocks=(Lossy,))(nw.random_parameters(lossy.module, x, 0.5), x, 0.5)


# ------------------------------------------------------------------------------------------------------------ switch


def test_a_switch_is_the_formula():
    rng = np.random.default_rng(0)
    x, time = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    shapes = jax.eval_shape(nw.Switch(3, 2).init, jax.random.key(0), x, time)["params"]
    p = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)
    m = jax.jit(nw.Switch(3, 2).apply)({"params": p}, x, time)
    logits = time @ p["gate"]["kernel"] + p["gate"]["bias"]
    g = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = np.ones_like(x)
    for b in range(2):
        for i in np.argsort(-g[b])[:2]:
            want[b] += g[b, i] * (x[b] @ p["kernel"][i] + p["bias"][i])
    np.testing.assert_allclose(m, want, atol=1e-5)


def test_a_switched_dit_starts_as_the_dense_one_and_bypasses_what_it_masks():
    c = case_of("switch_dit", depth=2)
    zero = lambda p, a: np.zeros_like(a) if p[-2].key == "switch" else a
    start = jax.tree_util.tree_map_with_path(zero, c.params)
    fresh = jax.eval_shape(c.net.init, jax.random.key(0), c.x, c.t, c.cond)["params"]
    dense = nw.from_linen(c.net.clone(route=None))
    f, g = jax.jit(c.fn), jax.jit(dense)
    without = {k: {n: v for n, v in p.items() if n != "switch"} for k, p in start.items()}
    want = jax.eval_shape(dense.module.init, jax.random.key(0), c.x, c.t, c.cond)["params"]
    assert jax.tree.map(np.shape, without) == jax.tree.map(lambda a: a.shape, want)
    np.testing.assert_array_equal(f(start, c.x, c.t, c.cond), g(without, c.x, c.t, c.cond))
    assert fresh["block_0"]["switch"]["kernel"].shape == (3, 8, 8)
    one = nw.Switch(3, 2).init(jax.random.key(0), jnp.ones((1, 2, 8)), jnp.ones((1, 8)))["params"]
    assert not one["kernel"].any() and not one["bias"].any() and one["gate"]["kernel"].any()
    # shut gates and adaLN leave (m x) + (1 - m) x: the block is the identity for any mask
    shut = lambda p, a: np.zeros_like(a) if p[0].key.startswith("block_") and p[1].key == "film" else a
    closed = jax.tree_util.tree_map_with_path(shut, c.params)
    tap = lambda f, p: jax.jit(nw.tapped(f, read=("block_0/block", "block_1/block")))(p, c.x, c.t, c.cond)[1]
    taps = tap(c.fn, closed)
    np.testing.assert_allclose(taps["block_0/block"], taps["block_1/block"], atol=1e-5)


@pytest.mark.parametrize("name", ["s", "b", "l", "xl"])
def test_switch_dit_to_the_last_parameter(name):
    """A DiT and, for each block, three experts of d x d with biases and their gate: the layers of the released code."""
    count = lambda name: nw.parameter_count(
        jax.eval_shape(
            nw.preset(name, num_classes=1000, out_channels=8, scan_layers=True).init,
            jax.random.key(0),
            jnp.zeros((1, 32, 32, 4)),
            jnp.zeros(1),
            jnp.zeros(1, jnp.int32),
        )["params"]
    )
    net = nw.preset(f"switch-dit-{name}/2")
    d = net.width
    assert count(f"switch-dit-{name}/2") == count(f"dit-{name}/2") + net.depth * (3 * (d * d + d) + 3 * d + 3)


def test_impossible_switches_are_refused():
    for top, m in itertools.product((0, 4), (3,)):
        with pytest.raises(ValueError, match=rf"top must be in 1\.\.3.*got {top}"):
            nw.switch(m, top)
