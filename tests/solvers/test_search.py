"""Scores against one-by-one sampling; searches against enumeration of small spaces."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import metrics, processes, solvers, times
from diffjax.solvers import encodings, search
from diffjax.testing import oracle, smooth_mixture

PROCESS = processes.cosine()


def energy(x):
    return jnp.mean(x**2)


@pytest.fixture(scope="module")
def tables():
    grids = [times.log_snr(PROCESS, n, start=0.95, stop=0.05) for n in (2, 3, 5, 4, 3)]
    builds = [solvers.ddim, solvers.dpmpp, solvers.exp_ab, solvers.unified, lambda p, g: solvers.ddim(p, g, 1.0)]
    return [f(PROCESS, g) for f, g in zip(builds, grids, strict=True)]


def test_scores_are_those_of_sampling_one_by_one(tables):
    d, x = oracle(smooth_mixture(), PROCESS), jax.random.normal(jax.random.key(0), (8, 2))
    key = jax.random.key(3)
    go = jax.jit(diffjax.sample)
    want = [float(energy(go(key, d, solvers.pad(s, 8, 5, 4, 2), x))) for s in tables]
    np.testing.assert_allclose(solvers.score_tables(tables, d, x, energy, key=key, chunk=2), want, rtol=1e-5)
    host = solvers.score_tables(tables, d, x, lambda x: float(np.mean(x**2)), key=key, chunk=3, compiled=False)
    np.testing.assert_allclose(host, want, rtol=1e-5)
    assert host.dtype == np.float64


def test_a_search_compiles_once_and_shares_what_denoisers_share(tables):
    traces = []

    def net(params, x, t, cond):
        traces.append(jax.tree.map(jnp.shape, params))
        return params["w"][None] * x * params["gate"]

    params = {"w": jnp.full((2,), 0.3), "gate": 1.0}
    plain = diffjax.denoiser(net, PROCESS, diffjax.from_v, params)
    gated = lambda g: dataclasses.replace(
        plain, leaves=jax.tree.map(lambda a: np.float32(g) if np.ndim(a) == 0 else a, plain.leaves)
    )
    x = jnp.ones((4, 2))
    gates = [0.0, 0.5, 1.0, 1.5, 2.0]
    got = solvers.score_tables(tables, [gated(g) for g in gates], x, energy, chunk=2)
    assert len(traces) == 1 and traces[0] == {"w": (2,), "gate": ()}
    solvers.score_tables(tables[::-1], [gated(g) for g in gates], x, energy, chunk=2)
    assert len(traces) == 1
    want = [energy(diffjax.sample(jax.random.key(0), gated(g), s, x)) for g, s in zip(gates, tables, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_compiled_mmd_is_the_metric():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 2)).astype(np.float32), 0.5 + rng.normal(size=(40, 2)).astype(np.float32)
    for h in (None, 0.4):
        want = metrics.score(metrics.mmd(a, bandwidth=h), b)
        np.testing.assert_allclose(jax.jit(metrics.mmd_to(a, h))(b), want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.mmd_to(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="must be positive; got 0"):
        metrics.mmd_to(np.arange(4.0)[:, None], bandwidth=0.0)


def test_bad_scores(tables):
    d, x = oracle(smooth_mixture(), PROCESS), jnp.ones((2, 2))
    with pytest.raises(ValueError, match="at least one solver"):
        solvers.score_tables([], d, x, energy)
    own = dataclasses.replace(tables[0], step=lambda *a: a)
    with pytest.raises(ValueError, match="linear tables"):
        solvers.score_tables([own], d, x, energy)
    with pytest.raises(ValueError, match="give one denoiser, or 5 of one structure; got 2 of 1"):
        solvers.score_tables(tables, [d, d], x, energy)
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        solvers.score_tables(tables, d, x, energy, chunk=0)


ENCODINGS = {
    "subsets": (encodings.subsets(9, 4), lambda c: c.shape == (4,) and np.all(np.diff(c) > 0) and 0 <= c[0] and c[-1] < 9),
    "masks": (encodings.masks((3, 4), 5), lambda c: c.shape == (3, 4) and c.dtype == bool and c.sum() == 5),
    "all": (encodings.masks((2, 2), 4), lambda c: c.all()),
    "choices": (encodings.choices([1, 5, 2]), lambda c: np.all((c >= 0) & (c < [1, 5, 2]))),
    "joint": (
        encodings.joint(encodings.subsets(5, 4), encodings.masks((2,), 1)), lambda c: c[0].shape == (4,) and c[1].sum() == 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_candidates_stay_in_their_space(name):
    encoding, inside = ENCODINGS[name]
    rng = np.random.default_rng(0)
    a, b, changed = encoding.draw(rng), encoding.draw(rng), 0
    for _ in range(100):
        c = encoding.mutate(rng, a)
        changed += search._identity(c) != search._identity(a)
        a, b = c, encoding.cross(rng, a, b)
        assert inside(a) and inside(b)
    assert changed > 20 or name == "all"


def test_crossover_takes_from_both_parents():
    rng = np.random.default_rng(0)
    a, b = np.array([0, 1, 2]), np.array([6, 7, 8])
    assert all(set(encodings.subsets(9, 3).cross(rng, a, b)) <= {0, 1, 2, 6, 7, 8} for _ in range(20))
    both = np.array([True, True, False, False, False])
    other = np.array([True, False, True, False, False])
    assert all(encodings.masks((5,), 2).cross(rng, both, other)[0] for _ in range(20))


def hard(candidates):
    """Distance to a secret subset, with a fee for neighbours: the minimum is not separable."""
    secret = np.array([0, 2, 7, 11])
    return [np.abs(c - secret).sum() + 2 * (np.diff(c) == 1).sum() for c in candidates]


SPACE = encodings.subsets(12, 4)
BEST = min(hard([np.array(c) for c in itertools.combinations(range(12), 4)]))


def test_evolution_finds_the_optimum_with_far_fewer_evaluations_than_enumeration():
    evaluated, seen = [], []

    def score(cs):
        evaluated.extend(search._identity(c) for c in cs)
        return hard(cs)

    found = solvers.evolve(
        SPACE, score, seed=1, population=16, parents=4, generations=10, on_generation=lambda g, f: seen.append(f.score)
    )
    assert found.score == BEST == min(found.scores) and hard([found.best]) == [BEST]
    assert len(evaluated) == len(set(evaluated)) == len(found.candidates) <= 160 < 495
    assert len(seen) == 10 and seen == sorted(seen, reverse=True)


def test_a_search_repeats_with_its_seed():
    run = lambda f, seed, **k: [c.tolist() for c in f(SPACE, hard, *k.pop("more", ()), seed=seed, **k).candidates]
    small = {"population": 8, "generations": 3}
    assert run(solvers.evolve, 1, **small) == run(solvers.evolve, 1, **small) != run(solvers.evolve, 2, **small)
    guided = {"batch": 8, "rounds": 3, "pool": 32, "more": (lambda c: c,)}
    assert run(solvers.predict_and_search, 1, **dict(guided)) == run(solvers.predict_and_search, 1, **dict(guided))


def test_start_is_evaluated_first_and_nan_is_worst():
    given = np.array([0, 2, 7, 11])
    score = lambda cs: [0.0 if np.array_equal(c, given) else np.nan for c in cs]
    for found in (
        solvers.evolve(SPACE, score, start=[given, given], population=4, generations=2),
        solvers.predict_and_search(SPACE, score, lambda c: c, start=[given], batch=4, rounds=2, pool=8),
    ):
        assert np.array_equal(found.candidates[0], given) and found.score == 0 and np.isinf(found.scores[1:]).all()
        assert len(found.scores) == 8


def test_an_exhausted_space_ends_quietly():
    found = solvers.evolve(encodings.choices([2, 2]), lambda cs: [c.sum() for c in cs], population=8, generations=4)
    assert len(found.scores) == 4 and found.score == 0
    found = solvers.predict_and_search(
        encodings.choices([2, 2]), lambda cs: [c.sum() for c in cs], lambda c: c, rounds=3
    )
    assert len(found.scores) == 4


def test_the_predictor_ranks_better_than_chance():
    """Guided search needs fewer evaluations than random draws for the same score, over several seeds."""
    space = encodings.choices([4] * 10)
    target = np.random.default_rng(5).integers(4, size=10)
    weight = np.linspace(0.2, 2, 10)
    score = lambda cs: [float(weight @ (c != target)) for c in cs]
    onehot = lambda c: np.eye(4)[c]
    for seed in range(2):
        guided = solvers.predict_and_search(space, score, onehot, seed=seed, rounds=5, batch=16, pool=128)
        rng = np.random.default_rng(seed)
        random = min(score([space.draw(rng) for _ in range(400)]))
        assert len(guided.scores) == 80 and guided.score < random, (seed, guided.score, random)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encodings.subsets(4, 4), "1 <= size < pool"),
        (lambda: encodings.masks((2,), 3), "1 <= keep <= 2"),
        (lambda: encodings.choices([]), "positive counts"),
        (lambda: solvers.evolve(SPACE, hard, population=0), "population must be at least 1"),
        (lambda: solvers.evolve(SPACE, hard, fresh=2.0), "fresh, the share of new draws"),
        (lambda: solvers.evolve(SPACE, lambda cs: 1.0), "one number for each of 32 candidates"),
        (lambda: solvers.predict_and_search(SPACE, hard, lambda c: c, rounds=0), "rounds must be at least 1"),
    ],
)
def test_bad_searches(call, message):
    with pytest.raises(ValueError, match=message):
        call()
