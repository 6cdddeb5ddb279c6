"""The denoising loss against a textbook loop, its equivalences, and the stationarity of every loss at the exact oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import losses, processes, testing
from diffjax.losses import check_batch, check_labels, denoising_loss, error_scale
from diffjax.prediction import EdmTarget, to_eps, to_score, to_v, to_velocity, to_x0
from diffjax.times import laws, weights
from diffjax.types import Evaluation, Prediction


def new(seed=0):
    """A key that was not used yet."""
    return jax.random.key(seed)


B, D = 16, 3
SPACES = {"x0": to_x0, "eps": to_eps, "v": to_v, "velocity": to_velocity, "score": to_score}
MIXTURE = testing.mixture([1, 2], [[-1.0, 0.5], [1.0, -0.3]], stds=[0.8, 0.6])


def middle(key, process, items):
    """A law on [0.2, 0.8], so that comparisons between spaces are well conditioned."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, items)
    return 0.2 + 0.6 * jax.vmap(lambda k: jax.random.uniform(k, ()))(keys)


def net(params, x, t, cond):
    return jnp.tanh(params * x) + t[:, None] + (0.0 if cond is None else cond.astype(x.dtype)[:, None])


def make(process, read=diffjax.from_x0, null=None):
    return diffjax.denoiser(net, process, read, jnp.float32(0.7), null=null)


@pytest.fixture(scope="module")
def x0():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)


@jax.jit
def call(loss, key, d, x0, cond=None, items=None):
    return loss(key, d, x0, cond, items)


# ------------------------------------------------------------------------------------------------------ textbook twin


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("process", [processes.rectified(), processes.vp(), processes.ve()], ids=["line", "vp", "ve"])
def test_loss_is_the_textbook_loop(x0, name, process):
    loss, aux = call(denoising_loss(middle, SPACES[name]), new(), make(process), x0)
    # the same noise from its documented new(), everything else by hand in float64
    eps = np.asarray(losses.independent(jax.random.split(new(), 4)[1], x0, jnp.arange(B)), np.float64)
    for b in range(B):
        t = float(aux["t"][b])
        a, s, da, ds = (float(f(t)) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
        clean = np.asarray(x0[b], np.float64)
        x = a * clean + s * eps[b]
        guess = np.tanh(0.7 * x) + t
        noise = (x - a * guess) / s
        blend = {"x0": (1, 0), "eps": (0, 1), "v": (-s, a), "velocity": (da, ds), "score": (0, -1 / s)}[name]
        error = blend[0] * (guess - clean) + blend[1] * (noise - eps[b])
        np.testing.assert_allclose(loss[b], np.mean(error**2), rtol=3e-3)
        np.testing.assert_allclose(aux["log_snr"][b], np.log(a / s), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(loss, aux["mse"])


# ------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize(
    "process", [processes.rectified(), processes.cosine(), processes.edm()], ids=["line", "vp", "edm"]
)
def test_a_weighting_means_the_same_in_every_space(x0, process):
    values = [call(denoising_loss(middle, s, weights.min_snr(5.0)), new(), make(process), x0)[0]
              for s in (*SPACES.values(), EdmTarget(0.5))]  # fmt: skip
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=3e-4)


@pytest.mark.parametrize("process", [processes.rectified(), processes.cosine(), processes.sub_vp()])
def test_named_losses_are_weightings_of_each_other(x0, process):
    d = make(process, diffjax.from_v)
    run = lambda loss: call(loss, new(), d, x0)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4)
    eps, aux = call(losses.noise_prediction(middle), new(), d, x0)
    t = aux["t"]
    close(run(losses.score_matching(middle)), eps)  # sigma^2 on the score is the simple loss
    close(run(denoising_loss(middle, to_x0, weights.unit("eps"))), eps)  # snr on x0 is the simple loss
    a, s, da, ds = process.alpha(t), process.sigma(t), process.dalpha(t), process.dsigma(t)
    factor = ((a * ds - da * s) / (a * a + s * s)) ** 2
    close(run(losses.flow_matching(middle)), factor * run(losses.v_prediction(middle)))
    close(run(denoising_loss(middle, to_x0, weights.edm(0.5))), run(denoising_loss(middle, EdmTarget(0.5))))


def test_flow_matching_on_the_line_regresses_noise_minus_data(x0):
    d = make(processes.rectified(), diffjax.from_velocity)
    loss, aux = call(losses.flow_matching(middle), new(), d, x0)
    eps = losses.independent(jax.random.split(new(), 4)[1], x0, jnp.arange(B))
    t = aux["t"][:, None]
    by_hand = jnp.square(net(0.7, (1 - t) * x0 + t * eps, aux["t"], None) - (eps - x0)).mean(1)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("process", [processes.rectified(), processes.vp(), processes.ve()])
