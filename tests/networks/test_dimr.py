"""DiMR: time-dependent norms against their formula, branches and their outputs, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from network_cases import case_of

from diffjax import networks as nw
from diffjax.networks.dimr import Branch, DiMR, TimeNorm, depthwise, flow_log_snr
from diffjax.training.flops import count

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("centred", [False, True])
def test_a_time_norm_is_its_formula(centred):
    x, u = normal(3, 4, 5, 8), normal(3)
    params = {f"{n}_{k}": normal(8) for n in ("scale", "bias")[: 1 + centred] for k in ("0", "1", "slope", "shift")}
    y = TimeNorm(centred).apply({"params": params}, x, jnp.asarray(u))
    want = x.astype(np.float64)
    want = want - want.mean(-1, keepdims=True) * centred
    want /= np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
    for b in range(3):
        p = {}
        for n in ("scale", "bias")[: 1 + centred]:
            s = 1 / (1 + np.exp(-((1 + params[f"{n}_slope"]) * u[b] + params[f"{n}_shift"])))
            p[n] = s * params[f"{n}_0"] + (1 - s) * params[f"{n}_1"]
        want[b] = want[b] * p["scale"] + p.get("bias", 0)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_with_equal_ends_the_time_has_exactly_no_effect():
    """Every norm of the network, whatever the slopes; four vectors a norm of the blocks."""
    c = case_of("dimr")
    ends = lambda p: {
        k: ends(v) if isinstance(v, dict) else p[k[:-1] + "0"] if k[-2:] == "_1" else v for k, v in p.items()
    }
    params = {k: ends(v) if k.startswith("branch") else v for k, v in c.params.items()}
    params = jax.tree.map(jnp.asarray, params)
    f = jax.jit(c.fn)
    y = [np.asarray(f(params, c.x, np.float32(t) * np.ones(3, np.float32), c.cond)) for t in (0.0, 0.3, 1.0)]
    np.testing.assert_array_equal(y[0], y[1])
    np.testing.assert_array_equal(y[0], y[2])
    assert len(c.params["branch_0"]["block_0"]["norm_mlp"]) == 4


def test_log_snr_is_that_of_the_straight_path():
    t = np.array([0.01, 0.5, 0.9], np.float32)
    np.testing.assert_allclose(flow_log_snr(t), np.log((1 - t) ** 2 / t**2) / 4, rtol=1e-5)
    assert np.isfinite(flow_log_snr(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("k", [3, 7])
def test_depthwise_is_the_grouped_convolution(k):
    x, kernel = normal(2, 5, 6, 4), normal(k, k, 1, 4)
    form = ("NHWC", "HWIO", "NHWC")
    want = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form, feature_group_count=4)
    np.testing.assert_allclose(jax.jit(depthwise)(x, kernel), want, atol=1e-5)
    ones = jnp.ones((1, 7, 7, 1), jnp.bfloat16), jnp.full((7, 7, 1, 1), 1.1015625, jnp.bfloat16)
    np.testing.assert_allclose(float(depthwise(*ones)[0, 3, 3, 0]), 49 * 1.1015625, rtol=2**-8)  # rounded once


def test_the_lower_branch_comes_up_by_pixel_shuffle():
    """What changes at place (1, 1) of the 2 x 3 below changes the 2 x 2 pixels there, and no others."""
    c = case_of("dimr")

    @jax.jit
    def cascade(change):
        # the tokens of label and vector, then place 4 of 6
        write = {"branch_0/block_2/block": lambda v: v.at[:, 2 + 4].add(change)}
        return nw.tapped(c.fn, read="branch_1/cascade", write=write)(c.params, c.x, c.t, c.cond)[1]["branch_1/cascade"]

    changed = np.abs(cascade(1.0) - cascade(0.0)) > 1e-6
    assert changed.max((0, 3)).tolist() == [[i // 2 == 1 and j // 2 == 1 for j in range(6)] for i in range(4)]
    # with all of them below, each pixel has its own four of 16 channels of the dense layer
    assert c.params["branch_1"]["up"]["kernel"].shape == (4 * 8, 4 * 4)


def test_outputs_of_lower_branches_only_come_if_asked_for():
    c = case_of("dimr")
    net = c.net.clone(auxiliary=True)
    params = nw.random_parameters(net, c.x, c.t, c.cond)
    y, side = jax.jit(nw.from_linen(net))(params, c.x, c.t, c.cond)
    assert side["branch_0"].shape == (3, 2, 3, 2) and side["branch_0"].dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(c.fn)(params, c.x, c.t, c.cond), y, atol=1e-6)  # the same parameters, and less
    assert set(params["branch_0"]) - set(c.params["branch_0"]) == {"out", "norm_out"}
    start = jax.jit(nw.from_linen(net))(nw.initialise(net, jax.random.key(0), c.x, c.t, c.cond), c.x, c.t, c.cond)
    assert all(not np.any(a) for a in jax.tree.leaves(start))


def cost(name, monkeypatch):
    """Parameters in all, and billions of multiply-adds of a forward pass with 1000 classes."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # count convolutions as such
    net = nw.preset(name, num_classes=1000, auxiliary=True)
    side = net.size[0]
    args = jnp.zeros((1, side, side, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    work = count(nw.from_linen(net), params, *args)
    return nw.parameter_count(params), (work.matmul + work.conv) / 2e9


@pytest.mark.parametrize(("name", "millions", "gflops"), [("xl/2r", 505, 160), ("xl/3r", 525, 206)])
def test_sizes_and_operations_are_those_published(name, millions, gflops, monkeypatch):
    """Published "Gflops" are multiply-adds. By hand for XL/2R and to the last parameter, here with biases of q, k and v."""
    parameters, work = cost(f"dimr-{name}", monkeypatch)
    assert (round(parameters / 1e6), round(work)) == (millions, gflops)
    if name == "xl/2r":
        d, e = 960, 480
        mlp = lambda d: 4 * d + 3 * d * 2 * d + 5 * d
        low = 39 * (4 * d + 4 * d * d + d + mlp(d)) + 19 * (2 * d * d + d) + 16 * d + d + 256 * d + 1001 * d
        high = 21 * (49 * e + e + mlp(e)) + 10 * (2 * e * e + e) + 4 * e + e + 1024 * e
        up = 8 * 40 * d + 40 * d * 4 * e + 4 * e + 8 * e
        ends = sum(8 * n + 9 * n * 4 + 4 for n in (d, e))
        assert parameters - 39 * 3 * d == low + high + up + ends == 505_046_408


@pytest.mark.slow
def test_a_gigantic_one(monkeypatch):
    parameters, work = cost("dimr-g/2r", monkeypatch)
    assert (round(parameters / 1e7), round(work)) == (106, 331)


def test_positions_may_be_learned_up_to_a_size():
    net = DiMR(branches=(Branch(8, 1, 2, heads=2), Branch(4, 1, 1)), kernel=3, size=(8, 8))
    x, t = normal(1, 4, 6, 1), np.float32(0.5)
    params = nw.random_parameters(net, x, t)
    assert params["branch_0"]["positions"].shape == (4, 4, 8) and params["branch_1"]["positions"].shape == (8, 8, 4)
    assert np.isfinite(jax.jit(nw.from_linen(net))(params, x, t)).all()
    with pytest.raises(ValueError, match=r"learned for states of up to \(8, 8\), that is 4 x 4 patches; got 5 x 4"):
        jax.eval_shape(nw.from_linen(net), params, normal(1, 10, 8, 1), t)


@pytest.mark.parametrize(
    ("branches", "match"),
    [
        ((Branch(8, 1, 2, 2),), r"down to 1, such as 4, 2, 1; got \[2\]"),
        ((Branch(8, 1, 3, 2), Branch(8, 1, 2), Branch(8, 1, 1)), r"got \[3, 2, 1\]"),
        ((Branch(8, 2, 2, 2), Branch(8, 1, 1)), r"must be odd; got \[2, 1\]"),
        ((Branch(8, 1, 2), Branch(8, 1, 1)), "give a branch heads > 0"),
        ((Branch(8, 1, 8, 2), Branch(8, 1, 1)), "divisible by patch=8; got a state of shape"),
    ],
)
def test_bad_branches_are_refused(branches, match):
    net = DiMR(branches=branches, num_classes=3)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(net.init, jax.random.key(0), normal(1, 4, 4, 1), 0.5, np.zeros(1, np.int32))
