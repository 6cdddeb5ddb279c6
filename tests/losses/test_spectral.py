"""Spectrum-aware distillation against Fourier sums written out, and what its weights and limits mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, processes
from diffjax.losses import spectral_distance, spectral_distillation
from diffjax.types import Evaluation

RNG = np.random.default_rng(0)
B, H, W, C = 3, 4, 6, 2
normal = lambda *s: jnp.asarray(RNG.standard_normal(s), jnp.float32)
A, Z, X0 = normal(B, H, W, C), normal(B, H, W, C), normal(B, H, W, C)
PROCESS = processes.rectified()


def fourier(y):
    """The orthonormal transform over height and width, as sums."""
    wave = lambda n: np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / np.sqrt(n)
    return np.einsum("kh,lw,bhwc->bklc", wave(y.shape[1]), wave(y.shape[2]), np.asarray(y, np.float64))


def textbook(a, b, x0, alpha, floor):
    w = np.maximum(np.abs(fourier(x0)).mean(-1, keepdims=True), floor) ** alpha
    return (w * np.abs(fourier(a - b)) ** 2).mean((1, 2, 3))


@pytest.mark.parametrize(("alpha", "floor"), [(-1.0, 1e-2), (-2.0, 0.8), (0.5, 1e-2)])
def test_the_distance_is_the_sum_over_frequencies(alpha, floor):
    np.testing.assert_allclose(spectral_distance(A, Z, X0, alpha, floor), textbook(A, Z, X0, alpha, floor), rtol=1e-4)


def test_without_weights_it_is_the_mean_square():
    np.testing.assert_allclose(spectral_distance(A, Z, X0, 0.0), np.square(A - Z).mean((1, 2, 3)), rtol=1e-5)


def test_an_error_costs_more_where_the_data_are_weak():
    x0 = np.cos(2 * np.pi * np.arange(W) / W).reshape(1, 1, W, 1) * np.ones((1, H, 1, 1))  # one frequency alone
    weak = np.cos(2 * np.pi * 2 * np.arange(W) / W).reshape(1, 1, W, 1) * np.ones((1, H, 1, 1))
    strong, weak = (float(spectral_distance(e, 0 * e, x0, -1.0, 0.01)[0]) for e in (x0, weak))
    np.testing.assert_allclose(weak / strong, np.sqrt(H * W) / 2 / 0.01, rtol=1e-3)


def pointwise(params, x, t, cond):
    return jnp.tanh(params * x)


def predict(params):
    return diffjax.denoiser(pointwise, PROCESS, diffjax.from_eps, jnp.float32(params))


def test_the_loss_is_the_denoising_loss_and_both_distances():
    base = losses.noise_prediction()
    student, teacher = predict(0.3), predict(0.9)
    got, aux = spectral_distillation(base, teacher, spatial=0.2, frequency=0.7)(jax.random.key(0), student, X0)
    plain, _ = base(jax.random.key(0), student, X0)
    k = jax.random.split(jax.random.key(0), 4)[1]
    t = aux["t"].reshape(-1, 1, 1, 1)
    x = np.asarray((1 - t) * X0 + t * losses.independent(k, X0, jnp.arange(B)))
    s, teach = np.tanh(np.float32(0.3) * x), np.tanh(np.float32(0.9) * x)
    np.testing.assert_allclose(aux["denoising"], plain, rtol=1e-6)
    np.testing.assert_allclose(aux["spatial"], np.square(s - teach).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(aux["frequency"], textbook(s, teach, X0, -1.0, 1e-2), rtol=1e-4)
    np.testing.assert_allclose(got, plain + 0.2 * aux["spatial"] + 0.7 * aux["frequency"], rtol=1e-6)


def with_features(own, inner, state, x, t, cond, key):
    e = inner.evaluate(x, t, cond, state=state, key=key)
    return e._replace(aux={"small": own * x[:, ::2, ::2, :1]})


def read_small(aux):
    return (aux["small"],)


def test_features_are_compared_at_their_own_size():
    student, teacher = (predict(0.5).wrap(with_features, own=jnp.float32(a)) for a in (1.0, 3.0))
    assert isinstance(student.evaluate(jnp.asarray(X0), jnp.float32(0.5)), Evaluation)
    loss = spectral_distillation(losses.noise_prediction(), teacher, features=read_small)
    _, aux = loss(jax.random.key(0), student, X0)
    t = aux["t"].reshape(-1, 1, 1, 1)
    x = np.asarray((1 - t) * X0 + t * losses.independent(jax.random.split(jax.random.key(0), 4)[1], X0, jnp.arange(B)))
    small = x[:, ::2, ::2, :1]
    resized = np.asarray(jax.image.resize(X0, (B, H // 2, W // 2, C), "linear"))
    np.testing.assert_allclose(aux["spatial"], 4 * np.square(small).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(aux["frequency"], textbook(3 * small, small, resized, -1.0, 1e-2), rtol=1e-4)


def test_a_student_equal_to_its_teacher_pays_nothing_and_shapes_must_fit():
    same, aux = spectral_distillation(losses.noise_prediction(), predict(0.4))(jax.random.key(0), predict(0.4), X0)
    np.testing.assert_array_equal(same, aux["denoising"])
    student, teacher = (predict(0.5).wrap(f, own=jnp.float32(1.0)) for f in (with_features, with_large))
    loss = spectral_distillation(losses.noise_prediction(), teacher, features=read_small)
    with pytest.raises(ValueError, match=r"equal shapes \[B, H, W, c\]; got \(3, 2, 3, 1\) and \(3, 4, 6, 2\)"):
        loss(jax.random.key(0), student, X0)


def test_networks_of_other_precision_are_compared_in_float32():
    """Features of a bfloat16 student beside those of a float32 teacher, in both losses."""
    student, teacher = (predict(0.5).wrap(f, own=jnp.float32(2.0)) for f in (with_half, with_features))
    base = losses.noise_prediction()
    loss = spectral_distillation(base, teacher, features=read_small)
    value, aux = loss(jax.random.key(0), student, X0)
    assert value.dtype == jnp.float32 and 0 < aux["spatial"].max() < 1e-4 and 0 < aux["frequency"].max() < 1e-2
    features = losses.distillation(teacher, label_drop=0.0)(jax.random.key(0), student, X0)[1]["features"]
    assert features.dtype == jnp.float32 and 0 < features.max() < 1e-4


def with_half(own, inner, state, x, t, cond, key):
    return inner.evaluate(x, t, cond, state=state, key=key)._replace(
        aux={"small": (own * x[:, ::2, ::2, :1]).astype(jnp.bfloat16)}
    )


def with_large(own, inner, state, x, t, cond, key):
    return inner.evaluate(x, t, cond, state=state, key=key)._replace(aux={"small": own * x})
