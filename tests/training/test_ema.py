import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.training import adamw, ema, optimizer


def follow(spec, path):
    """The average of a path of scalars by the library."""
    m = {"e": {"w": jnp.zeros(1)}}
    for t, p in enumerate(path, 1):
        m = ema.ema_update(jnp.int32(t), m, {"w": jnp.full((1,), p)}, {"e": spec})
    return float(m["e"]["w"][0])


PATH = np.random.default_rng(0).normal(size=60).astype(np.float32)


def test_classic_average_is_the_geometric_sum():
    weights = 0.1 * 0.9 ** np.arange(60)[::-1]
    np.testing.assert_allclose(follow(ema.decay(0.9), PATH), weights @ PATH, rtol=1e-5)


def test_warm_up_forgets_the_start_and_then_decays_as_asked():
    t = jnp.arange(1, 200)
    weights = ema.decay(0.9, warmup=True)(t)
    assert weights[0] > 0.8 and np.all(np.diff(weights) <= 0)
    np.testing.assert_allclose(weights[-1], 0.1, rtol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_average_has_the_profile_and_the_width_that_it_names(sigma_rel):
    """The discrete weights are differences of (i / n)^(gamma + 1), whose mean and width converge to the closed form."""
    spec = ema.power(sigma_rel)
    assert ema.exp_to_std(spec.gamma) == pytest.approx(sigma_rel, rel=1e-9)
    edges = (np.arange(61) / 60) ** (spec.gamma + 1)
    np.testing.assert_allclose(follow(spec, PATH), np.diff(edges) @ PATH, rtol=2e-5, atol=1e-6)
    n = 20000
    weights, time = np.diff((np.arange(n + 1) / n) ** (spec.gamma + 1)), (np.arange(n) + 0.5) / n
    width = np.sqrt(weights @ time**2 - (weights @ time) ** 2)
    assert width == pytest.approx(sigma_rel, rel=1e-3)


def test_power_weight_is_accurate_late_in_a_run():
    t = 10**7
    weight = float(ema.power(0.05)(jnp.int32(t)))
    assert weight == pytest.approx((ema.std_to_exp(0.05) + 1) / t, rel=1e-4)


def test_several_averages_and_integer_leaves():
    params = {"w": jnp.ones(2), "n": jnp.int32(3)}
    old = {name: {"w": jnp.zeros(2), "n": jnp.int32(0)} for name in ("a", "b")}
    new = ema.ema_update(jnp.int32(1), old, params, {"a": ema.decay(0.5), "b": ema.power(0.1)})
    assert new["a"]["w"].tolist() == [0.5, 0.5] and new["b"]["w"].tolist() == [1, 1] and int(new["a"]["n"]) == 3
    assert ema.describe({"a": ema.decay(0.5), "b": ema.Power(6.0)}) == {
        "a": {"kind": "decay", "beta": 0.5, "warmup": False},
        "b": {"kind": "power", "gamma": 6.0},
    }


@pytest.mark.parametrize("make", [lambda: ema.decay(1.0), lambda: ema.power(0.3), lambda: ema.power(0.0)])
def test_averages_out_of_range(make):
    with pytest.raises(ValueError, match="must be in"):
        make()


# ----------------------------------------------------------------------------------------------------- optimizer


def values(schedule, at):
    with jax.numpy_dtype_promotion("standard"):
        return [round(float(schedule(jnp.int32(i))), 6) for i in at]


def test_schedules_at_their_corners():
    assert values(optimizer.constant(1.0, warmup=4), [0, 3, 4, 100]) == [0.25, 1, 1, 1]
    assert values(optimizer.cosine(1.0, 110, warmup=10, final=0.1), [9, 10, 60, 110, 500]) == [1, 1, 0.55, 0.1, 0.1]
    assert values(optimizer.linear_tail(2e-3, 1000, warmup=200), [0, 199, 499, 500, 750, 1000]) == [
        1e-05, 0.002, 0.002, 0.002, 0.001, 0.0,
    ]  # fmt: skip
    assert values(optimizer.inverse_sqrt(1.0, reference=100, warmup=10), [9, 50, 100, 400]) == [1, 1, 1, 0.5]


def test_adamw_is_adam_with_clipping_and_decoupled_decay():
    """One update in NumPy: after one step Adam's ratio is g / (|g| + eps)."""
    params, grads = {"w": jnp.full((2, 2), 2.0), "b": jnp.ones(2)}, {"w": jnp.full((2, 2), 30.0), "b": jnp.zeros(2)}
    tx = adamw(0.1, b2=0.99, eps=1.0, weight_decay=0.01, clip=1.0, decay_mask=optimizer.matrices)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(params), params)
    clipped = 30.0 / 60.0  # the norm of the gradient is 60
    np.testing.assert_allclose(updates["w"], -0.1 * (clipped / (clipped + 1.0) + 0.01 * 2.0), rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], 0.0)  # biases do not decay


