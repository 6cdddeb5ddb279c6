"""Configurations of schedulers of diffusers that are compared with what they mean here."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A configuration, and the number of evaluations whose trajectory is compared (0: none)."""

    name: str
    config: dict[str, Any]
    n: int = 10
    tokens: int | None = None


def case(name: str, kind: str, n: int = 10, tokens: int | None = None, **config: Any) -> Case:
    """A case; the name of the class is short."""
    full = kind if kind.endswith("Scheduler") else f"{kind}Scheduler"
    return Case(f"{kind}-{name}", {"_class_name": full, **config}, n, tokens)


SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
COSINE = dict(beta_schedule="squaredcos_cap_v2")
V = dict(prediction_type="v_prediction")
X0 = dict(prediction_type="sample")
CASES = (
    case("default", "DDPM"),
    case("large", "DDPM", variance_type="fixed_large", clip_sample=False),
    case("sigmoid", "DDPM", beta_schedule="sigmoid", clip_sample_range=2.0, **X0),
    case("trailing", "DDPM", timestep_spacing="trailing", **COSINE),
    case("default", "DDIM"),
    case("sd", "DDIM", steps_offset=1, clip_sample=False, set_alpha_to_one=False, **SD),
    case("zero-snr", "DDIM", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, **SD, **V),
    case("cosine", "DDIM", clip_sample_range=0.5, **COSINE, **X0),
    case("threshold", "DDIM", thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.8),
    case("trained", "DDIM", clip_sample=False, trained_betas=np.linspace(1e-3, 0.3, 40).tolist(), num_train_timesteps=40),
    case("linspace", "DDIM", n=0, timestep_spacing="linspace", clip_sample=False),
    case("runge-kutta", "PNDM", set_alpha_to_one=True, **SD),
    case("default", "LMSDiscrete"),
    case("karras", "LMSDiscrete", use_karras_sigmas=True, **SD),
    case("default", "HeunDiscrete"),
    case("karras", "HeunDiscrete", use_karras_sigmas=True, timestep_spacing="trailing", **V),
    case("default", "EulerDiscrete"),
    case("leading", "EulerDiscrete", timestep_spacing="leading", steps_offset=1, **SD),
    case("karras", "EulerDiscrete", use_karras_sigmas=True, timestep_spacing="leading", **SD, **V),
    case("exponential", "EulerDiscrete", use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
    case("beta", "EulerDiscrete", use_beta_sigmas=True, **SD),
    case("zero-snr", "EulerDiscrete", rescale_betas_zero_snr=True, timestep_spacing="trailing", **SD, **V),
    case(
        "continuous", "EulerDiscrete", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        **SD, **V,
    ),
    case("default", "EulerAncestralDiscrete"),
    case("trailing", "EulerAncestralDiscrete", timestep_spacing="trailing", **SD, **V),
    case("default", "DPMSolverMultistep"),
    case("karras", "DPMSolverMultistep", use_karras_sigmas=True, **SD),
    case("first", "DPMSolverMultistep", solver_order=1, timestep_spacing="trailing", **SD, **V),
    case("third", "DPMSolverMultistep", n=20, solver_order=3, **SD),
    case("heun", "DPMSolverMultistep", solver_type="heun", timestep_spacing="leading", steps_offset=1, **SD),
    case("threshold", "DPMSolverMultistep", thresholding=True, sample_max_value=1.5),
    case("cosine", "DPMSolverMultistep", lambda_min_clipped=-5.1, **COSINE),
    case("zero-snr", "DPMSolverMultistep", rescale_betas_zero_snr=True, timestep_spacing="trailing", **SD, **V),
    case("lu", "DPMSolverMultistep", use_lu_lambdas=True, **SD),
    case("flow", "DPMSolverMultistep", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    case("default", "DPMSolverSinglestep", n=0),
    case("default", "UniPCMultistep"),
    case("third", "UniPCMultistep", solver_order=3, **SD, **V),
    case("karras", "UniPCMultistep", use_karras_sigmas=True, timestep_spacing="trailing", **SD),
    case("flow", "UniPCMultistep", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    case("default", "FlowMatchEulerDiscrete"),
    case("sd3", "FlowMatchEulerDiscrete", shift=3.0),
    case("flux", "FlowMatchEulerDiscrete", tokens=1024, use_dynamic_shifting=True, shift=3.0),
    case("linear", "FlowMatchEulerDiscrete", tokens=3000, use_dynamic_shifting=True, time_shift_type="linear"),
    case("terminal", "FlowMatchEulerDiscrete", shift=2.0, shift_terminal=0.1),
    case("karras", "FlowMatchEulerDiscrete", shift=3.0, use_karras_sigmas=True),
    case("default", "EDMEuler"),
    case("v", "EDMEuler", sigma_schedule="exponential", sigma_data=1.0, sigma_min=0.01, **V),
    case("default", "EDMDPMSolverMultistep"),
    case("default", "ScoreSdeVe", n=0),
)  # fmt: skip
