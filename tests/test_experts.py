"""Mixtures of experts against the exact denoiser of the whole, what is evaluated, and experts of ranges of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import experts, guidance, processes, solvers, testing, times
from diffjax.experts import by_time, mixture, router, stack
from diffjax.guidance import Count, count_calls
from diffjax.numerics import item_keys
from diffjax.prediction import to_score, to_v, to_velocity

PROCESS = processes.cosine()
B, K = 6, 4
RNG = np.random.default_rng(0)
# seven components in four clusters of unequal weight
MIXTURE = testing.mixture(
    RNG.uniform(0.5, 2, 7), RNG.normal(size=(7, 3)) * 2, stds=RNG.uniform(0.3, 1, (7, 3)), labels=[0, 1, 1, 2, 3, 3, 0]
)


def states(t, n=B, process=PROCESS):
    x0, _ = testing.draw(jax.random.key(1), MIXTURE, n)
    return process.add_noise(x0, jax.random.normal(jax.random.key(2), x0.shape), t)


def exact(process, **options):
    whole = testing.oracle(MIXTURE, process)
    return mixture([whole.bind(k) for k in range(K)], testing.exact_router(MIXTURE, process), **options)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp"])
@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_exact_experts_and_router_are_the_exact_model(name, wide):
    process = getattr(processes, name)()
    with jax.enable_x64(wide):
        run = jax.jit(lambda x, t: (exact(process)(x, t), testing.oracle(MIXTURE, process)(x, t)))
        for t in (0.05, 0.4, 0.8, 1.0):
            got, whole = run(states(t, process=process), t)
            for reader in (to_v, to_score, *([to_velocity] if name == "rectified" else [])):
                a, b = reader(got, process, t), reader(whole, process, t)
                assert np.abs(a - b).max() <= (1e-12 if wide else 1e-6) * max(1, np.abs(b).max())


def linear(p, x, t, cond):
    return x * p["w"] + p["b"][None] * t[:, None]


def logits(p, x, t, cond):
    return x @ p + t[:, None]


def learned(**options):
    """The same mixture from a sequence and from stacked leaves."""
    params = [{"w": jnp.float32(k + 1), "b": jnp.full((3,), float(k))} for k in range(K)]
    each = [diffjax.denoiser(linear, PROCESS, diffjax.from_v, p) for p in params]
    r = router(logits, PROCESS, jnp.asarray(np.random.default_rng(1).normal(size=(3, K)), jnp.float32))
    return each, r, [mixture(e, r, **options) for e in (each, stack(each))]


@pytest.mark.parametrize("top", [None, 4, 2, 1])
def test_top_k_is_the_textbook_sum(top):
    each, r, both = learned(top=top)
    x, t = states(0.4), jnp.linspace(0.2, 0.9, B)
    score = np.asarray(r(x, t), np.float64)
    x0 = np.stack([np.asarray(e(x, t).x0, np.float64) for e in each], 1)
    expected = np.zeros((B, 3))
    for b in range(B):
        chosen = np.argsort(-score[b])[: top or K]
        p = np.exp(score[b, chosen] - score[b].max())
        expected[b] = (p / p.sum()) @ x0[b, chosen]
    for d in both:
        e = jax.jit(lambda d: d.evaluate(x, t))(d)
        np.testing.assert_allclose(e.prediction.x0, expected, rtol=2e-5, atol=1e-5)
        a, s = PROCESS.alpha(t)[:, None], PROCESS.sigma(t)[:, None]
        np.testing.assert_allclose(a * e.prediction.x0 + s * e.prediction.eps, x, atol=1e-5)
        assert ((e.aux > 0).sum(1) == (top or K)).all()
        np.testing.assert_allclose(e.aux.sum(1), 1, rtol=1e-6)


def test_experts_of_any_parameterisation_add_up():
    whole = testing.oracle(MIXTURE, PROCESS)
    part = lambda k, reader: lambda x, t: reader(whole(x, t, k), PROCESS, t)
    mixed = mixture(
        [
            diffjax.denoiser(part(0, to_v), PROCESS, diffjax.from_v),
            diffjax.denoiser(part(1, to_score), PROCESS, diffjax.from_score),
            diffjax.denoiser(part(2, lambda p, *_: p.x0), PROCESS, diffjax.from_x0),
            whole.bind(3),
        ],
        testing.exact_router(MIXTURE, PROCESS),
    )
    got, expected = jax.jit(lambda x: (mixed(x, 0.4), whole(x, 0.4)))(states(0.4))
    np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.eps, expected.eps, rtol=1e-5, atol=1e-5)


def calls(state):
    counts = [c for c in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, Count)) if isinstance(c, Count)]
    return sum(np.asarray(c.calls).sum() for c in counts), sum(np.asarray(c.items).sum() for c in counts)


@pytest.mark.parametrize("form", ["sequence", "stacked"])
def test_what_is_evaluated(form):
    each, r, _ = learned()
    wrap = lambda e: count_calls()(stack(e)) if form == "stacked" else [count_calls()(d) for d in e]
    x = states(0.4)
    seen = jax.jit(lambda d, x: (lambda e: (e.state, e.aux))(d.evaluate(x, 0.4)))
    assert calls(seen(mixture(wrap(each), r), x)[0]) == (K, K * B)
    assert calls(seen(mixture(wrap(each), r, top=2), x[:1])[0]) == (2, 2)
    state, weights = seen(mixture(wrap(each), r, top=1), x)
    wanted = len(set(np.argmax(weights, 1).tolist()))
    assert 1 < wanted < K and calls(state) == (wanted, wanted * B)


def test_stacked_experts_are_traced_once():
    traces = []

    def net(w, x, t, cond):
        traces.append(1)
        return w * x

    each = [diffjax.denoiser(net, PROCESS, diffjax.from_v, jnp.float32(k)) for k in range(K)]
    r = learned()[1]
    for top in (None, 2):
        traces.clear()
        jax.jit(lambda d: d(states(0.4), 0.4))(mixture(stack(each), r, top=top))
        stacked = len(traces)
        traces.clear()
        jax.jit(lambda d: d(states(0.4), 0.4))(mixture(each, r, top=top))
        assert stacked < len(traces) and stacked <= 2


def test_drawn_experts_follow_the_posterior_and_the_item_alone():
    each, r, _ = learned()
    n = 4000
    x = jnp.broadcast_to(states(0.4)[:1], (n, 3))
    keys = item_keys(jax.random.key(7), jnp.arange(n))
    e = jax.jit(lambda keys, x: mixture(stack(each), r, keys=keys).evaluate(x, 0.4))(keys, x)
    p = jax.nn.softmax(r(x[:1], 0.4))[0]
    assert set(np.unique(e.aux).tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(e.aux.mean(0), p, atol=4 * np.sqrt(0.25 / n))  # four standard errors
    part = mixture(stack(each), r, keys=item_keys(jax.random.key(7), jnp.arange(10, 14))).evaluate(x[10:14], 0.4)
    np.testing.assert_array_equal(part.aux, e.aux[10:14])
    again = mixture(stack(each), r, keys=keys).evaluate(x, 0.4, state=e.state)  # the next evaluation draws anew
    assert not np.array_equal(again.aux, e.aux) and again.state[0] == 2


@pytest.mark.parametrize("options", [{}, {"top": 1}], ids=["full", "top1"])
def test_sampling_the_mixture_is_sampling_the_whole(options):
    far = testing.mixture([1, 2], [[-6.0, 0.0], [6.0, 0.0]], stds=[0.7, 0.4])
    whole = testing.oracle(far, PROCESS)
    d = mixture([whole.bind(k) for k in range(2)], testing.exact_router(far, PROCESS), **options)
    solver = solvers.ddim(PROCESS, times.uniform(20, start=0.5))
    x, _ = testing.draw(jax.random.key(0), far, 32, PROCESS, 0.5)
    run = jax.jit(lambda d: diffjax.sample(jax.random.key(0), d, solver, x))
    np.testing.assert_allclose(run(d), run(whole), atol=2e-5)  # from t = 0.5 the clusters are well apart


def test_guidance_wraps_a_mixture():
    whole = testing.oracle(MIXTURE, PROCESS)
    one = testing.mixture([1.0], [[0.0, 0.0, 0.0]], stds=[1.0], labels=[0])
    d = guidance.cfg(2.0, null=testing.ALL)(mixture([whole], testing.exact_router(one, PROCESS)))
    x, label = states(0.4), jnp.arange(B) % K
    plain = guidance.cfg(2.0)(whole)
    np.testing.assert_allclose(d(x, 0.4, label).x0, plain(x, 0.4, label).x0, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- ranges of time


@pytest.mark.parametrize("form", ["sequence", "stacked"])
def test_each_time_has_its_expert_and_one_is_evaluated(form):
    each, _, _ = learned()
    wrap = (lambda e: count_calls()(stack(e))) if form == "stacked" else (lambda e: [count_calls()(d) for d in e])
    d, x = by_time(wrap(each), [0.25, 0.5, 0.75]), states(0.4)
    run = jax.jit(lambda d, t: d.evaluate(x, t))
    for t, k in ((0.1, 0), (0.25, 0), (0.26, 1), (0.74, 2), (1.0, 3)):
        e = run(d, t)
        np.testing.assert_array_equal(e.prediction.x0, jax.jit(lambda e, t: e(x, t))(each[k], t).x0)
        assert calls(e.state) == (1, B)
    t = jnp.asarray([0.1, 0.3, 0.3, 0.2, 0.5, 0.45])
    e = run(d, t)
    assert calls(e.state) == (2, 2 * B)  # times of two ranges
    low, high = each[0](x, t).x0, each[1](x, t).x0
    np.testing.assert_allclose(e.prediction.x0, jnp.where(t[:, None] > 0.25, high, low), rtol=1e-6)
    solver = solvers.heun(PROCESS, np.linspace(1, 0.01, 9))
    _, state = jax.jit(lambda d: diffjax.sample(jax.random.key(0), d, solver, x, return_state=True))(d)
    assert calls(state) == (solver.evaluations, solver.evaluations * B)


def test_a_range_that_is_not_finite_does_not_leak():
    bad = diffjax.denoiser(lambda x, t: x / jnp.where(t > 0.5, 0.0, 1.0)[:, None], PROCESS, diffjax.from_x0)
    fine = diffjax.denoiser(lambda x, t: x, PROCESS, diffjax.from_x0)
    assert np.isfinite(by_time([bad, fine], [0.5])(jnp.ones((2, 3)), jnp.asarray([0.2, 0.8])).x0).all()


# -------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments():
    each, r, _ = learned()
    other = diffjax.denoiser(linear, processes.vp(), diffjax.from_v, each[0].leaves)
    cases = [
        (lambda: mixture([], r), "at least one expert"),
        (lambda: mixture(each, r, top=5), "top must be an int in 1..4"),
        (lambda: mixture(each, r, top=1, keys=jax.random.split(jax.random.key(0), B)), "either top"),
        (lambda: mixture([each[0], other], r), "must share one process; expert 1"),
        (lambda: mixture(each[0], r), "needs a leading axis of experts"),
        (lambda: stack([each[0], other]), "denoisers of one architecture"),
        (lambda: stack([each[0].bind(0)]), "without a bound condition"),
        (lambda: mixture(each[:2], r)(states(0.4), 0.4), r"must return logits \[B, K\] = \(6, 2\); got \(6, 4\)"),
        (lambda: mixture(each, r, keys=jax.random.split(jax.random.key(0), 2))(states(0.4), 0.4), "one key per item"),
        (lambda: by_time(each, [0.5]), "4 experts of ranges of time need 3 boundaries"),
        (lambda: by_time(each, [0.5, 0.2, 0.7]), "boundaries must increase"),
        (lambda: by_time(each[:2], [0.5])(states(0.4), jnp.ones((B, 3))), "one time per item"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()


def test_the_module_is_public():
    assert diffjax.experts is experts
