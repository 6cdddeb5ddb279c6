"""Every grid on every process, and each grid against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import processes as P
from diffjax import times
from diffjax.times import GRIDS

CONTINUOUS = sorted(set(GRIDS) - {"discrete"})
SPACED = ["log_snr", "karras", "curvature"]


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("process", sorted(P.CATALOGUE))
def test_decreases_from_start_to_stop_exactly(name, process):
    p = P.CATALOGUE[process].build()
    for start, stop in [(1.0, 0.0), (0.9, 0.1), (1.0, 1e-3), (0.003, 0.0), (1.0, 0.995)]:
        for n in (1, 2, 3, 17):
            t = GRIDS[name].build(p, n, start=start, stop=stop)
            assert isinstance(t, np.ndarray) and t.dtype == np.float64 and t.shape == (n + 1,)
            assert t[0] == start and t[-1] == stop
            assert np.all(np.diff(t) < 0), (start, stop, n, t)


@pytest.mark.parametrize(
    ("name", "process"),
    [(name, "vp") for name in SPACED] + [("log_snr", name) for name in ("zero_vp", "ve", "learned", "from_betas")],
)
def test_is_differentiable_in_the_process(name, process, x64):
    p = P.CATALOGUE[process].build()
    leaves, tree = jax.tree.flatten(p)
    direction = [np.ones(np.shape(leaf)) for leaf in leaves]

    def f(h):
        moved = jax.tree.unflatten(tree, [leaf + h * d for leaf, d in zip(leaves, direction, strict=True)])
        return GRIDS[name].build(moved, 5)

    if process == "from_betas":  # its leaves are tied to each other: only that the path exists and is finite
        assert np.all(np.isfinite(jax.jit(jax.jacfwd(f))(jnp.asarray(0.0))))
        return
    h = 1e-6
    np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(jnp.asarray(0.0)), (f(h) - f(-h)) / (2 * h), rtol=2e-4, atol=1e-8)


def test_traced_processes_share_one_trace():
    traces = []

    @jax.jit
    def f(p):
        traces.append(1)
        return times.karras(p, 6)

    a, b = f(P.vp(0.1, 20.0)), f(P.vp(0.1, 10.0))
    assert len(traces) == 1
    np.testing.assert_allclose(a, times.karras(P.vp(0.1, 20.0), 6), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(b, times.karras(P.vp(0.1, 10.0), 6), rtol=1e-4, atol=1e-7)


def test_karras_is_the_published_grid():
    n, rho, low, high = 18, 7.0, 0.002, 80.0
    i = np.arange(n)
    sigma = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(80 * times.karras(P.edm(), n), np.append(sigma, 0), rtol=1e-9)


@pytest.mark.parametrize("process", ["vp", "cosine", "zero_betas"])
def test_log_snr_is_equally_spaced(process):
    p = P.CATALOGUE[process].build()
    t = times.log_snr(p, 12, start=0.8, stop=0.01)
    np.testing.assert_allclose(np.diff(p.log_snr(t)), (p.log_snr(0.01) - p.log_snr(0.8)) / 12, rtol=1e-8)
    whole = times.log_snr(p, 12)
    inner = whole[np.isfinite(p.log_snr(whole))]
    np.testing.assert_allclose([inner[-1], max(inner[0], p.ends()[1])], np.array(p.ends(), float), rtol=1e-9)


@pytest.mark.parametrize("data_std", [0.5, 1.0, 3.0])
def test_curvature_has_equal_masses(data_std):
    p = P.ve(0.01, 150.0)
    t = times.curvature(p, 9, data_std)
    m, th = np.linspace(-4, 4.6, 8), [-0.1, 0, 0.4, 0.7, 0.4, 0.1, -0.5, -0.9]
    masses = []
    for high, low in zip(-p.log_snr(t[:-1]), -p.log_snr(t[1:]), strict=True):
        l = np.clip(np.linspace(low, high, 4001) - np.log(data_std), -4, 4.6)
        rho = np.exp(sum(h * np.exp(-((l - c) ** 2) / (2 * 1.1**2)) for h, c in zip(th, m, strict=True)))
        masses.append(np.trapezoid(rho, np.linspace(low, high, 4001)))
    np.testing.assert_allclose(masses, np.mean(masses), rtol=1e-4)


def test_closed_forms():
    x = np.arange(6) / 5
    np.testing.assert_allclose(times.uniform(5, 0.9, 0.1), 0.9 - 0.8 * x, rtol=1e-12)
    np.testing.assert_allclose(times.quadratic(5), (1 - x) ** 2, atol=1e-15)
    np.testing.assert_allclose(times.power(5, 2.0), times.quadratic(5), atol=1e-15)
    np.testing.assert_allclose(times.power(5, 1.0, 0.9, 0.1), times.uniform(5, 0.9, 0.1), rtol=1e-12)
    np.testing.assert_allclose(times.cosine(5), np.cos(np.pi * x / 2) ** 2, atol=1e-15)


def test_two_nested_karras_grids_are_the_published_five_steps():
    """Karras (rho 5, 8 levels) on the sigmas of a discrete schedule says where to stop; rho = 1.2 in steps goes there."""
    p = P.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    stop = times.karras(p, 7, rho=5.0, stop=1e-3)[6]
    t = 1e-3 + times.power(5, 1.2, start=0.999, stop=stop - 1e-3)  # a step k is the time (k + 1) / 1000
    np.testing.assert_allclose(1000 * t - 1, [999, 772.5, 556.7, 354.2, 170.0, 18.3], atol=0.06)
    np.testing.assert_allclose(np.exp(-p.log_snr(t)), [14.61, 4.52, 1.96, 1.00, 0.50, 0.13], atol=0.006)


def test_discrete_steps_of_the_field():
    betas = P.from_betas(np.linspace(1e-4, 0.02, 1000))

    def steps(spacing, n):
        t = times.discrete(betas, n, spacing)
        assert t[-1] == 0
        return P.step_of_time(betas, t[:-1]).round(9).tolist()

    assert steps("leading", 5) == [800, 600, 400, 200, 0]
    assert steps("linspace", 5) == [999, 749, 500, 250, 0]
    assert steps("trailing", 5) == [999, 799, 599, 399, 199]
    assert steps("trailing", 3) == [999, 666, 332]
    assert steps("leading", 1000) == steps("trailing", 1000) == list(range(999, -1, -1))
    np.testing.assert_array_equal(times.discrete(1000, 7, "linspace"), times.discrete(betas, 7, "linspace"))
    part = times.discrete(1000, 2, "trailing", start=0.5, stop=0.1)
    np.testing.assert_allclose(part, [0.5, 0.3, 0.1])


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 7, 33, 100])
def test_discrete_decreases(spacing, n):
    t = times.discrete(100, n, spacing)
    assert t.shape == (n + 1,) and np.all(np.diff(t) < 0) and t[-1] == 0
    assert np.allclose(t * 100, np.round(t * 100))
    if spacing != "leading":
        assert t[0] == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: times.uniform(0), "n, the number of steps"),
        (lambda: times.uniform(2.0), "n, the number of steps"),
        (lambda: times.uniform(True), "n, the number of steps"),
        (lambda: times.uniform(3, 0.2, 0.5), "0 <= stop < start <= 1"),
        (lambda: times.log_snr(P.vp(), 3, start=1.5), "0 <= stop < start <= 1"),
        (lambda: times.karras(P.vp(), 3, rho=0.0), "rho must be > 0"),
        (lambda: times.karras(P.vp(), 3, stop=float("nan")), "0 <= stop < start <= 1"),
        (lambda: times.power(3, rho=0.0), "rho must be a finite number > 0"),
        (lambda: times.power(3, rho=np.inf), "rho must be a finite number > 0"),
        (lambda: times.curvature(P.vp(), 3, data_std=-1.0), "data_std must be"),
        (lambda: times.discrete(10, 11), "at most the number of integer steps"),
        (lambda: times.discrete(10, 3, "even"), "spacing must be"),
        (lambda: times.discrete(P.vp(), 3), "integer steps"),
        (lambda: times.discrete(10, 3, start=0.55), "multiples of 1/10"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
