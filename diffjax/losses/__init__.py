"""Losses `(key, denoiser, x0, cond, items=None) -> ([B], aux)`, never reduced, and couplings of noise and data."""

from diffjax.losses.autoencode import (
    absolute,
    adversarial_loss,
    autoencoder_loss,
    hinge,
    perceptual,
    squared,
    vanilla,
)
from diffjax.losses.balance import balance, expert_load, routers, task_prior
from diffjax.losses.checks import check_batch, check_labels
from diffjax.losses.condition import ConditionNoise, condition_noise
from diffjax.losses.coupling import exact, independent, k_nearest_noise, minibatch_assignment, sinkhorn
from diffjax.losses.denoising import (
    denoising_loss,
    error_scale,
    flow_matching,
    log_variance_of_aux,
    noise_prediction,
    score_matching,
    v_prediction,
)
from diffjax.losses.distillation import Distillation, distillation
from diffjax.losses.levels import ByNoiseLevel, by_noise_level, level_edges
from diffjax.losses.likelihood import GaussianDecoder, LevelDecoder, discrete_bound, variational_bound
from diffjax.losses.prior import PriorPreservation, prior_preservation
from diffjax.losses.routing import router_loss
from diffjax.losses.sides import SideOutputs, side_outputs
from diffjax.losses.spectral import spectral_distance, spectral_distillation
from diffjax.losses.uncertainty import Uncertainty, uncertainty
from diffjax.prediction import EdmTarget
from diffjax.times import laws
from diffjax.types import Card


def _edm(mean=-1.2, std=1.2, sigma_data=0.5, **options):
    return denoising_loss(laws.lognormal(mean, std), EdmTarget(sigma_data), **options)


CATALOGUE: dict[str, Card] = {
    "denoising": Card(denoising_loss, "arXiv:2206.00364#Eq.2", "squared error in any space, law and weighting"),
    "eps": Card(noise_prediction, "arXiv:2006.11239#Eq.14", "the simple loss on the noise"),
    "v": Card(v_prediction, "arXiv:2202.00512#Sec.4", "on alpha eps - sigma x0"),
    "flow_matching": Card(flow_matching, "arXiv:2210.02747#Eq.14", "on the velocity dx/dt"),
    "score_matching": Card(score_matching, "arXiv:2011.13456#Eq.7", "on the score, weight sigma^2"),
    "edm": Card(_edm, "arXiv:2206.00364#Eq.8", "unit weight on EDM's network target, log-normal noise"),
    "variational_bound": Card(variational_bound, "arXiv:2107.00630#Eq.17", "bits per dimension, continuous time"),
    "discrete_bound": Card(discrete_bound, "arXiv:2107.00630#Eq.13", "bits per dimension, T steps"),
}

COUPLINGS: dict[str, Card] = {
    "independent": Card(lambda: independent, "", "noise that knows nothing of the data"),
    "minibatch_assignment": Card(minibatch_assignment, "arXiv:2406.12303#Alg.1", "least transport cost in the batch"),
    "k_nearest_noise": Card(k_nearest_noise, "arXiv:2505.18521", "the nearest of k noises"),
}

# of autoencoders: what they compare, and how a discriminator is trained
AUTOENCODING: dict[str, Card] = {
    "autoencoder": Card(autoencoder_loss, "arXiv:2112.10752#AppG", "reconstruction and the term of the latent"),
    "perceptual": Card(perceptual, "arXiv:1801.03924#Eq.1", "distance of normalised features of a network"),
    "adversarial": Card(adversarial_loss, "arXiv:2012.09841#Eq.7", "patch discriminator with adaptive weight"),
}

__all__ = [
    "AUTOENCODING", "ByNoiseLevel", "CATALOGUE", "COUPLINGS", "ConditionNoise", "Distillation", "GaussianDecoder",
    "LevelDecoder", "PriorPreservation", "SideOutputs", "Uncertainty", "absolute", "adversarial_loss",
    "autoencoder_loss", "balance", "by_noise_level", "check_batch", "check_labels", "condition_noise",
    "denoising_loss", "discrete_bound", "distillation", "error_scale", "exact", "expert_load", "flow_matching",
    "hinge", "independent", "k_nearest_noise", "level_edges", "log_variance_of_aux", "minibatch_assignment",
    "noise_prediction", "perceptual", "prior_preservation", "router_loss", "routers", "score_matching",
    "side_outputs", "sinkhorn", "spectral_distance", "spectral_distillation", "squared", "task_prior", "uncertainty",
    "v_prediction", "vanilla", "variational_bound",
]  # fmt: skip
