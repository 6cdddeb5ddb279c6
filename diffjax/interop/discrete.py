"""Schedulers of K integer steps: DDPM, DDIM, PNDM, LMS, Heun, Euler, DPM-Solver and UniPC of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax import prediction as pr
from diffjax.interop import continuous, options
from diffjax.interop import levels as lv
from diffjax.interop.pieces import EdmV, Kind, Pieces, expect, limits_of, no_levels, quarter_log_sigma, read_of
from diffjax.processes import edm, from_betas, step_of_time
from diffjax.solvers import (
    EPS,
    X0,
    ancestral,
    ddim,
    ddpm,
    ddpm_learned,
    dpm_solver_sde,
    dpmpp,
    exp_ab,
    exp_rk,
    heun,
    ipndm,
)
from diffjax.solvers.lms import lms
from diffjax.solvers.pndm import pndm
from diffjax.solvers.unipc import b1, b2, unipc
from diffjax.types import Process, Solver

BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
STEPS = dict(prediction_type="epsilon", steps_offset=0)
ZERO = dict(rescale_betas_zero_snr=False)
CLIP = dict(clip_sample=True, clip_sample_range=1.0)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
SIGMAS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
FLOW = dict(use_flow_sigmas=False, flow_shift=1.0, use_dynamic_shifting=False, time_shift_type="exponential")
LEADING, LINSPACE = dict(timestep_spacing="leading"), dict(timestep_spacing="linspace")

Grid = Callable[[int, Any, Any], np.ndarray]


# ------------------------------------------------------------------------------------------------------------- grids


def times_of_sigma(kind: str, process: Process, sigma: np.ndarray) -> np.ndarray:
    """The times of values of sigma / alpha, which must be those of the schedule."""
    t = process.time_of_log_snr(-np.log(sigma))
    k = len(process.params["gap"])
    if np.any(t < 1 / k - 1e-9) or np.any(t > 1 + 1e-9):
        low, high = (math.exp(-float(process.log_snr(a))) for a in (1 / k, 1.0))
        raise ValueError(
            f"{kind}: noise levels from {sigma.min():.4g} to {sigma.max():.4g} are outside of the schedule, {low:.4g} to "
            f"{high:.4g}; leave sigma_min and sigma_max out"
        )
    return np.minimum(t, 1.0)


def grid_of(kind: str, c: Any, process: Process, timesteps: Callable[..., np.ndarray], end: float, whole: bool) -> Grid:
    """The grid of a class: its timesteps, or sigmas spaced otherwise, then `end`.

    Args: whole: sigmas are spaced over all steps, and not from the first to the last of the timesteps.
    """
    k = c.num_train_timesteps
    sigma = np.exp(-process.log_snr(np.arange(1, k + 1) / k))
    convert = lv.conversion(kind, c)

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        no_levels(kind, levels)
        if n > k:
            raise ValueError(f"n must be at most num_train_timesteps={k}; got {n}")
        steps = timesteps(kind, c, n, -np.log(sigma))
        if steps.max() > k - 1:
            raise ValueError(
                f"{kind}: steps_offset={c.steps_offset} leads beyond the last of {k} steps; take fewer than {n}"
            )
        if convert is not None:
            between = sigma if whole else np.interp(steps, np.arange(k), sigma)[::-1]
            high, low = (
                getattr(c, name, None) or a for name, a in (("sigma_max", between[-1]), ("sigma_min", between[0]))
            )
            t = times_of_sigma(kind, process, convert(high, low, n))
        elif np.array_equal(steps, steps.round()):
            t = (steps + 1) / k
        else:
            t = times_of_sigma(kind, process, np.interp(steps, np.arange(k), sigma))
        return lv.decreasing(np.append(t, end))

    return grid


def end_of(kind: str, c: Any) -> float:
    """The last time: data, or the first of the K steps."""
    if hasattr(c, "set_alpha_to_one"):
        return 0.0 if c.set_alpha_to_one else 1 / c.num_train_timesteps
    accepted = {"zero": 0.0, "sigma_min": 1 / c.num_train_timesteps}
    return options.accept(kind, "final_sigmas_type", getattr(c, "final_sigmas_type", "zero"), accepted)


def pieces(kind: str, c: Any, timesteps: Any, method: Any, *, whole: bool = False, **others: Any) -> Pieces:
    """A class whose network is given the step."""
    process = from_betas(lv.betas_of(kind, c))
    grid = grid_of(kind, c, process, timesteps, end_of(kind, c), whole)
    return Pieces(process, **{"read": read_of(kind, c), **others}, time=step_of_time, grid=grid, method=method)


# -------------------------------------------------------------------------------------------------- one by one


def _ddpm(kind: str, c: Any) -> Pieces:
    accepted = {"fixed_small": 0.0, "fixed_small_log": 0.0, "fixed_large": 1.0, "learned_range": None}
    variance = options.accept(kind, "variance_type", c.variance_type, accepted)
    method = ddpm_learned if variance is None else lambda process, grid: ddpm(process, grid, variance)
    return pieces(kind, c, lv.rounded, method, limits=limits_of(kind, c))


def _ddim(kind: str, c: Any) -> Pieces:
    return pieces(kind, c, lv.rounded, ddim, limits=limits_of(kind, c, keep_eps=True))


def _pndm(kind: str, c: Any) -> Pieces:
    read = read_of(kind, c, ("epsilon", "v_prediction"))
    return pieces(kind, c, lv.rounded, ipndm if c.skip_prk_steps else pndm, read=read)


def _lms(kind: str, c: Any) -> Pieces:
    return pieces(kind, c, lv.fractional, lms)


def _heun(kind: str, c: Any) -> Pieces:
    return pieces(kind, c, lv.fractional, heun, limits=limits_of(kind, c))


def _euler(kind: str, c: Any) -> Pieces:
    """Euler in sigma / alpha is `ddim`. They hold x / alpha, we hold x."""
    expect(kind, c, interpolation_type="linear")
    options.accept(kind, "timestep_type", c.timestep_type, ("discrete", "continuous"))
    read = "sample" if c.prediction_type == "original_sample" else c.prediction_type
    c.prediction_type = read
    if c.timestep_type == "discrete" or read != "v_prediction":  # continuous codes are for v alone
        return pieces(kind, c, lv.fractional, ddim)
    return _euler_continuous(kind, c)


def _euler_continuous(kind: str, c: Any) -> Pieces:
    """Codes log(sigma) / 4, and sigmas that need not be those of the betas; v in coordinates of unit variance."""
    discrete = from_betas(lv.betas_of(kind, c))
    k = c.num_train_timesteps
    sigma = np.exp(-discrete.log_snr(np.arange(1, k + 1) / k))
    process = edm(c.sigma_min or float(sigma[0]), c.sigma_max or float(sigma[-1]))
    convert = lv.conversion(kind, c)

    def grid(n: int, tokens: Any, levels: Any) -> np.ndarray:
        no_levels(kind, levels)
        found = np.interp(lv.fractional(kind, c, n, None), np.arange(k), sigma)
        if convert is not None:
            found = convert(c.sigma_max or found[0], c.sigma_min or found[-1], n)
        last = 0.0 if end_of(kind, c) == 0 else sigma[0]
        return lv.decreasing(np.append(found, last) / process.params["sigma_max"])

    return Pieces(process, EdmV(1.0), quarter_log_sigma, grid, ddim, input_scale=pr.edm_scale(1.0))


def _ancestral(kind: str, c: Any) -> Pieces:
    return pieces(kind, c, lv.fractional, ancestral)


# --------------------------------------------------------------------------------------------- DPM-Solver and UniPC

ALGORITHMS = {"dpmsolver++": (X0, 0.0), "deis": (X0, 0.0), "dpmsolver": (EPS, 0.0)}
NOISY = {"sde-dpmsolver++": (X0, 1.0), "sde-dpmsolver": (EPS, 1.0)}
VARIANCES = (None, "learned", "learned_range", "fixed_small", "fixed_small_log", "fixed_large")  # it is not used
TYPES = {"midpoint": False, "heun": True, "logrho": False, "bh1": False, "bh2": False}


def _lambda_pieces(kind: str, c: Any, method: Any, limited: bool) -> Pieces:
    """A class of DPM-Solver or UniPC: by betas, or a flow."""
    limits = limits_of(kind, c) if limited else ()
    if c.use_flow_sigmas:
        return continuous.by_flow_sigmas(kind, c, method, limits)
    if c.use_dynamic_shifting:
        raise ValueError(f"{kind}: use_dynamic_shifting=True needs use_flow_sigmas=True")
    return pieces(kind, c, lv.one_less, method, whole=True, limits=limits)


def _order(kind: str, c: Any) -> int:
    return options.accept(kind, "solver_order", c.solver_order, (1, 2, 3))


def _dpm_multistep(kind: str, c: Any) -> Pieces:
    order, heun_type = _order(kind, c), options.accept(kind, "solver_type", c.solver_type, TYPES)
    value, eta = options.accept(kind, "algorithm_type", c.algorithm_type, ALGORITHMS | NOISY)
    options.accept(kind, "variance_type", c.variance_type, VARIANCES)
    _ends_at(kind, c, value)

    def method(process: Process, grid: Any) -> Solver:
        if value is X0:
            return dpmpp(process, grid, order, eta, heun=heun_type and order == 2)
        return dpm_solver_sde(process, grid, min(order, 2)) if eta else exp_ab(process, grid, order, EPS)

    return _lambda_pieces(kind, c, method, value is X0)


def _ends_at(kind: str, c: Any, value: Any) -> None:
    if value is EPS and c.final_sigmas_type == "zero":
        raise ValueError(
            f"{kind}: algorithm_type={c.algorithm_type!r} and final_sigmas_type='zero' exclude each other; set 'sigma_min'"
        )


def _dpm_singlestep(kind: str, c: Any) -> Pieces:
    order = _order(kind, c)
    options.accept(kind, "solver_type", c.solver_type, TYPES)
    accepted = ALGORITHMS | {"sde-dpmsolver++": (X0, 1.0)}
    value, eta = options.accept(kind, "algorithm_type", c.algorithm_type, accepted)
    options.accept(kind, "variance_type", c.variance_type, VARIANCES)
    _ends_at(kind, c, value)
    lower = c.lower_order_final or c.final_sigmas_type == "zero"

    def method(process: Process, grid: Any) -> Solver:
        spans = budget(len(grid) - 1, order, lower)
        return exp_rk(process, np.asarray(grid)[np.cumsum([0, *spans])], spans, value, eta)

    return _lambda_pieces(kind, c, method, value is X0)


def budget(n: int, order: int, lower_order_final: bool) -> tuple[int, ...]:
    """The orders of single steps that make n evaluations together, as DPM-Solver-fast.

    Example:
        >>> budget(9, 3, True), budget(8, 2, True), budget(8, 2, False)
        ((3, 3, 2, 1), (2, 2, 2, 1, 1), (2, 2, 2, 2))
    """
    whole, rest = divmod(n, order)
    if rest == 0 and (not lower_order_final or order == 1):
        return (order,) * whole
    if rest == 0:
        return (order,) * (whole - 1) + ((2, 1) if order == 3 else (1, 1))
    return (order,) * whole + (rest,)


def _unipc(kind: str, c: Any) -> Pieces:
    order, value = _order(kind, c), X0 if c.predict_x0 else EPS
    scale = options.accept(
        kind, "solver_type", c.solver_type, {"bh1": b1, "bh2": b2, "midpoint": b2, "heun": b2, "logrho": b2}
    )
    expect(kind, c, disable_corrector=(), solver_p=None)

    def method(process: Process, grid: Any) -> Solver:
        return unipc(process, grid, order, value, scale, lower_order_final=c.lower_order_final)

    return _lambda_pieces(kind, c, method, value is X0)


_DPM = BETAS | THRESHOLD | SIGMAS | FLOW | dict(
    solver_order=2, prediction_type="epsilon", final_sigmas_type="zero", solver_type="midpoint", lower_order_final=True
)  # fmt: skip
_DPM_ALONE = dict(algorithm_type="dpmsolver++", lambda_min_clipped=-math.inf, variance_type=None)
KINDS = {
    "DDPMScheduler": Kind(
        BETAS | STEPS | LEADING | ZERO | CLIP | THRESHOLD | dict(variance_type="fixed_small"), _ddpm
    ),
    "DDIMScheduler": Kind(BETAS | STEPS | LEADING | ZERO | CLIP | THRESHOLD | dict(set_alpha_to_one=True), _ddim),
    "PNDMScheduler": Kind(BETAS | STEPS | LEADING | dict(skip_prk_steps=False, set_alpha_to_one=False), _pndm),
    "LMSDiscreteScheduler": Kind(BETAS | STEPS | LINSPACE | SIGMAS, _lms),
    "HeunDiscreteScheduler": Kind(
        BETAS | STEPS | LINSPACE | SIGMAS | CLIP | dict(beta_start=0.00085, beta_end=0.012, clip_sample=False), _heun
    ),
    "EulerDiscreteScheduler": Kind(
        BETAS | STEPS | LINSPACE | SIGMAS | ZERO | dict(
            interpolation_type="linear", sigma_min=None, sigma_max=None, timestep_type="discrete", final_sigmas_type="zero"
        ),
        _euler,
    ),
    "EulerAncestralDiscreteScheduler": Kind(BETAS | STEPS | LINSPACE | ZERO, _ancestral),
    "DPMSolverMultistepScheduler": Kind(
        _DPM | _DPM_ALONE | STEPS | LINSPACE | ZERO | dict(euler_at_final=False, use_lu_lambdas=False), _dpm_multistep
    ),
    "DPMSolverSinglestepScheduler": Kind(_DPM | _DPM_ALONE | dict(lower_order_final=False), _dpm_singlestep),
    "UniPCMultistepScheduler": Kind(
        _DPM | STEPS | LINSPACE | ZERO | dict(
            predict_x0=True, solver_type="bh2", disable_corrector=(), solver_p=None, sigma_min=None, sigma_max=None,
            shift_terminal=None,
        ),
        _unipc,
    ),
}  # fmt: skip
