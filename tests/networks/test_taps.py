"""Taps: read and written at every documented site, under every transformation, free where unused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import NETS, case_of

from diffjax import networks as nw
from diffjax.networks import attention, dit, mlp, unet

QKV = ("q", "k", "v", "logits", "weights")


def sites(name):
    """The taps that the docstrings document."""
    if name == "mlp":
        per = lambda b: [f"{b}/cross/{s}" for s in QKV] + [f"{b}/block"]
        return {s for i in range(2) for s in per(f"block_{i}")}
    if name == "dit":
        per = lambda b: [f"{b}/{a}/{s}" for a in ("attention", "cross") for s in QKV]
        return {
            s for i in range(2) for b in [f"block_{i}"] for s in [*per(b), f"{b}/attended", f"{b}/mixed", f"{b}/block"]
        }
    attending, plain = ["down_1_0", "middle_0", "up_1_0", "up_1_1"], ["down_0_0", "middle_1", "up_0_0", "up_0_1"]
    names = {f"{b}/{s}" for b in attending + plain for s in ("residual", "block")}
    names |= {f"{b}/{a}/{s}" for b in attending for a in ("attention", "cross") for s in QKV}
    return names | {f"skip_{i}" for i in range(4)} | {"bottleneck", "up_0"}


def call(case, fn):
    return fn(case.params, case.x, case.t, case.cond)


def test_every_documented_site_exists(case):
    name = next(n for n, (net, _) in NETS.items() if type(net) is type(case.net))
    assert set(nw.tap_names(case.fn, case.params, case.x, case.t, case.cond)) == sites(name)


def test_every_site_reads_and_writing_back_what_was_read_changes_nothing(case, forward):
    y = call(case, forward(case))
    names = nw.tap_names(case.fn, case.params, case.x, case.t, case.cond)
    out, taps = call(case, jax.jit(nw.tapped(case.fn, read=names)))
    np.testing.assert_allclose(out, y, atol=1e-5)
    assert set(taps) == set(names) and all(np.isfinite(v).all() and v.shape[0] == 3 for v in taps.values())
    for name, weights in taps.items():
        if name.endswith("weights"):
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
            if "cross" in name:
                np.testing.assert_array_equal(np.where(case.cond["mask"][:, None, None, :], 0, weights), 0)
    # Each value read is put back in a network with another x: only taps may carry it, so all sites are really written.
    put = nw.tapped(case.fn, write={n: lambda v, n=n: taps[n] for n in names if n.endswith("block")})
    z = jax.jit(lambda x: put(case.params, x, case.t, case.cond))(case.x + 1)
    np.testing.assert_allclose(z, y, atol=1e-5)


def test_each_site_can_be_written():
    """The gradient with respect to a number added at each site is not zero, so each write reaches the output."""
    case = case_of("dit", depth=1)
    names = nw.tap_names(case.fn, case.params, case.x, case.t, case.cond)

    def loss(shift):
        write = {n: lambda v, n=n: v * (1 + shift[n].astype(v.dtype)) for n in names}
        return jnp.sum(call(case, nw.tapped(case.fn, write=write)) ** 2)

    g = jax.jit(jax.grad(loss))({n: jnp.zeros(()) for n in names})
    assert all(abs(v) > 1e-7 for v in g.values()), g


def test_unused_taps_compile_to_the_same_program(monkeypatch):
    case = case_of("dit", depth=2, scan_layers=True)
    text = lambda: (
        jax.jit(lambda p: call(case, case.fn.__call__) * p["out"]["bias"][0]).lower(case.params).compile().as_text()
    )
    strip = lambda s: "\n".join(line.split(", metadata=")[0] for line in s.splitlines() if "stack_frame" not in line)
    with_taps = strip(text())
    for module in (attention, dit, mlp, unet):
        monkeypatch.setattr(module, "Tap", lambda name: lambda x: x)
        if hasattr(module, "mark_layer"):
            monkeypatch.setattr(module, "mark_layer", lambda layer: None)
    assert nw.tap_names(case.fn, case.params, case.x, case.t, case.cond) == ()
    head = lambda s: s[s.index("%") :]
    assert head(strip(text())) == head(with_taps)


def test_scanned_layers_are_stacked_and_written_per_layer():
    loop, scan = case_of("mlp"), case_of("mlp", scan_layers=True, remat="full")
    params = nw.stack_blocks(loop.params)
    names = [f"block_{i}/block" for i in range(2)]
    y, apart = call(loop, jax.jit(nw.tapped(loop.fn, read=names)))
    z, together = jax.jit(nw.tapped(scan.fn, read="blocks/block"))(params, scan.x, scan.t, scan.cond)
    np.testing.assert_allclose(z, y, atol=1e-5)
    np.testing.assert_allclose(together["blocks/block"], np.stack([apart[n] for n in names]), atol=1e-5)
    edit = nw.per_layer(lambda v, i: jnp.where(i == 1, 2 * v, v))
    z = jax.jit(nw.tapped(scan.fn, write={"blocks/block": edit}))(params, scan.x, scan.t, scan.cond)
    y = call(loop, jax.jit(nw.tapped(loop.fn, write={"block_1/block": lambda v: 2 * v})))
    np.testing.assert_allclose(z, y, atol=1e-5)
    with pytest.raises(ValueError, match="not inside scanned layers"):
        jax.eval_shape(nw.tapped(loop.fn, write={"block_1/block": edit}), loop.params, loop.x, loop.t, loop.cond)


def test_taps_in_a_sampling_scan_with_grad_and_remat():
    case = case_of("mlp", remat="full")
    f = nw.tapped(case.fn, read=["block_0/block"], write={"block_1/block": lambda v: 0.5 * v})

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        def body(x, t):
            y, taps = f(params, x, t, case.cond)
            return x - 0.1 * y, taps["block_0/block"]

        x, seen = jax.lax.scan(body, jnp.asarray(case.x), jnp.array([0.9, 0.5]))
        return jnp.sum(x**2) + jnp.sum(seen**2)

    value, g = loss(case.params)
    x, total = case.x, 0.0
    for t in (0.9, 0.5):
        y, taps = f(case.params, x, t, case.cond)
        x, total = x - 0.1 * y, total + np.sum(np.square(taps["block_0/block"]))
    np.testing.assert_allclose(value, np.sum(np.square(x)) + total, rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))


def test_plain_module_apply_and_value_equality():
    case = case_of("mlp")
    out, taps = nw.tapped(case.net.apply, read="block_0/block")({"params": case.params}, case.x, case.t, case.cond)
    assert out.shape == case.x.shape and taps["block_0/block"].shape == (3, 8)
    assert hash(nw.tapped(case.fn, "a")) == hash(nw.tapped(case_of("mlp").fn, ["a"]))
    assert nw.tapped(case.fn, "a") == nw.tapped(case_of("mlp").fn, ["a"])


def test_bad_taps():
    case = case_of("mlp")
    with pytest.raises(ValueError, match=r"unknown taps \['block_9/block'\].*'block_0/block'"):
        call(case, nw.tapped(case.fn, read="block_9/block"))
    with pytest.raises(ValueError, match=r"unknown taps \['nowhere'\]"):
        call(case, nw.tapped(case.fn, write={"nowhere": jnp.tanh}))
    with pytest.raises(ValueError, match="jitted function"):
        nw.tapped(jax.jit(case.fn))
    with pytest.raises(ValueError, match="must be a function"):
        nw.tapped(case.fn, write={"block_0/block": 1.0})
    with pytest.raises(ValueError, match="apply must be a function"):
        nw.tapped(3)
    with pytest.raises(ValueError, match="keep shape and dtype"):
        call(case, nw.tapped(case.fn, write={"block_0/block": lambda v: v.sum()}))
    hidden = jax.jit(case.fn)
    call(case, hidden)
    with pytest.raises(ValueError, match="no tap was reached"):
        call(case, nw.tapped(lambda *args: hidden(*args), write={"block_0/block": jnp.tanh}))
