"""The process whose mean is moved by an image, as published, against the plain process seen by a moved network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, networks, processes, solvers, times
from diffjax import numerics as nu
from diffjax.types import Noise

T = 10
BETAS = np.linspace(0.02, 0.4, T)
PROCESS = processes.from_betas(BETAS)
ABAR = np.cumprod(1 - BETAS)
TIMES = np.arange(1, T + 1) / T


def chain(x0, image, noise):
    """x_1 .. x_T of q(x_t | x_{t-1}) = N(a x_{t-1} + (1 - a) image, b I), a = sqrt(1 - b); x_1 from a x0 + image."""
    a = np.sqrt(1 - BETAS)
    states = [a[0] * x0 + image + np.sqrt(BETAS[0]) * noise[0]]
    for k in range(1, T):
        states.append(a[k] * states[-1] + (1 - a[k]) * image + np.sqrt(BETAS[k]) * noise[k])
    return np.stack(states)


def test_marginals_of_the_moved_chain_are_those_of_the_plain_process_moved():
    """The chain is linear in x0, image and noises: its response to each of them is its exact marginal."""
    response = chain(1.0, 0.0, np.zeros(T)), chain(0.0, 1.0, np.zeros(T))
    variance = sum(np.square(chain(0.0, 0.0, np.eye(T)[:, [k]])[:, 0]) for k in range(T))
    np.testing.assert_allclose(response[0], PROCESS.alpha(TIMES), rtol=1e-6)
    np.testing.assert_allclose(response[1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(variance), PROCESS.sigma(TIMES), rtol=1e-6)


def test_a_simulation_has_these_marginals_and_posteriors():
    n, x0, image = 400_000, 0.7, -1.3
    states = chain(x0, image, np.random.default_rng(0).standard_normal((T, n)))
    alpha, sigma = PROCESS.alpha(TIMES), PROCESS.sigma(TIMES)
    error = 4 * sigma / np.sqrt(n)  # of a mean; of a deviation it is smaller
    assert (np.abs(states.mean(1) - (alpha * x0 + image)) < error).all()
    assert (np.abs(states.std(1) - sigma) < error).all()
    for k in (1, 4, T - 1):
        y_s, y_t = states[k - 1] - image, states[k] - image
        c_t, c_0, variance = PROCESS.posterior(TIMES[k - 1], TIMES[k])
        slope = np.cov(y_s, y_t)[0, 1] / y_t.var()
        rest = y_s - (c_t * y_t + c_0 * x0)
        error = 4 * np.sqrt(variance / n)
        assert abs(slope - c_t) < error / y_t.std() and abs(rest.mean()) < error
        assert abs(rest.std() - np.sqrt(variance)) < error


class Net:
    """A network that is not linear, of the state alone or of the image too."""

    def __init__(self, keep):
        self.keep = keep

    def __call__(self, params, x, t, cond=None, key=None):
        xp = np if isinstance(x, np.ndarray) else jnp
        more = 0.3 * cond["image"] if self.keep else 0.0
        assert self.keep or cond is None
        return xp.tanh(params * x + t.reshape(-1, 1, 1, 1) + more)


X0, IMAGE = np.random.default_rng(1).standard_normal((2, 5, 3, 3, 1)).astype(np.float32)
COND = {"image": IMAGE}


def model(keep):
    return diffjax.denoiser(
        networks.offset_by_image(Net(keep), keep=keep), PROCESS, diffjax.from_eps, jnp.float32(0.8), null=None
    )


@pytest.mark.parametrize("keep", [False, True])
def test_samples_are_those_of_the_published_loop(keep):
    """Ancestral sampling in the frame of x: x_T ~ N(image, I), the published mean, the image taken off at the end."""
    net, key, grid = Net(keep), jax.random.key(3), times.uniform(T)
    start = PROCESS.prior(jax.random.key(4), X0.shape)
    got = jax.jit(diffjax.sample)(key, model(keep).bind(COND), solvers.ddpm(PROCESS, grid), start)
    keys = nu.item_keys(key, jnp.arange(len(X0)))
    x, a = np.asarray(start, np.float64) + IMAGE, 1 - BETAS
    for i, k in enumerate(reversed(range(T))):
        before = ABAR[k - 1] if k else 1.0
        eps = net(0.8, x, np.full(len(x), TIMES[k]), COND if keep else None)
        x0 = (x - IMAGE - np.sqrt(1 - ABAR[k]) * eps) / np.sqrt(ABAR[k])
        c_0 = BETAS[k] * np.sqrt(before) / (1 - ABAR[k])
        c_t = np.sqrt(a[k]) * (1 - before) / (1 - ABAR[k])
        std = np.sqrt(BETAS[k] * (1 - before) / (1 - ABAR[k]))
        x = c_0 * x0 + c_t * x + (1 - c_t) * IMAGE + std * np.asarray(Noise.at(keys, jnp.asarray(i)).draw(start, 1))
    np.testing.assert_allclose(got, x - IMAGE, atol=1e-4)


def test_the_loss_is_that_on_the_moved_state():
    key = jax.random.key(0)
    seen = {}

    def spy(params, x, t, cond, key=None):
        seen.update(x=x, t=t)
        return jnp.zeros_like(x)

    plain, moved = (
        diffjax.denoiser(f, PROCESS, diffjax.from_eps, 1.0, null=None) for f in (spy, networks.offset_by_image(spy))
    )
    loss = losses.noise_prediction(label_drop=0.0)
    a = loss(key, plain, jnp.asarray(X0), None)[0]
    before = dict(seen)
    b = loss(jax.random.clone(key), moved, jnp.asarray(X0), {"image": jnp.asarray(IMAGE)})[0]
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(seen["x"], before["x"] + IMAGE, atol=1e-6)


def test_it_is_a_network_like_any_other():
    net = networks.from_linen(networks.UNet(widths=(4,), attention=(), code=4, num_classes=3))
    f = networks.offset_by_image(net)
    assert f == networks.offset_by_image(net) and hash(f) == hash(networks.offset_by_image(net))
    assert f != networks.offset_by_image(net, keep=True)
    shapes = jax.eval_shape(
        lambda: net.module.init(jax.random.key(0), X0[:1], np.zeros(1, np.float32), np.zeros(1, np.int32))
    )
    cond = {"image": IMAGE, "label": np.zeros(5, np.int32)}
    y = jax.eval_shape(f, shapes["params"], X0, np.zeros(5, np.float32), cond)
    assert y.shape == X0.shape
    with pytest.raises(ValueError, match="needs the condition {'image'.*got \\['label'\\]"):
        f(None, X0, 0.5, {"label": cond["label"]})
    with pytest.raises(ValueError, match="got an image \\(5, 3, 3\\) and a state \\(5, 3, 3, 1\\)"):
        f(None, X0, 0.5, {"image": IMAGE[..., 0]})
