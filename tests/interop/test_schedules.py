"""Schedulers of diffusers: noise levels, timesteps and whole trajectories against numbers that diffusers computed.

experiments/interop/schedules.py makes the numbers; the network is exact, the prediction of a mixture of Gaussians.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, interop, processes
from experiments.interop import schedules

GOLDEN = json.loads(schedules.GOLDEN.read_text())
CASES = {case.name: case for case in schedules.CASES}
INTERPOLATED = (
    "karras",
    "exponential",
    "beta",
    "lu",
)  # codes between steps: theirs are rounded, or linear in log sigma


def schedule(name, **config):
    return interop.read_schedule({"_class_name": f"{name}Scheduler", **config})


def test_every_case_has_its_numbers():
    assert set(GOLDEN) == set(CASES)
    assert {case.config["_class_name"] for case in CASES.values()} == set(interop.SCHEDULERS)


@pytest.mark.parametrize("name", CASES)
def test_noise_levels_and_timesteps(name):
    case, golden = CASES[name], GOLDEN[name]
    s = interop.read_schedule(case.config)
    if "alpha" in golden and s.process.family.name == "from_betas":
        k = len(s.process.params["gap"])
        t = (np.array([i for i in schedules.PLACES if i < k]) + 1) / k
        np.testing.assert_allclose(s.process.alpha(t), golden["alpha"], rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(s.process.sigma(t), golden["sigma"], rtol=1e-6)
    if name.startswith(("PNDM", "ScoreSdeVe")):  # stages in between, and other places of the levels
        return
    between = name.endswith(INTERPOLATED) or s.process.family.name == "rectified"
    for n in (4, 10):
        theirs = np.array(golden[f"timesteps {n}"])
        theirs = np.concatenate([theirs[:1], theirs[1::2]]) if name.startswith("Heun") else theirs
        ours = s.timesteps(n, tokens=case.tokens)
        np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1.0 if between else 5e-3)
    if "levels 10" in golden:
        theirs = np.array(golden["levels 10"])
        theirs = np.concatenate([theirs[:1], theirs[1:-1:2], theirs[-1:]]) if name.startswith("Heun") else theirs
        grid = s.grid(10, tokens=case.tokens)
        ours = s.process.sigma(grid) / (1.0 if s.process.family.name == "rectified" else s.process.alpha(grid))
        np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=1e-4)  # theirs are float32


FAST = (
    "DDIM-sd",
    "DDIM-zero-snr",
    "DDPM-default",
    "EulerDiscrete-karras",
    "DPMSolverMultistep-default",
    "EDMEuler-default",
)
MORE = [name for name, case in CASES.items() if case.n and name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_trajectory_ends_where_theirs_does(name):
    s = interop.read_schedule(CASES[name].config)
    x, wanted = np.asarray(schedules.trajectory(CASES[name], s)), np.array(GOLDEN[name]["x"])
    assert np.abs(x - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_last_steps_of_no_length_are_left_out():
    ends = dict(clip_sample=False, set_alpha_to_one=False)
    assert schedule("DDIM", **ends).solver(4).evaluations == 3  # theirs stays at step 0
    assert schedule("DDIM", steps_offset=1, **ends).solver(4).evaluations == 4


def test_limits_are_transforms_around_the_guide():
    fn = lambda params, x, t, cond: 3 * x
    s = schedule("DDPM", prediction_type="sample")
    assert float(s.denoiser(fn, {})(jnp.ones((1, 2)), 0.5).x0.max()) == 1.0
    labels = lambda params, x, t, cond: x * (1.0 + cond.reshape(-1, 1))
    d = s.denoiser(labels, {}, null=np.float32(0), guide=guidance.cfg(3.0)).bind(jnp.ones(1))
    assert float(d(0.2 * jnp.ones((1, 2)), 0.5).x0.max()) == pytest.approx(0.8)
    assert float(d(jnp.ones((1, 2)), 0.5).x0.max()) == 1.0
    kept = schedule("DDIM", prediction_type="sample").denoiser(fn, {})(jnp.ones((1, 2)), 0.5)
    free = schedule("DDIM", prediction_type="sample", clip_sample=False).denoiser(fn, {})(jnp.ones((1, 2)), 0.5)
    np.testing.assert_array_equal(kept.eps, free.eps)  # DDIM there clips x0 alone


def test_thresholding_has_a_ceiling():
    # s is the largest |x0|, at most 1.5: then x0 = clip(x0, -1.5, 1.5) / 1.5
    options = dict(thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.5, prediction_type="sample")
    d = schedule("DDPM", **options).denoiser(lambda params, x, t, cond: x, {})
    np.testing.assert_allclose(d(jnp.array([[2.0, 0.3]]), 0.5).x0, [[1.0, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(d(jnp.array([[1.2, 0.3]]), 0.5).x0, [[1.0, 0.25]], rtol=1e-6)
    with pytest.raises(ValueError, match="ceiling must be at least floor=1.0"):
        guidance.dynamic_threshold(0.9, ceiling=0.5)


def test_learned_variance_is_an_auxiliary_output():
    s = schedule("DDPM", variance_type="learned_range", clip_sample=False)
    twice = lambda params, x, t, cond: jnp.concatenate([0.1 * x, jnp.ones_like(x)], axis=-1)
    e = s.denoiser(twice, {}).evaluate(jnp.ones((2, 4, 4, 3)), 0.5)
    assert e.prediction.x0.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(e.aux["fraction"], np.ones((2, 4, 4, 3)))
    x = diffjax.sample(jax.random.key(0), s.denoiser(twice, {}), s.solver(2), jnp.ones((2, 4, 4, 3)))
    assert bool(jnp.isfinite(x).all())
    with pytest.raises(ValueError, match="returns 4 channels for a state of 3"):
        s.denoiser(lambda params, x, t, cond: x[..., :1].repeat(4, -1), {})(jnp.ones((2, 4, 4, 3)), 0.5)


@pytest.mark.parametrize(
    ("process", "read"),
    [
        (processes.from_betas(np.linspace(1e-3, 0.2, 20)), diffjax.from_v),
        (processes.zero_terminal_snr(processes.from_betas(np.linspace(1e-3, 0.2, 20))), diffjax.from_v),
        (processes.rectified(), diffjax.from_velocity),
        (processes.edm(0.01, 50.0), diffjax.from_edm),
    ],
)
def test_a_process_of_ours_as_their_configuration(process, read):
    config = json.loads(json.dumps(interop.schedule_config(process, read)))
    again = interop.read_schedule(config)
    t = np.linspace(0.05, 1, 20)
    np.testing.assert_allclose(again.process.alpha(t), process.alpha(t), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(again.process.sigma(t), process.sigma(t), rtol=1e-9)
    x, out = jnp.ones((2, 3)), 0.3 * jnp.ones((2, 3))
    np.testing.assert_allclose(again.pieces.read(out, x, process, 0.5), read(out, x, process, 0.5), rtol=1e-6)


def test_fields_of_other_classes_are_named():
    s = schedule("PNDM", clip_sample=False, skip_prk_steps=True, steps_offset=1)
    assert s.unused == ("clip_sample",)
    assert (
        schedule("DDPM", tensor_format="pt", timestep_values=None, predict_epsilon=False).pieces.read is diffjax.from_x0
    )


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Foo", {}, "the scheduler 'FooScheduler' has no counterpart here; there are DDPMScheduler"),
        ("DDIM", dict(beta_strat=1e-4), "DDIMScheduler has no field beta_strat=0.0001"),
        ("DDIM", dict(beta_schedule="exp"), "beta_schedule='exp' has no counterpart here; accepted is 'linear'"),
        ("DDIM", dict(beta_end=1.5), r"betas must lie in \(0, 1\)"),
        ("DDIM", dict(trained_betas=[0.1, 0.2]), "trained_betas has shape .2,. and num_train_timesteps=1000"),
        ("DDIM", dict(num_train_timesteps=0), "num_train_timesteps must be an int >= 1; got 0"),
        ("DDIM", dict(prediction_type="score"), "prediction_type='score' has no counterpart"),
        (
            "DDIM",
            dict(predict_epsilon=True, prediction_type="sample"),
            "predict_epsilon=True and prediction_type='sample'",
        ),
        ("DDIM", dict(clip_predict_epsilon=True), "clip_predict_epsilon=True has no counterpart"),
        ("DDPM", dict(variance_type="learned"), "variance_type='learned' has no counterpart"),
        ("DDPM", dict(thresholding=True, sample_max_value=0.5), "sample_max_value at least 1; got 0.995, 0.5"),
        ("EulerDiscrete", dict(interpolation_type="log_linear"), "interpolation_type='log_linear' has no counterpart"),
        (
            "EulerDiscrete",
            dict(use_karras_sigmas=True, use_beta_sigmas=True),
            "use_karras_sigmas=True and use_beta_sigmas=True exclude each other",
        ),
        ("DPMSolverMultistep", dict(algorithm_type="dpmsolver"), "and final_sigmas_type='zero' exclude each other"),
        ("DPMSolverMultistep", dict(solver_order=4), "solver_order=4 has no counterpart"),
        ("DPMSolverMultistep", dict(prediction_type="flow_prediction"), "prediction_type='flow_prediction' has no"),
        ("DPMSolverMultistep", dict(use_dynamic_shifting=True), "needs use_flow_sigmas=True"),
        ("UniPCMultistep", dict(disable_corrector=[0]), r"disable_corrector=\(0,\) has no counterpart"),
        ("FlowMatchEulerDiscrete", dict(invert_sigmas=True), "invert_sigmas=True has no counterpart"),
        ("FlowMatchEulerDiscrete", dict(shift=-1.0), "shift must be a number > 0; got -1.0"),
        ("EDMEuler", dict(sigma_min=3.0, sigma_max=1.0), "sigma_min must be smaller than sigma_max"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(name, config, message):
    with pytest.raises(ValueError, match=message):
        schedule(name, **config)


@pytest.mark.parametrize(
    ("name", "config", "n", "options", "message"),
    [
        ("DDIM", {}, 0, {}, "n, the number of evaluations, must be an int >= 1; got 0"),
        ("DDIM", {}, 2000, {}, "n must be at most num_train_timesteps=1000; got 2000"),
        ("DDIM", dict(steps_offset=1), 1000, {}, "steps_offset=1 leads beyond the last of 1000 steps"),
        ("DDIM", {}, 4, dict(levels=np.ones(4)), "DDIMScheduler has no shift"),
        ("EulerDiscrete", dict(use_karras_sigmas=True, sigma_max=700.0), 4, {}, "outside of the schedule"),
        ("FlowMatchEulerDiscrete", dict(use_dynamic_shifting=True), 4, {}, "give tokens="),
        ("FlowMatchEulerDiscrete", {}, 4, dict(levels=np.ones(3)), r"levels must have shape \(4,\); got \(3,\)"),
        ("FlowMatchEulerDiscrete", dict(shift_terminal=0.1), 1, {}, "needs at least two evaluations"),
    ],
)
def test_grids_that_cannot_be(name, config, n, options, message):
    with pytest.raises(ValueError, match=message):
        schedule(name, **config).grid(n, **options)


def test_levels_before_the_shift():
    s = schedule("FlowMatchEulerDiscrete", shift=3.0)
    levels = np.array([1.0, 0.5])
    np.testing.assert_allclose(s.grid(2, levels=levels), [1.0, 1.5 / 2.0, 0.0])  # 3 s / (1 + 2 s)
    dynamic = schedule("FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    shift = math.exp(1.15)  # at max_image_seq_len
    np.testing.assert_allclose(dynamic.grid(2, tokens=4096, levels=levels)[1], 0.5 * shift / (1 + 0.5 * (shift - 1)))


def test_networks_that_take_another_unit_of_time():
    s, seen = schedule("FlowMatchEulerDiscrete"), lambda params, x, t, cond: x * t.reshape(-1, 1)
    thousand, one = (s.denoiser(seen, {}, unit=unit)(jnp.ones((1, 2)), 0.5) for unit in (1.0, 1e-3))
    np.testing.assert_allclose(1 - thousand.x0, 0.5 * 500.0, rtol=1e-6)  # x0 = x - sigma v, where v is the code
    np.testing.assert_allclose(1 - one.x0, 0.5 * 0.5, rtol=1e-6)
    assert interop.CLASSES["FluxTransformer2DModel"].unit == 1e-3


def test_a_process_without_scheduler_is_refused():
    with pytest.raises(ValueError, match="no scheduler expresses the process 'cosine'"):
        interop.schedule_config(processes.cosine())
