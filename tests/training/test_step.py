import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffjax import numerics as nu
from diffjax.training import condition, init_state, make_train_step, optimizer


def run(steps=6, bad=(), optimizer=None, **options):
    state, train_step = toy.make(optimizer, **options)
    step = jax.jit(train_step)
    history = []
    for i in range(steps):
        state, metrics = step(state, toy.batch(i, bad=i in bad))
        history.append(jax.device_get(metrics))
    return state, history


def test_the_step_is_gradient_descent_on_the_mean_loss():
    """Against a loop written out in NumPy: the loss is quadratic, so its gradient is known."""
    state, (metrics,) = run(1, optimizer=optax.sgd(0.1), emas={})
    p, batch = toy.params(np.float64), toy.batch(0)
    k_time, k_noise = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0))
    losses, grads = [], {name: np.zeros(a.shape) for name, a in p.items()}
    for b in range(16):
        noise = jax.random.fold_in(jax.random.fold_in(k_noise, b), 0)
        eps = np.asarray(jax.random.normal(noise, (toy.D,)), np.float64)
        t = float(jax.random.uniform(jax.random.fold_in(k_time, b)))
        x0, label = batch["x"][b].astype(np.float64), batch["label"][b]
        x = (1 - t) * x0 + t * eps
        error = x @ p["w"] + t * p["b"] + p["embed"][label] - x0
        losses.append((error**2).mean())
        d = 2 * error / toy.D / 16
        grads["w"] += np.outer(x, d)
        grads["b"] += t * d
        grads["embed"][label] += d
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum((g**2).sum() for g in grads.values())), rtol=1e-5)
    toy.assert_close(state.params, {name: p[name] - 0.1 * grads[name] for name in p}, rtol=1e-5, atol=1e-6)
    assert 0 < metrics["time"] < 1


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_whole_batch(parts):
    whole, a = run(5)
    cut, b = run(5, accumulate=parts)
    toy.assert_close(whole, cut, rtol=1e-4, atol=1e-6)
    toy.assert_close(a, b, rtol=1e-5)


def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters():
    clean = [i for i in range(8) if i not in (2, 3, 5)]
    state, history = run(8, bad=(2, 3, 5))
    assert [int(m["skipped"]) for m in history] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [int(m["consecutive"]) for m in history] == [0, 0, 1, 2, 0, 1, 0, 0]
    assert int(state.step) == 8 and int(state.updates) == 5
    assert [bool(np.isfinite(m["loss"])) for m in history] == [i in clean for i in range(8)]

    # The same updates with the bad batches never seen; the keys of a step come from its number.
    other, train_step = toy.make()
    step = jax.jit(train_step)
    for n, i in enumerate(clean):
        skipped = {"total": jnp.int32(i - n), "consecutive": jnp.int32(0)}
        other = dataclasses.replace(other, step=jnp.int32(i), skipped=skipped)
        other, _ = step(other, toy.batch(i))
    toy.assert_equal((state.params, state.ema, state.opt_state), (other.params, other.ema, other.opt_state))


def test_without_the_guard_the_state_is_lost():
    state, _ = run(3, bad=(1,), guard=False)
    assert not np.isfinite(np.asarray(state.params["w"])).any() and int(state.skipped["total"]) == 0


def test_the_learning_rate_reported_is_the_one_used():
    schedule = optimizer.constant(0.5, warmup=4)
    start = toy.params()
    state, history = run(1, optimizer=optax.sgd(schedule), learning_rate=schedule, emas={})
    assert history[0]["learning_rate"] == 0.125
    moved = np.sqrt(sum(((np.asarray(state.params[k]) - start[k]) ** 2).sum() for k in start))
    np.testing.assert_allclose(moved, 0.125 * history[0]["grad_norm"], rtol=1e-4)
    _, history = run(3, bad=(1,), optimizer=optax.sgd(schedule), learning_rate=schedule)
    assert [float(m["learning_rate"]) for m in history] == [0.125, 0.25, 0.25]


def test_augmentation_sees_items_and_may_add_conditions():
    def augment(key, batch, items):
        assert items.shape == (16,) and items.dtype == jnp.int32
        return {"x": batch["x"] * 2, "label": batch["label"]}

    def loss(key, denoiser, x0, cond, items=None):
        return (denoiser(x0, jnp.zeros(16), cond).x0 - x0).mean(-1) ** 2, {"scale": jnp.abs(x0).mean(-1)}

    step = make_train_step(toy.model, loss, optax.sgd(0.1), augment=augment)
    _, metrics = jax.jit(step)(init_state(toy.params(), optax.sgd(0.1), 0), toy.batch(0))
    np.testing.assert_allclose(metrics["scale"], 2 * np.abs(toy.batch(0)["x"]).mean(), rtol=1e-5)


def test_the_same_state_gives_the_same_step_and_another_step_other_noise():
    _, a = run(2)
    _, b = run(2)
    toy.assert_equal(a, b)
    assert a[0]["time"] != a[1]["time"]


def test_half_precision_parameters_keep_a_wide_average():
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), toy.params())
    state = init_state(params, optax.sgd(0.1), 0, emas=toy.EMAS)
    assert state.ema["fast"]["w"].dtype == jnp.float32 and state.params["w"].dtype == jnp.bfloat16


def test_every_leaf_of_a_new_state_has_the_sharding_asked_for():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = init_state(toy.params(), optax.adamw(1e-3), 0, emas=toy.EMAS, sharding=sharding)
    assert {a.sharding for a in jax.tree.leaves(state)} == {sharding}


def test_bad_input():
    loss = lambda key, denoiser, x0, cond: (x0.mean(-1), {})
    with pytest.raises(ValueError, match="keyword items"):
        make_train_step(toy.model, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        toy.make(accumulate=0)
    with pytest.raises(ValueError, match="one value per example"):
        mean = lambda key, denoiser, x0, cond, items=None: (denoiser(x0, 0.0, cond).x0.mean(), {})
        step = make_train_step(toy.model, mean, optax.sgd(0.1))
        step(toy.make(optax.sgd(0.1))[0], toy.batch(0))
    with pytest.raises(ValueError, match="16 examples .* accumulate=3"):
        state, step = toy.make(accumulate=3)
        step(state, toy.batch(0))
    with pytest.raises(ValueError, match="params must be a pytree of arrays"):
        init_state({}, optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="typed key"):
        init_state(toy.params(), optax.sgd(0.1), jnp.zeros(2, jnp.uint32))


def test_a_loss_may_hold_arrays():
    @nu.pytree_dataclass
    class Weighted:
        weight: Any

        def __call__(self, key, denoiser, x0, cond, items=None):
            value, aux = toy.loss(key, denoiser, x0, cond, items)
            return self.weight * value, aux

    optimizer = optax.sgd(0.1)
    state, plain = toy.make(optimizer, emas={})
    step = make_train_step(toy.model, Weighted(jnp.full((), 2.0)), optimizer)
    (_, doubled), (_, once) = jax.jit(step)(state, toy.batch(0)), jax.jit(plain)(state, toy.batch(0))
    np.testing.assert_allclose(doubled["grad_norm"], 2 * once["grad_norm"], rtol=1e-6)


def test_condition_has_one_rule():
    assert condition({"x": 0, "index": 1}) is None
    assert condition({"x": 0, "tokens": 2}) == {"tokens": 2}
