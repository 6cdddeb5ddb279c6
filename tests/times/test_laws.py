"""Training-time laws: inside (0, 1), independent of how a batch is cut, and distributed as their density says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import processes as P
from diffjax.times import LAWS, laws

N = 1 << 15
NAMES = sorted(LAWS)
PROCESSES = {"vp": P.vp(), "rectified": P.rectified(), "edm": P.edm()}
LOGIT = np.linspace(np.log(1e-6), -np.log(1e-6), 4801)  # log(t / (1 - t)) of the bin edges of the quadrature


@pytest.fixture(params=NAMES)
def law(request):
    if request.param == "adaptive":  # the uninformed law is uniform: give it something to adapt to
        square = jnp.asarray(np.linspace(1, 4, 16) ** 2, jnp.float32)
        return laws.adaptive(laws.AdaptiveState(square, jnp.full(16, 100.0)))
    if request.param == "stratified":
        return LAWS["stratified"].build(batch=N)
    return LAWS[request.param].build()


def test_inside_and_independent_of_the_batch_layout(law, key):
    draw = jax.jit(lambda k, items: law(k, PROCESSES["rectified"], items))
    t = draw(key, jnp.arange(64))
    assert t.shape == (64,) and t.dtype == jnp.float32
    assert np.all((t >= 1e-6) & (t <= 1 - 1e-6)) and len(np.unique(t)) > 60
    np.testing.assert_array_equal(draw(jax.random.clone(key), jnp.arange(40, 48)), t[40:48])


@pytest.mark.parametrize("process", sorted(PROCESSES))
def test_histogram_follows_the_density(law, process, key):
    p = PROCESSES[process]
    t = np.asarray(jax.jit(lambda k, i: law(k, p, i))(key, jnp.arange(N)), np.float64)
    middle = 0.5 * (LOGIT[1:] + LOGIT[:-1])
    at = 1 / (1 + np.exp(-middle))
    mass = np.exp(np.asarray(law.log_density(p, jnp.asarray(at, jnp.float32)), np.float64))
    mass = mass * at * (1 - at) * np.diff(LOGIT)
    assert abs(mass.sum() - 1) < 2e-3
    # 20 bins of about equal mass; chi-square with 19 degrees of freedom exceeds 60 with probability 4e-6.
    cut = np.searchsorted(np.cumsum(mass), np.arange(1, 20) / 20)
    expected = np.array([part.sum() for part in np.split(mass, cut)])
    found = np.bincount(np.searchsorted(LOGIT[cut], np.log(t) - np.log1p(-t), side="right"), minlength=20) / N
    assert N * np.sum((found - expected) ** 2 / expected) < 60


def test_one_trace_and_gradients(law, key):
    traces = []

    @jax.jit
    def f(law, key):
        traces.append(1)
        return jnp.mean(law(key, P.rectified(), jnp.arange(64)))

    f(law, key)
    f(jax.tree.map(lambda leaf: leaf * 0.9, law), jax.random.clone(key))
    assert len(traces) == 1
    for leaf in jax.tree.leaves(jax.grad(f)(law, jax.random.clone(key))):
        assert np.all(np.isfinite(leaf))


def test_hash_by_value():
    for name in NAMES:
        a, b = (jax.tree.structure(LAWS[name].build()) for _ in range(2))
        assert a == b and hash(a) == hash(b)


@pytest.mark.parametrize("batch", [1, 8, 50])
def test_stratified_has_one_time_per_stratum(batch, key):
    law = laws.stratified(laws.uniform(), batch)
    t = np.sort(law(key, P.rectified(), jnp.arange(batch)))
    np.testing.assert_allclose(np.diff(t), 1 / batch, rtol=1e-3)
    assert t[0] < 1.001 / batch


def test_a_shard_of_a_stratified_batch_is_spread_too(key):
    law = laws.stratified(laws.uniform(), 1000)
    t = np.sort(law(key, P.rectified(), jnp.arange(300, 400)))
    # A tenth of the batch leaves no gap longer than three hundredths; independent times leave one of five or more.
    assert np.diff(t).max() < 0.03 and t[0] < 0.03 and t[-1] > 0.97


def test_stratified_keeps_the_law_it_wraps(key):
    law = laws.stratified(laws.logit_normal(0.5, 0.8), 4096)
    t = np.asarray(law(key, P.rectified(), jnp.arange(4096)), np.float64)
    z = (np.log(t / (1 - t)) - 0.5) / 0.8
    # Stratified means are far better than 1 / sqrt(4096) = 0.016.
    assert abs(z.mean()) < 2e-3 and abs(z.std() - 1) < 5e-3


def test_lognormal_moments(key):
    t = laws.lognormal(-1.2, 1.2)(key, P.edm(), jnp.arange(20000))
    l = np.log(80 * np.asarray(t, np.float64))
    assert abs(l.mean() + 1.2) < 0.04 and abs(l.std() - 1.2) < 0.03


def test_cosmap_and_mode_are_the_published_maps():
    u = np.linspace(0.01, 0.99, 21)
    law = laws.cosmap()
    found = law.place(law.params, P.rectified(), jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(found, 1 - 1 / (np.tan(np.pi * u / 2) + 1), rtol=1e-5)
    np.testing.assert_allclose(P.rectified().log_snr(np.asarray(found, np.float64)), P.cosine().log_snr(u), atol=1e-5)
    law = laws.mode(0.8)
    found = law.place(law.params, P.rectified(), jnp.asarray(1 - u, jnp.float32))
    np.testing.assert_allclose(found, 1 - u - 0.8 * (np.cos(np.pi * u / 2) ** 2 - 1 + u), rtol=1e-4, atol=1e-6)


def test_adaptive_learns_where_the_loss_is(key):
    def loss(t):
        return jnp.where(t > 0.5, 3.1, 0.1)

    state, p = laws.adaptive_init(8), P.rectified()
    before = laws.adaptive(state).log_density(p, jnp.asarray([0.1, 0.9]))
    np.testing.assert_allclose(before, 0, atol=1e-6)
    step = jax.jit(lambda state, k: laws.adaptive_update(state, *draw(laws.adaptive(state), k)))

    def draw(law, k):
        t = law(k, p, jnp.arange(128))
        return t, loss(t)

    for k in jax.random.split(key, 8):
        state = step(state, k)
    law = laws.adaptive(state, floor=0.2)
    p_low, p_high = np.exp(law.log_density(p, jnp.asarray([0.2, 0.8])))
    np.testing.assert_allclose(p_high, 2 * (0.8 * 3.1 / 3.2) + 0.2, rtol=1e-4)
    np.testing.assert_allclose(p_low, 2 * (0.8 * 0.1 / 3.2) + 0.2, rtol=1e-4)
    # Divided by the density, the expectation is the uniform one, 1.6, and its spread is smaller.
    t = law(jax.random.key(5), p, jnp.arange(4096))
    ratio = np.asarray(loss(t) / jnp.exp(law.log_density(p, t)))
    assert abs(ratio.mean() - 1.6) < 0.05 and ratio.std() < 1.0


def test_adaptive_ignores_losses_that_are_not_finite():
    state = laws.adaptive_update(
        laws.adaptive_init(2), jnp.asarray([0.1, 0.2, 0.9]), jnp.asarray([2.0, jnp.nan, jnp.inf])
    )
    np.testing.assert_allclose(state.square, [4.0, 0.0])
    np.testing.assert_allclose(state.count, [1.0, 0.0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: laws.lognormal(std=0.0), "std must be"),
        (lambda: laws.logit_normal(std=-1.0), "std must be"),
        (lambda: laws.mode(2.0), "scale must be"),
        (lambda: laws.mode(-1.5), "scale must be"),
        (lambda: laws.stratified(laws.uniform(), 0), "batch must be"),
        (lambda: laws.adaptive_init(0), "bins must be"),
        (lambda: laws.adaptive(laws.adaptive_init(4), floor=0.0), "floor must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
