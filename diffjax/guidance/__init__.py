"""Guidance: transforms `Denoiser -> Denoiser`, values whose numbers are leaves. Weight 1 is the conditional model."""

from diffjax.guidance.classifier_free import cfg
from diffjax.guidance.compose import Count, chain, count_calls, counted, lift
from diffjax.guidance.interval import in_log_snr, in_sigma, in_time, interval
from diffjax.guidance.known import known
from diffjax.guidance.threshold import clip_x0, dynamic_threshold, with_x0
from diffjax.types import Card, Prediction


def _same(prediction: Prediction) -> Prediction:
    return prediction


def _cfg(weight=2.0, **options):
    return cfg(weight, **options)


def _cfg_interval(weight=2.0, lo=0.19, hi=1.61, unit=in_sigma):
    return interval(cfg(weight), lo, hi, unit=unit)


def _lift(fn=_same):
    return lift(fn)


# evals: network evaluations for one of the conditional model; flags 'null': needs a condition and a null condition
CATALOGUE: dict[str, Card] = {
    "cfg": Card(_cfg, "arXiv:2207.12598#Eq.6", "classifier-free guidance", evals=2, flags=("null",)),
    "interval": Card(
        _cfg_interval, "arXiv:2404.07724#Sec.3", "a guide in an interval of noise levels", evals=2, flags=("null",)
    ),
    "clip_x0": Card(clip_x0, "arXiv:2205.11487#Sec.2.3", "x0 clipped to the range of the data", evals=1),
    "dynamic_threshold": Card(dynamic_threshold, "arXiv:2205.11487#Sec.2.3", "x0 clipped at its own quantile", evals=1),
    "chain": Card(chain, "", "transforms one after the other", evals=1),
    "lift": Card(_lift, "", "a function of predictions", evals=1),
    "count_calls": Card(count_calls, "", "counts the evaluations really made", evals=1),
}

__all__ = [
    "CATALOGUE", "Count", "cfg", "chain", "clip_x0", "count_calls", "counted", "dynamic_threshold", "in_log_snr",
    "in_sigma", "in_time", "interval", "known", "lift", "with_x0",
]  # fmt: skip
