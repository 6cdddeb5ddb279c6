"""Identities, closed forms, evaluation counts and recompilation of every guidance transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, processes, solvers, testing, times
from diffjax.guidance import (
    cfg,
    chain,
    clip_x0,
    count_calls,
    counted,
    dynamic_threshold,
    in_log_snr,
    in_sigma,
    interval,
    lift,
    with_x0,
)  # fmt: skip
from diffjax.numerics import add, scale
from diffjax.types import Evaluation

B, D = 5, 2
PROCESS = processes.cosine()
MIXTURE = testing.mixture(
    [1, 2], [[-1.0, 0.5], [1.0, -0.3]], covariances=[[[0.6, 0.2], [0.2, 0.5]], [[0.4, -0.1], [-0.1, 0.9]]]
)
LABELS = jnp.array([0, 1, 1, 0, 1])


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)


@pytest.fixture(scope="module")
def oracle():
    return testing.oracle(MIXTURE, PROCESS)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


@jax.jit
def call(d, x, t, cond):
    return d(x, t, cond)


@jax.jit
def run(d, solver, x):
    return diffjax.sample(jax.random.key(0), d, solver, x, return_state=True)


# --------------------------------------------------------------------------------------------- classifier-free guidance


@pytest.mark.parametrize("skip", [True, False])
def test_weight_one_is_the_conditional_model_and_zero_the_unconditional(oracle, x, skip):
    plain = call(oracle, x, 0.4, LABELS)
    none = call(oracle, x, 0.4, jnp.full(B, testing.ALL))
    one, zero = (call(cfg(w, skip=skip)(oracle), x, 0.4, LABELS) for w in (1.0, 0.0))
    check = assert_equal if skip else assert_close
    check(one, plain)
    check(zero, none)


@pytest.mark.parametrize("t", [0.3, 0.95])
def test_guided_gaussians_are_a_closed_form(x, t):
    # one component: the conditional score is Gaussian; guidance extrapolates the two posterior means
    w, label = 2.5, 1
    a, s = float(PROCESS.alpha(t)), float(PROCESS.sigma(t))
    cov = np.array([[0.4, -0.1], [-0.1, 0.9]])
    mean, xs = np.array([1.0, -0.3]), np.asarray(x, np.float64)
    c = mean + a * (xs - a * mean) @ np.linalg.inv(a * a * cov + s * s * np.eye(2)) @ cov
    u = np.array([0.2, 0.1])  # a standard normal around another mean as the unconditional model
    m0 = u + a * (xs - a * u) / (a * a + s * s)
    pair = testing.mixture([1, 1], [u, mean], covariances=[np.eye(2), cov], labels=[0, 1])
    guided = cfg(w, null=0)(testing.oracle(pair, PROCESS))(x, t, jnp.full(B, label))
    np.testing.assert_allclose(guided.x0, m0 + w * (c - m0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a * guided.x0 + s * guided.eps, xs, atol=1e-5)


@pytest.mark.parametrize("weight", [2.0, np.array([0.0, 1.0, 2.0, 3.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])])
@pytest.mark.parametrize("times_of", ["scalar", "item"])
def test_weights_per_item_are_one_call_each(oracle, x, weight, times_of):
    t = 0.4 if times_of == "scalar" else jnp.linspace(0.1, 0.9, B)
    d = chain(count_calls(), cfg(weight))(oracle)
    e = jax.jit(lambda d: d.evaluate(x, t, LABELS))(d)
    c, u = oracle(x, t, LABELS), oracle(x, t, jnp.full(B, testing.ALL))
    w = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), (B,))
    assert_close(e.prediction, jax.tree.map(lambda a, b: a + w[:, None] * (b - a), u, c))
    needs_one = np.all(np.isin(weight, (0.0, 1.0)))
    assert counted(e.state) == (1, B if needs_one else 2 * B)


def frames(out_scale, x, t, cond):
    return {"video": out_scale * x["video"] + cond["label"][:, None, None], "audio": x["audio"] * cond["w"]}


def test_pytree_states_conditions_and_times_per_frame():
    x = {"video": jnp.ones((3, 4, 2)), "audio": jnp.ones((3, 5))}
    cond = {"label": jnp.arange(3.0), "w": jnp.full((3, 1), 2.0)}
    null = {"label": 0.0, "w": np.zeros(1)}
    net = diffjax.denoiser(frames, PROCESS, diffjax.from_x0, jnp.float32(0.5), null=null)
    for t in (
        {"video": jnp.full((3, 4), 0.3), "audio": jnp.full((3,), 0.6)},
        {"video": 0.3 * jnp.ones((1, 4)), "audio": 0.6},
    ):
        d = interval(cfg(3.0), 0.25, 0.5)(net)
        p = call(d, x, t, cond)
        # the video is inside the interval, the audio outside
        np.testing.assert_allclose(
            p.x0["video"], 0.5 + 3.0 * np.arange(3.0)[:, None, None] * np.ones((3, 4, 2)), rtol=1e-6
        )
        np.testing.assert_allclose(p.x0["audio"], 2.0)
        back = add(scale(PROCESS.alpha(t), p.x0), scale(PROCESS.sigma(t), p.eps))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, x)


def test_interval_selects_frame_by_frame(oracle):
    def net(x, t, cond):
        return x * cond[:, None, None]

    x = jnp.ones((2, 3, 2))
    d = diffjax.denoiser(net, PROCESS, diffjax.from_x0, null=0.0)
    t = jnp.array([[0.1, 0.5, 0.9], [0.5, 0.1, 0.1]])
    p = call(chain(count_calls(), interval(cfg(4.0), 0.4, 0.6))(d), x, t, jnp.ones(2))
    np.testing.assert_allclose(p.x0[..., 0], [[1, 4, 1], [4, 1, 1]])


def test_gradient_with_respect_to_the_weight(oracle, x):
    loss = lambda w, skip: cfg(w, skip=skip)(oracle)(x, 0.4, LABELS).x0.sum()
    c, u = oracle(x, 0.4, LABELS), oracle(x, 0.4, jnp.full(B, testing.ALL))
    slope = float((c.x0 - u.x0).sum())
    for w, skip in ((2.0, True), (1.0, False), (0.0, False)):
        assert float(jax.grad(loss)(w, skip)) == pytest.approx(slope, rel=1e-4)
    assert float(jax.grad(loss)(1.0, True)) == 0.0  # documented: what is skipped has no gradient


def test_gradient_through_sampling_is_finite(oracle, x):
    solver = solvers.ddim(PROCESS, times.uniform(3))
    f = lambda w: diffjax.sample(jax.random.key(0), cfg(w)(oracle).bind(LABELS), solver, x).sum()
    g = jax.grad(f)(2.0)
    assert np.isfinite(g) and abs(float(g) - float((f(2.01) - f(1.99)) / 0.02)) < 2e-2 * abs(float(g)) + 1e-3


def test_new_weights_and_bounds_do_not_recompile(oracle, x):
    traces = []

    @jax.jit
    def f(d):
        traces.append(0)
        return d(x, 0.4, LABELS)

    for w, lo in ((2.0, 0.1), (3.0, 0.2), (1.0, 0.5)):
        f(chain(interval(cfg(w), lo, 0.9), clip_x0(w), dynamic_threshold(0.9, w))(oracle))
    assert len(traces) == 1


# ---------------------------------------------------------------------------------------------------- counts and states


@pytest.mark.parametrize("weight, items", [(1.0, 10), (0.0, 10), (2.0, 20)])
def test_skipped_evaluations_are_not_made(oracle, x, weight, items):
    solver = solvers.ddim(PROCESS, times.uniform(10))
    _, state = run(chain(count_calls(), cfg(weight))(oracle).bind(LABELS), solver, x)
    assert counted(state) == (10, items * B)


def test_interval_counts_under_scan(oracle, x):
    grid = times.uniform(10)  # evaluated at 1, .9, ..., .1; six of them in [.3, .8]
    inside = int(np.sum((np.float32(grid[:-1]) >= np.float32(0.3)) & (np.float32(grid[:-1]) <= np.float32(0.8))))
    assert inside == 6
    d = chain(count_calls(), interval(cfg(2.0), 0.3, 0.8))(oracle).bind(LABELS)
    y, state = run(d, solvers.ddim(PROCESS, grid), x)
    assert counted(state) == (10, (10 + inside) * B)
    assert np.isfinite(y).all()


def test_interval_units_agree(oracle, x):
    lo, hi = 0.3, 0.7
    lam = [float(PROCESS.log_snr(t)) for t in (hi, lo)]
    variants = (
        interval(cfg(2.0), lo, hi),
        interval(cfg(2.0), *lam, unit=in_log_snr),
        interval(cfg(2.0), np.exp(-lam[1]), np.exp(-lam[0]), unit=in_sigma),
    )
    t = jnp.array([0.1, 0.31, 0.5, 0.69, 0.9])
    first, *rest = (call(v(oracle), x, t, LABELS) for v in variants)
    for other in rest:
        assert_equal(first, other)
    guided, plain = call(cfg(2.0)(oracle), x, t, LABELS), call(oracle, x, t, LABELS)
    on = np.array([False, True, True, True, False])[:, None]
    assert_close(first.x0, np.where(on, guided.x0, plain.x0))


def _remember(own, inner, state, x, t, cond, key):
    """A stateful transform: an item's running sum of x0, on axis 1, a shared step and the last condition."""
    total, step, last = state
    e = inner.evaluate(x, t, cond)
    return Evaluation(e.prediction, (total + e.prediction.x0.T, step + 1, cond), None)