def test_the_first_moment_may_be_kept_in_half_the_bytes():
    """m = (1 - b1) g after one update, in bfloat16; the second moment stays wide, and the update is nearly the same."""
    params = {"w": jnp.linspace(-1.0, 1.0, 64)}
    wide, narrow = adamw(0.1, b2=0.99), adamw(0.1, b2=0.99, moment_dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        (a, _), (b, state) = (tx.update(params, tx.init(params), params) for tx in (wide, narrow))
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    assert adam.mu["w"].dtype == jnp.bfloat16 and adam.nu["w"].dtype == jnp.float32
    np.testing.assert_allclose(adam.mu["w"].astype(np.float32), 0.1 * params["w"], rtol=2**-8)
    np.testing.assert_allclose(a["w"], b["w"], rtol=2**-7, atol=1e-6)


def test_float32_masters_take_updates_that_bfloat16_cannot_hold():
    """grad = 1: 100 updates of -1e-4 move a float32 parameter by .01 although the loss computes in bfloat16."""
    loss = lambda p: jnp.sum(p["w"].astype(jnp.bfloat16)).astype(jnp.float32)
    tx = optax.sgd(1e-4)

    def run(dtype):
        def body(p, _):
            return optax.apply_updates(p, tx.update(jax.grad(loss)(p), tx.init(p), p)[0]), None

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(body, {"w": jnp.ones(3, dtype)}, None, length=100)[0]["w"].astype(jnp.float32)

    np.testing.assert_allclose(run(jnp.float32), 0.99, rtol=1e-5)
    np.testing.assert_array_equal(run(jnp.bfloat16), 1.0)  # what the masters are for


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: adamw(0.1, clip=0.0), "clip"),
        (lambda: adamw(0.1, weight_decay=-1.0), "weight_decay"),
        (lambda: optimizer.constant(0.0), "peak"),
        (lambda: optimizer.constant(1.0, warmup=-1), "warmup"),
        (lambda: optimizer.cosine(1.0, 10, warmup=10), "shorter than the run"),
        (lambda: optimizer.linear_tail(1.0, 10, tail=0.0), "tail"),
        (lambda: optimizer.linear_tail(1.0, 10, warmup=6), "must end before"),
        (lambda: optimizer.inverse_sqrt(1.0, reference=0), "reference"),
    ],
)
def test_optimizer_settings_out_of_range(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_the_optimizer_trains_a_quadratic():
    tx = adamw(optimizer.linear_tail(0.1, 200, warmup=10), b2=0.99, clip=1.0)
    p = {"w": jnp.full((3,), 5.0)}
    with jax.numpy_dtype_promotion("standard"):

        def body(carry, _):
            p, s = carry
            updates, s = tx.update(p, s, p)
            return (optax.apply_updates(p, updates), s), None

        (p, _), _ = jax.lax.scan(body, (p, tx.init(p)), None, 200)
    assert np.abs(p["w"]).max() < 0.05