def test_error_scale_agrees_with_the_weightings(name, process):
    t = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        error_scale(SPACES[name], process, t) ** 2, weights.error_factor(process, t, name), rtol=1e-4
    )


# --------------------------------------------------------------------------------------------------- layout and leaves


@pytest.mark.parametrize("name", losses.CATALOGUE)
def test_a_loss_does_not_depend_on_how_the_batch_is_cut(x0, name):
    loss, d = losses.CATALOGUE[name].build(), make(processes.cosine(), null=0.0)
    cond = jnp.arange(B, dtype=jnp.float32)
    whole, aux = call(loss, new(), d, x0, cond)
    part, _ = call(loss, new(), d, x0[4:9], cond[4:9], jnp.arange(4, 9))
    np.testing.assert_allclose(part, whole[4:9], rtol=2e-5, atol=2e-6)
    assert whole.shape == (B,) and np.isfinite(whole).all() and len(set(whole.tolist())) == B
    assert all(v.shape == (B,) and np.isfinite(v).all() for v in aux.values())


def test_sharded_equals_unsharded(x0):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    d, cond = make(processes.cosine(), null=0.0), jnp.arange(B, dtype=jnp.float32)
    loss = denoising_loss(laws.lognormal(), to_v, coupling=losses.k_nearest_noise(3), label_drop=0.5)
    one = call(loss, new(), d, x0, cond)[0]
    many = call(loss, new(), d, *jax.device_put((x0, cond), split))[0]
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_numbers_are_leaves_and_do_not_recompile(x0):
    traces = []

    @jax.jit
    def f(loss, d):
        traces.append(0)
        return loss(new(), d, x0)[0]

    a, b = (f(denoising_loss(laws.lognormal(m), to_v, weights.min_snr(g)), make(processes.vp(0.1, 9 + g)))
            for m, g in ((-1.0, 5.0), (0.0, 2.0)))  # fmt: skip
    assert len(traces) == 1 and not np.allclose(a, b)


def two_nets(x, t):
    return {"u": 0.5 * x["u"], "v": 0.3 * x["v"]}


def test_pytree_states_are_averaged_over_all_entries():
    x0 = {"u": jnp.ones((4, 2)), "v": jnp.ones((4, 3, 2))}
    d = diffjax.denoiser(two_nets, processes.rectified(), diffjax.from_x0)
    loss, aux = call(denoising_loss(middle, to_x0), new(), d, x0)
    eps = losses.independent(jax.random.split(new(), 4)[1], x0, jnp.arange(4))
    t = aux["t"]
    x = processes.rectified().add_noise(x0, eps, t)
    by_hand = (jnp.square(0.5 * x["u"] - 1).sum(1) + jnp.square(0.3 * x["v"] - 1).sum((1, 2))) / 8
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_a_learned_schedule_and_a_learned_law_get_gradients(x0):
    loss = lambda p, law: denoising_loss(law, to_v, weights.edm())(new(), make(p), x0)[0].mean()
    g, h = jax.jit(jax.grad(loss, (0, 1)))(processes.learned(), laws.lognormal(-1.0, 1.0))
    leaves = jax.tree.leaves((g, h))
    assert all(np.isfinite(a).all() for a in leaves) and all(np.any(a != 0) for a in leaves)


def test_a_bad_item_spoils_only_itself(x0):
    for loss in (denoising_loss(), denoising_loss(coupling=losses.minibatch_assignment())):
        value, _ = call(loss, new(), make(processes.cosine()), x0.at[3].set(jnp.nan))
        assert np.isnan(value[3]) and np.isfinite(np.delete(value, 3)).all()


# ---------------------------------------------------------------------------------------------------- label dropping


def see(x, t, cond):
    return jnp.zeros_like(x), {"a": cond["a"], "b": cond["b"]}


def test_labels_are_dropped_item_by_item_and_whole():
    n = 2000
    null = {"a": -1, "b": np.zeros(2)}
    d = diffjax.denoiser(see, processes.rectified(), diffjax.from_x0, null=null, aux=True)
    seen = {}

    def spy(aux):
        seen.update(aux)
        return jnp.zeros(n)

    cond = {"a": jnp.arange(n), "b": jnp.ones((n, 2))}
    x0 = jnp.zeros((n, 1))
    denoising_loss(label_drop=0.3, log_variance=spy)(new(), d, x0, cond)
    dropped = np.asarray(seen["a"]) == -1
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    np.testing.assert_array_equal(np.asarray(seen["b"])[:, 0] == 0, dropped)
    np.testing.assert_array_equal(np.asarray(seen["a"])[~dropped], np.arange(n)[~dropped])
    for rate, share in ((0.0, 0.0), (1.0, 1.0)):
        denoising_loss(label_drop=rate, log_variance=spy)(new(), d, x0, cond)
        assert np.mean(np.asarray(seen["a"]) == -1) == share


