"""Forced weight normalisation, monitors and the gradient's noise, each against numbers known otherwise."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from diffjax import losses
from diffjax.training import devices, dynamics, fit, init_state, make_train_step
from diffjax.types import Denoiser


def unit_norms(kernel):
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), axis=0)


def test_weights_keep_norm_one_after_every_update():
    rng = np.random.default_rng(0)
    params = {"conv": rng.normal(size=(3, 3, 4, 5)), "dense": rng.normal(size=(7, 2)), "gain": np.ones(2)}
    params = dynamics.unit_weights(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params))
    tx = optax.chain(optax.adam(0.3), dynamics.normalise_weights())
    state = tx.init(params)

    @jax.jit
    def step(params, state, seed):
        grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(seed), p.shape), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        for i in range(20):
            before = params
            params, state = step(params, state, i)
            np.testing.assert_allclose(unit_norms(params["conv"]), np.sqrt(36), rtol=3e-7)
            np.testing.assert_allclose(unit_norms(params["dense"]), np.sqrt(7), rtol=3e-7)
        plain, _ = optax.adam(0.3).update(params, optax.adam(0.3).init(params), params)
    assert np.abs(params["dense"] - before["dense"]).max() > 0.01  # it does move
    assert np.abs(np.asarray(params["gain"]) - 1).max() > 0.1  # leaves outside the mask are left alone
    only = optax.chain(optax.sgd(1.0), dynamics.normalise_weights({"conv": False, "dense": True, "gain": False}))
    updates, _ = only.update(plain, only.init(params), params)
    np.testing.assert_array_equal(updates["conv"], -plain["conv"])
    zero = dynamics.unit_weights({"w": jnp.zeros((3, 2))})
    np.testing.assert_array_equal(zero["w"], 0)
    with pytest.raises(ValueError, match="needs the parameters"):
        only.update(plain, only.init(params))


def test_magnitudes_are_root_mean_squares_by_layer():
    start, train_step = toy.make(optax.sgd(0.1), monitor=dynamics.magnitudes)
    run = jax.jit(lambda state, batch: train_step(state, batch))
    new, metrics = run(start, toy.batch(0))
    for name in ("w", "b", "embed"):
        p, q = np.asarray(start.params[name]), np.asarray(new.params[name])
        rms = lambda a: np.sqrt(np.mean(a**2))
        np.testing.assert_allclose(metrics[f"weight_rms/{name}"], rms(q), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"update_rms/{name}"], rms(q - p), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"gradient_rms/{name}"], rms(q - p) / 0.1, rtol=1e-4)
    _, refused = run(start, toy.batch(0, bad=True))
    assert float(refused["update_rms/w"]) == 0.0


def test_options_that_are_off_leave_the_program_as_it_was():
    start, plain = toy.make()
    _, same = toy.make(monitor=None, noise_scale=False)
    texts = [jax.jit(lambda s, b, f=f: f(s, b)).lower(start, toy.batch(0)).as_text() for f in (plain, same)]
    assert texts[0] == texts[1]
    _, on = toy.make(monitor=dynamics.magnitudes)
    assert jax.jit(lambda s, b: on(s, b)).lower(start, toy.batch(0)).as_text() != texts[0]


# ------------------------------------------------------------------------------------------------------ gradient noise

MEAN, STD, AT = np.array([0.6, -0.3, 0.2]), np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.1, 0.1])
TRACE, SIGNAL = float((STD**2).sum()), float(((AT - MEAN) ** 2).sum())  # of the gradient w - x, x ~ N(MEAN, STD^2)


def quadratic(key, denoiser, x0, cond, items=None):
    return 0.5 * jnp.square(denoiser.leaves["w"][None] - x0).sum(-1), {}


def noise_of(driver, accumulate, steps=400, size=16):
    """Means of the two estimates over steps of a run that does not move."""
    tx = optax.set_to_zero()
    step = make_train_step(lambda p: Denoiser(p, None), quadratic, tx, accumulate=accumulate, noise_scale=True)
    made = devices.driver(driver, step, devices=jax.devices()[: 1 if driver == "mesh" else 4], per_dispatch=steps)
    rng = np.random.default_rng(0)
    batches = [{"x": (MEAN + STD * rng.normal(size=(size, 3))).astype(np.float32)} for _ in range(steps)]
    state = init_state({"w": AT.astype(np.float32)}, tx, 0)
    _, metrics = made.step(made.place(state), batches)
    return [np.asarray(metrics[name]) for name in ("gradient_trace", "gradient_signal")]


@pytest.mark.parametrize("driver, accumulate", [("mesh", 4), ("shard_map", 1), ("shard_map", 2)])
def test_gradient_noise_is_unbiased_for_a_linear_gaussian_model(driver, accumulate):
    for found, known in zip(noise_of(driver, accumulate), (TRACE, SIGNAL), strict=True):
        error = found.std() / np.sqrt(len(found))
        assert abs(found.mean() - known) < 4 * error and error < 0.1 * known


def test_gradient_noise_needs_parts():
    with pytest.raises(ValueError, match="accumulate >= 2"):
        noise_of("mesh", 1, steps=1)


def test_the_log_holds_the_loss_by_level_and_the_noise_scale(tmp_path):
    """Ratios of means over a window, equal to those of all of its items at once."""

    def loss(key, denoiser, x0, cond, items=None):
        per_example, aux = toy.loss(key, denoiser, x0, cond, items)
        return per_example, {"log_snr": 4 * aux["time"] - 2}

    binned = losses.by_noise_level(loss, (-1.0, 0.5))
    step = make_train_step(toy.model, binned, optax.set_to_zero(), accumulate=2, noise_scale=True)
    state = init_state(toy.params(), optax.set_to_zero(), 3)
    fit(state, step, toy.Batches(), steps=8, log_every=4, metrics_file=tmp_path / "log", stream=io.StringIO(),
        devices=jax.devices()[:1], per_dispatch=4)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [r["step"] for r in rows] == [4, 8]
    values, levels = [], []
    for i in range(4):
        b, key = toy.batch(i), jax.random.fold_in(jax.random.fold_in(state.key, i), 0)
        per_example, aux = loss(key, toy.model(state.params), jnp.asarray(b["x"]), b["label"], items=jnp.arange(16))
        values, levels = [*values, *np.asarray(per_example)], [*levels, *np.asarray(aux["log_snr"])]
    values, levels = np.array(values), np.array(levels)
    for name, inside in {
        "-inf..-1": levels < -1, "-1..0.5": (levels >= -1) & (levels < 0.5), "0.5..inf": levels >= 0.5,
    }.items():  # fmt: skip
        assert rows[0][f"items/{name}"] == inside.sum() > 0
        assert rows[0][f"loss/{name}"] == pytest.approx(values[inside].mean(), rel=1e-5)
    assert not any(name.startswith("bin_") for row in rows for name in row)
    assert rows[0]["noise_scale"] == pytest.approx(rows[0]["gradient_trace"] / rows[0]["gradient_signal"])


@pytest.mark.parametrize("driver", ["shard_map", "pmap"])
def test_bins_and_parts_add_no_collective(driver):
    """All that is averaged over devices travels in the one all-reduce of the gradient."""

    def loss(key, denoiser, x0, cond, items=None):
        per_example, aux = toy.loss(key, denoiser, x0, cond, items)
        return per_example, {"log_snr": aux["time"]}

    state = init_state(toy.params(), optax.sgd(0.1), 3)
    for wrapped, options in ((loss, {}), (losses.by_noise_level(loss, (0.3, 0.6)), {"noise_scale": True})):
        made = devices.driver(driver, make_train_step(toy.model, wrapped, optax.sgd(0.1), **options))
        text = made.lower(made.place(state), toy.batch(0)).compile().as_text()
        lines = [line for line in text.splitlines() if " all-reduce(" in line or " all-reduce-start(" in line]
        assert len(lines) == 1