def _remember_init(own, inner, x, cond):
    return jnp.zeros(x.T.shape), jnp.zeros((), int), jnp.full_like(cond, -7)


def remember(denoiser):
    return denoiser.wrap(_remember, (), _remember_init)


def test_a_stateful_denoiser_keeps_one_state_per_condition(oracle, x):
    d = cfg(jnp.array([2.0, 1.0, 0.0, 1.0, 1.0]))(remember(oracle))
    total, step, last = d.evaluate(x, 0.4, LABELS).state
    c, u = oracle(x, 0.4, LABELS).x0, oracle(x, 0.4, jnp.full(B, testing.ALL)).x0
    np.testing.assert_allclose(total.T, np.stack([c, u], 1).reshape(2 * B, D), atol=1e-6)
    assert step == 1 and last.tolist() == [0, -1, 1, -1, 1, -1, 0, -1, 1, -1]
    # weights 0 and 1 only: the halves that were not evaluated stay as they were
    total, step, last = cfg(jnp.array([1.0, 1.0, 0.0, 1.0, 1.0]))(remember(oracle)).evaluate(x, 0.4, LABELS).state
    assert step == 1 and last.tolist() == [0, -7, 1, -7, -7, -1, 0, -7, 1, -7]
    np.testing.assert_allclose(total.T[5], u[2], atol=1e-6)
    np.testing.assert_array_equal(total.T[4], 0)