# ----------------------------------------------------------------------------------------------------- log-variance


def with_variance(params, x, t, cond):
    return jnp.zeros_like(x), {"log_variance": jnp.broadcast_to(params, (x.shape[0], 1))}


def test_log_variance_is_the_uncertainty_form_and_its_optimum_is_the_log_loss(x0):
    loss = denoising_loss(log_variance=losses.log_variance_of_aux)
    make_u = lambda u: diffjax.denoiser(with_variance, processes.rectified(), diffjax.from_x0, u, aux=True)
    value, aux = loss(new(), make_u(jnp.float32(0.3)), x0)
    np.testing.assert_allclose(value, aux["mse"] / np.exp(0.3) + 0.3, rtol=1e-5)
    best = jnp.log(aux["mse"].mean())
    grad = jax.grad(lambda u: loss(new(), make_u(u), x0)[0].mean())
    assert abs(float(grad(best))) < 1e-5 < abs(float(grad(best + 0.5)))


# ------------------------------------------------------------------------------------------------------- stationarity


def _nudge(own, inner, state, x, t, cond, key):
    """The oracle moved by theta in v: bounded in every space of a variance-preserving process."""
    e = inner.evaluate(x, t, cond, state=state)
    a, s = (diffjax.numerics.expand(f(t), x) for f in (inner.process.alpha, inner.process.sigma))
    dv = own * jnp.tanh(x + 0.5)
    p = Prediction(e.prediction.x0 - s * dv, e.prediction.eps + a * dv)
    return Evaluation(p, e.state)


@pytest.mark.parametrize("name", losses.CATALOGUE)
def test_the_exact_oracle_is_a_stationary_point(name):
    n = 4096
    options = {"levels": None} if "bound" in name else {}
    options |= {"steps": 10} if name == "discrete_bound" else {}
    loss = losses.CATALOGUE[name].build(label_drop=0.3, **options)
    oracle = testing.oracle(MIXTURE, processes.cosine())
    x0, label = testing.draw(jax.random.key(1), MIXTURE, n)

    @jax.jit
    def slopes(theta):
        per_item = lambda th: loss(new(), oracle.wrap(_nudge, th), x0, label)[0]
        return jax.jvp(per_item, (theta,), (jnp.ones_like(theta),))[1]

    at = lambda theta: np.asarray(slopes(jnp.float32(theta)), np.float64)
    error = lambda g: g.std() / np.sqrt(n)
    g = at(0.0)
    assert np.isfinite(g).all() and error(g) > 0
    assert abs(g.mean()) < 4 * error(g)
    moved = at(0.5)
    assert moved.mean() > 6 * error(moved)  # the test sees a denoiser that is not exact


# ------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_way_out(x0):
    d, cond = make(processes.cosine()), jnp.zeros(B)
    with pytest.raises(ValueError, match="label_drop is a probability"):
        denoising_loss(label_drop=1.5)
    with pytest.raises(ValueError, match="needs a null condition"):
        denoising_loss()(new(), d, x0, cond)
    denoising_loss()(new(), d, x0)  # nothing to drop without a condition
    denoising_loss(label_drop=0.0)(new(), d, x0, cond)
    with pytest.raises(ValueError, match="the batch is empty"):
        denoising_loss()(new(), d, x0[:0])
    with pytest.raises(ValueError, match="one global index per item"):
        denoising_loss()(new(), d, x0, items=jnp.arange(3))
    with pytest.raises(ValueError, match=r"1 of 3 labels are outside \[0, 10\); the first is 10 at position 1"):
        check_labels(np.array([1, 10, 2]), 10)
    with pytest.raises(ValueError, match="must be integers"):
        check_labels(np.ones(3), 10)
    check_labels(jnp.arange(10), 10)
    with pytest.raises(ValueError, match="not finite in 1 of 16 items, the first at position 3"):
        check_batch({"a": x0.at[3, 1].set(jnp.inf)})
    with pytest.raises(ValueError, match="must be floating"):
        check_batch(np.zeros((2, 3), np.uint8))
    check_batch(x0)
