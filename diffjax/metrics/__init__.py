"""Scores of sample sets: streaming, mergeable metrics over feature extractors, each beside its floor on real data."""

from diffjax.metrics.classifier import Classifier, classifier, load_classifier
from diffjax.metrics.classify import accuracy, c2st
from diffjax.metrics.features import FeatureExtractor, check_samples, pixels, random_convolution, user
from diffjax.metrics.gaussian import frechet, frechet_distance
from diffjax.metrics.kernels import energy, kid, median_distance, mmd, mmd_to
from diffjax.metrics.memory import memorisation
from diffjax.metrics.neighbours import density_coverage, precision_recall
from diffjax.metrics.scores import average, distribution_scores, table
from diffjax.metrics.streaming import Moments, evaluate, merge_all, merge_moments, moments_of, score
from diffjax.metrics.transport import exact_w2, sliced_wasserstein
from diffjax.metrics.usage import code_usage
from diffjax.metrics.weights import weights_file
from diffjax.types import Card

CATALOGUE: dict[str, Card] = {
    "frechet": Card(frechet, "arXiv:1706.08500#Eq.6", "Frechet distance of Gaussians fitted to features"),
    "kid": Card(kid, "arXiv:1801.01401#Sec.4", "unbiased polynomial-kernel distance", flags=("set", "unbiased")),
    "precision_recall": Card(precision_recall, "arXiv:1904.06991#Eq.2", "k-NN precision and recall", flags=("set",)),
    "density_coverage": Card(density_coverage, "arXiv:2002.09797#Sec.3", "k-NN density and coverage", flags=("set",)),
    "sliced_wasserstein": Card(sliced_wasserstein, "arXiv:1804.01947", "sliced 2-Wasserstein", flags=("set",)),
    "mmd": Card(mmd, "gretton2012#Eq.3", "unbiased Gaussian-kernel MMD^2", flags=("set", "unbiased")),
    "energy": Card(energy, "szekely2013", "unbiased energy distance", flags=("set", "unbiased")),
    "exact_w2": Card(exact_w2, "villani2003", "exact 2-Wasserstein distance, <= 2000 items", flags=("set",)),
    "c2st": Card(c2st, "arXiv:1610.06545#Eq.2", "classifier two-sample test", flags=("set",)),
    "memorisation": Card(memorisation, "arXiv:2004.05675", "closeness to training data", flags=("set", "train")),
    "accuracy": Card(accuracy, "", "share of labels a classifier reads off the samples", flags=("labels",)),
}

__all__ = [
    "CATALOGUE",
    "Classifier",
    "FeatureExtractor",
    "Moments",
    "accuracy",
    "average",
    "c2st",
    "check_samples",
    "classifier",
    "code_usage",
    "density_coverage",
    "distribution_scores",
    "energy",
    "evaluate",
    "exact_w2",
    "frechet",
    "frechet_distance",
    "kid",
    "load_classifier",
    "median_distance",
    "memorisation",
    "merge_all",
    "merge_moments",
    "mmd",
    "mmd_to",
    "moments_of",
    "pixels",
    "precision_recall",
    "random_convolution",
    "score",
    "sliced_wasserstein",
    "table",
    "user",
    "weights_file",
]