def with_aux(x, t, cond):
    return x * cond[:, None], {"u": cond, "global": jnp.float32(3)}


def test_aux_is_that_of_the_conditional_evaluation(x):
    net = diffjax.denoiser(with_aux, PROCESS, diffjax.from_x0, null=0.0, aux=True)
    for w in (1.0, 2.0):
        aux = jax.jit(lambda d: d.evaluate(x, 0.4, jnp.arange(5.0)).aux)(cfg(w)(net))
        assert aux["u"].tolist() == [0, 1, 2, 3, 4] and aux["global"] == 3


# ----------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("transform", [clip_x0(0.4), dynamic_threshold(0.5, 0.3), clip_x0(np.array([0.3, 0.6]))])
@pytest.mark.parametrize("t", [0.02, 0.5, 1.0])
def test_thresholds_keep_the_pair_consistent(oracle, x, transform, t):
    p = call(transform(oracle), x, t, LABELS)
    assert np.abs(p.x0).max() <= 0.6 + 1e-6
    a, s = PROCESS.alpha(t), PROCESS.sigma(t)
    np.testing.assert_allclose(a * p.x0 + s * p.eps, x, atol=2e-6)


def test_thresholds_leave_what_is_in_range_exactly(oracle, x):
    for transform in (clip_x0(50.0), dynamic_threshold(0.9, 50.0)):
        assert_equal(call(transform(oracle), x, 0.3, LABELS), call(oracle, x, 0.3, LABELS))


def test_clipping_at_zero_noise_is_finite_with_finite_gradient(oracle, x):
    f = lambda t: sum(jnp.sum(a) for a in clip_x0(0.1)(oracle)(x, t, LABELS))
    value, grad = jax.value_and_grad(f)(0.0)
    assert np.isfinite(value) and np.isfinite(grad)
    asymmetric = clip_x0(0.5, low=-0.1)(oracle)(x, 0.0, LABELS)
    np.testing.assert_allclose(asymmetric.x0, np.clip(x, -0.1, 0.5), atol=1e-6)


