"""Schedulers of continuous noise levels: flow matching, EDM and variance exploding of diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffjax import prediction as pr
from diffjax.interop import levels as lv
from diffjax.interop import options
from diffjax.interop.pieces import (
    EdmV,
    Kind,
    Pieces,
    expect,
    limits_of,
    no_levels,
    quarter_log_sigma,
    read_of,
    sigma_itself,
    steps_of,
)
from diffjax.processes import edm, rectified, ve
from diffjax.solvers import ddim, dpmpp, predictor_corrector
from diffjax.types import Process, Solver

# -------------------------------------------------------------------------------------------------------------- flows


def shift_of(kind: str, c: Any, tokens: Any) -> float:
    """The factor of sigma / alpha.   shift,   or e^mu or mu with mu linear in the tokens of the picture

    mu = base_shift + (tokens - base_image_seq_len) (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    """
    if not c.use_dynamic_shifting:
        return float(c.shift)
    if tokens is None:
        raise ValueError(
            f"{kind} has use_dynamic_shifting=True: its grid depends on the picture; give tokens=, the length of the "
            "sequence that the network gets (height times width of the latent over the patch)"
        )
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = c.base_shift + slope * (tokens - c.base_image_seq_len)
    return options.accept(kind, "time_shift_type", c.time_shift_type, {"exponential": math.exp(mu), "linear": mu})


def shifted(sigma: Any, shift: float) -> Any:
    """Noise levels of a flow with sigma / alpha times a factor.   shift s / (1 + (shift - 1) s)

    Reference: Esser et al. 2024, arXiv:2403.03206, Eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def stretched(sigma: np.ndarray, last: float | None) -> np.ndarray:
    """Noise levels with 1 - sigma scaled so that the last is `last`; None leaves them."""
    if not last:
        return sigma
    if sigma[-1] == 1:
        raise ValueError(f"shift_terminal={last} needs at least two evaluations; got {len(sigma)}")
    return 1 - (1 - sigma) * ((1 - last) / (1 - sigma[-1]))


def _flow_euler(kind: str, c: Any) -> Pieces:
    expect(kind, c, invert_sigmas=False, stochastic_sampling=False)
    k, convert = c.num_train_timesteps, lv.conversion(kind, c)
    if not c.use_dynamic_shifting and not (isinstance(c.shift, (int, float)) and c.shift > 0):
        raise ValueError(f"{kind}: shift must be a number > 0; got {c.shift!r}")

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        shift = shift_of(kind, c, tokens)
        if levels is None:  # the class spaces between shifted ends and shifts again
            end = 1 / k if c.use_dynamic_shifting else shifted(1 / k, shift)
            levels = np.linspace(1, end, n)
        if np.shape(levels) != (n,):
            raise ValueError(f"levels must have shape ({n},); got {np.shape(levels)}")
        sigma = stretched(shifted(np.asarray(levels, np.float64), shift), c.shift_terminal)
        if convert is not None:
            sigma = convert(float(sigma[0]), float(sigma[-1]), n)
        return lv.decreasing(np.append(sigma, 0.0))

    return Pieces(rectified(), pr.from_velocity, steps_of(k), grid, ddim)


def by_flow_sigmas(kind: str, c: Any, method: Any, limits: tuple) -> Pieces:
    """DPM-Solver or UniPC on a flow. Their codes are cut to integers; ours are not."""
    k, flat = c.num_train_timesteps, kind == "UniPCMultistepScheduler"
    if c.use_dynamic_shifting:
        raise ValueError(
            f"{kind}: use_dynamic_shifting=True takes its shift from the pipeline; set it False and flow_shift to the shift"
        )
    expect(kind, c, use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
    expect(kind, c, final_sigmas_type="zero")
    shift = float(c.flow_shift)

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        found = np.linspace(1, 1 / k, n + 1)[:-1] if flat else 1 - np.linspace(1, 1 / k, n + 1)[:0:-1]
        found = found if levels is None else np.asarray(levels, np.float64)
        sigma = stretched(shifted(found, shift), getattr(c, "shift_terminal", None))
        if flat and abs(sigma[0] - 1) < 1e-6:
            sigma = np.append(sigma[0] - 1e-6, sigma[1:])  # so that log-SNR is finite, as there
        return lv.decreasing(np.append(sigma, 0.0))

    read = read_of(kind, c, ("flow_prediction", "epsilon", "sample"))
    return Pieces(rectified(), read, steps_of(k), grid, method, limits=limits)


# ---------------------------------------------------------------------------------------------------------- EDM and VE


def _edm(kind: str, c: Any, method: Any = ddim, limits: tuple = ()) -> Pieces:
    """EDM's preconditioning around the network. Their first noise has the deviation sqrt(sigma_max^2 + 1), ours sigma_max."""
    process, d = edm(c.sigma_min, c.sigma_max), float(c.sigma_data)
    read = options.accept(
        kind, "prediction_type", c.prediction_type, {"epsilon": pr.EdmReader(d), "v_prediction": EdmV(d)}
    )
    spaced = {
        "karras": lambda high, low, n: lv.karras(high, low, n, float(c.rho)),
        "exponential": lv.exponential,
    }
    convert = options.accept(kind, "sigma_schedule", c.sigma_schedule, spaced)
    end = options.accept(kind, "final_sigmas_type", c.final_sigmas_type, {"zero": 0.0, "sigma_min": c.sigma_min})

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        no_levels(kind, levels)
        return lv.decreasing(np.append(convert(c.sigma_max, c.sigma_min, n), end) / c.sigma_max)

    return Pieces(process, read, quarter_log_sigma, grid, method, pr.edm_scale(d), limits)


def _edm_dpm(kind: str, c: Any) -> Pieces:
    eta = options.accept(kind, "algorithm_type", c.algorithm_type, {"dpmsolver++": 0.0, "sde-dpmsolver++": 1.0})
    second = options.accept(kind, "solver_type", c.solver_type, {"midpoint": False, "heun": True})
    order = options.accept(kind, "solver_order", c.solver_order, (1, 2, 3))

    def method(process: Process, grid: Any) -> Solver:
        return dpmpp(process, grid, order, eta, heun=second and order == 2)

    return _edm(kind, c, method, limits_of(kind, c))


def _score_ve(kind: str, c: Any) -> Pieces:
    """Geometric noise levels; the network returns the score and is given sigma. Ends at sigma_min."""

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        no_levels(kind, levels)
        return np.linspace(1, 0, n + 1)

    def method(process: Process, grid: Any) -> Solver:
        return predictor_corrector(process, grid, snr=float(c.snr), corrector_steps=c.correct_steps)

    return Pieces(ve(c.sigma_min, c.sigma_max), pr.from_score, sigma_itself, grid, method)


_EDM = dict(
    sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
    prediction_type="epsilon", rho=7.0, final_sigmas_type="zero",
)  # fmt: skip
KINDS = {
    "FlowMatchEulerDiscreteScheduler": Kind(
        dict(
            num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096, invert_sigmas=False, shift_terminal=None,
            use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, time_shift_type="exponential",
            stochastic_sampling=False,
        ),
        _flow_euler,
    ),
    "EDMEulerScheduler": Kind(_EDM, _edm),
    "EDMDPMSolverMultistepScheduler": Kind(
        _EDM | dict(
            solver_order=2, thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
            algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True, euler_at_final=False,
        ),
        _edm_dpm,
    ),
    "ScoreSdeVeScheduler": Kind(
        dict(num_train_timesteps=2000, snr=0.15, sigma_min=0.01, sigma_max=1348.0, sampling_eps=1e-5, correct_steps=1),
        _score_ve,
    ),
}  # fmt: skip