def test_dynamic_threshold_is_the_textbook_loop(oracle, x):
    x0 = np.asarray(oracle(x, 0.3, LABELS).x0)
    got = dynamic_threshold(0.75, 0.5)(oracle)(x, 0.3, LABELS).x0
    for b in range(B):
        s = max(np.quantile(np.abs(x0[b]), 0.75), 0.5)
        np.testing.assert_allclose(got[b], np.clip(x0[b], -s, s) * 0.5 / s, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- composition


def double_x0(p, x, t):
    return with_x0(p, jax.tree.map(lambda a: 2 * a, p.x0), PROCESS, t)


def swap_sign(p):
    return diffjax.Prediction(-p.x0, -p.eps)


def test_chain_is_the_identity_and_applies_the_first_innermost(oracle, x):
    assert chain()(oracle) is oracle
    a = call(chain(lift(double_x0), clip_x0(0.5))(oracle), x, 0.3, LABELS)
    b = call(clip_x0(0.5)(lift(double_x0)(oracle)), x, 0.3, LABELS)
    c = call(lift(double_x0)(clip_x0(0.5)(oracle)), x, 0.3, LABELS)
    assert_equal(a, b)
    assert np.abs(a.x0).max() <= 0.5 < np.abs(c.x0).max()
    assert_equal(call(lift(swap_sign)(oracle), x, 0.3, LABELS).eps, -call(oracle, x, 0.3, LABELS).eps)
    nested = chain(chain(count_calls()), interval(chain(cfg(2.0), clip_x0(0.5)), 0.0, 1.0))(oracle)
    assert_close(call(nested, x, 0.3, LABELS), call(chain(cfg(2.0), clip_x0(0.5))(oracle), x, 0.3, LABELS))


def test_a_plain_function_is_a_transform(oracle, x):
    mine = lambda d: cfg(2.0)(d)
    assert_close(call(chain(mine)(oracle), x, 0.3, LABELS), call(cfg(2.0)(oracle), x, 0.3, LABELS))
    assert_close(call(interval(mine, 0, 1)(oracle), x, 0.3, LABELS), call(cfg(2.0)(oracle), x, 0.3, LABELS))


def test_a_condition_bound_before_the_transform_stays_bound(oracle, x):
    assert_equal(cfg(2.0)(oracle.bind(LABELS))(x, 0.3), cfg(2.0)(oracle).bind(LABELS)(x, 0.3))


def test_dropout_keys_reach_the_network(x):
    def net(x, t, *, key=None):
        return x if key is None else x * jax.random.normal(key, x.shape)

    d = chain(clip_x0(9.0), count_calls())(diffjax.denoiser(net, PROCESS, diffjax.from_x0, dropout=True))
    a, b = (d.evaluate(x, 0.3, key=k).prediction.x0 for k in jax.random.split(jax.random.key(0)))
    assert not np.allclose(a, b)


@pytest.mark.parametrize("name", guidance.CATALOGUE)
def test_every_entry_keeps_the_pair_and_the_shape_and_runs_in_the_loop(oracle, x, name):
    card = guidance.CATALOGUE[name]
    d = chain(count_calls(), card.build())(oracle)
    for t in (1e-3, 0.5, 1.0):
        p = call(d, x, t, LABELS)
        np.testing.assert_allclose(PROCESS.alpha(t) * p.x0 + PROCESS.sigma(t) * p.eps, x, atol=2e-5)
    y, state = run(d.bind(LABELS), solvers.ddim(PROCESS, times.uniform(6)), x)
    assert y.shape == x.shape and np.isfinite(y).all()
    counters = 2 if name == "count_calls" else 1
    assert 6 * B <= counted(state).items / counters <= 6 * B * card.evals
    assert ("null" in card.flags) == (card.evals == 2)


def test_a_sample_does_not_depend_on_the_devices(oracle):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, D)), jnp.float32)
    labels = jnp.arange(16) % 2
    solver = solvers.ddim(PROCESS, times.uniform(4))
    d = chain(count_calls(), interval(cfg(2.0), 0.2, 0.8))(oracle)
    one, _ = run(d.bind(labels), solver, x)
    many, _ = run(d.bind(jax.device_put(labels, split)), solver, jax.device_put(x, split))
    np.testing.assert_allclose(one, many, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_way_out(oracle, x):
    bare = diffjax.denoiser(lambda x, t: x, PROCESS, diffjax.from_x0)
    with pytest.raises(ValueError, match="guidance without a null condition"):
        cfg(2.0)(bare)
    with pytest.raises(ValueError, match="guidance without a null condition"):
        interval(cfg(2.0), 0.2, 0.8)(bare)
    with pytest.raises(ValueError, match="needs a condition"):
        cfg(2.0)(oracle)(x, 0.3)
    with pytest.raises(ValueError, match="weight must be finite"):
        cfg(np.nan)
    with pytest.raises(ValueError, match="weight must be a number"):
        cfg(oracle)
    with pytest.raises(ValueError, match="lo <= hi"):
        interval(cfg(2.0), 0.8, 0.2)
    with pytest.raises(ValueError, match="low < limit"):
        clip_x0(-1.0)
    with pytest.raises(ValueError, match="percentile"):
        dynamic_threshold(99.5)
    with pytest.raises(ValueError, match="floor"):
        dynamic_threshold(0.9, 0.0)
    with pytest.raises(ValueError, match="got a function of 2"):
        lift(lambda a, b: a)
    with pytest.raises(ValueError, match="must return a Denoiser"):
        chain(swap_sign_of_anything)(oracle)


def swap_sign_of_anything(p):
    return 0
