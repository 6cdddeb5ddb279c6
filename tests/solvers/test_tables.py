"""Every catalogue entry against the contract of a solver, and the table as a value."""

import dataclasses
import functools

import host_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import processes, solvers, times
from diffjax.solvers import CATALOGUE
from diffjax.solvers.table import With
from diffjax.testing import draw, flow, gaussian, oracle, smooth_mixture
from diffjax.types import Denoiser, Evaluation

PROCESSES = {"vp": processes.vp, "cosine": processes.cosine, "sub_vp": processes.sub_vp, "ve": processes.ve,
             "edm": processes.edm, "rectified": processes.rectified}  # fmt: skip
LINEAR = [n for n, c in CATALOGUE.items() if "nonlinear" not in c.flags]  # tables; the others have tests of their own
DETERMINISTIC = [n for n in LINEAR if not CATALOGUE[n].noise]
MIX = smooth_mixture()


def build(name, process, grid):
    options = {"edm_heun": {"s_churn": 0.0}}.get(name, {})
    return CATALOGUE[name].build(process, grid, **options)


def run_stack(tables, denoiser, x):
    """All tables in one compiled call, vmapped over the stack."""
    return jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))(
        jax.random.key(0), denoiser, solvers.stack(tables), x
    )


def rms_errors(counts):
    """rms error of every deterministic method on cosine for each number of steps, all in one compiled call."""
    process, start, stop = processes.cosine(), 0.9, 0.1
    names = [*DETERMINISTIC, "edm_heun"]
    x, _ = draw(jax.random.key(1), MIX, 16, process, start)
    exact = flow(MIX, process, x, start, stop)
    grids = [times.log_snr(process, n, start=start, stop=stop) for n in counts]
    tables = [build(name, process, grid) for name in names for grid in grids]
    end = np.asarray(run_stack(tables, oracle(MIX, process), x), np.float64)
    errors = np.sqrt(((end - exact) ** 2).sum(-1).mean(-1)).reshape(len(names), len(counts))
    return dict(zip(names, errors, strict=True))


@pytest.fixture(scope="module")
def errors():
    with jax.enable_x64(True):
        return rms_errors((80, 160))


@pytest.fixture(scope="module")
def float32_errors():
    return rms_errors((10, 25, 50, 100, 200))


@pytest.mark.parametrize("name", [*DETERMINISTIC, "edm_heun"])
def test_float32_error_falls_to_its_floor_and_stays(name, float32_errors):
    e = float32_errors[name]
    least = np.minimum.accumulate(e)
    floor = (
        1.5e-6  # about a dozen roundings of a state of this size: 0.9e-6 to 2.6e-6 by chance, with 50 steps as with 200
    )
    assert np.all(e[1:] < 2 * np.maximum(least[:-1], floor)), e
    assert e[-1] < (0.05 if CATALOGUE[name].order == 1 else 2e-3)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "edm_heun"])
def test_measured_order_is_the_cards(name, errors):
    a, b = errors[name]
    excess = np.log2(a / b) - CATALOGUE[name].order
    assert excess > -0.15, (name, errors[name])
    # "startup": the error of the first steps, which sets the order in the end, is not yet the largest one at 160 steps
    assert (excess < 0.15) != ("startup" in CATALOGUE[name].flags), (name, errors[name])


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in LINEAR for k in CATALOGUE[n].exact if k != "gaussian"])
def test_exact_on_constant_predictions(name, kind, x64):
    process = processes.vp()
    constant = jnp.array([[0.7, -1.2]])
    read = {"x0": diffjax.from_x0, "eps": diffjax.from_eps}[kind]
    d = diffjax.denoiser(lambda x, t: jnp.broadcast_to(constant, x.shape), process, read)
    grid = np.array([0.9, 0.55, 0.3, 0.1])
    x = jnp.array([[2.0, 0.5]])
    p = d(x, grid[0])  # the flow of a constant prediction keeps both halves of the first pair
    got = diffjax.sample(jax.random.key(0), d, build(name, process, grid), x)
    np.testing.assert_allclose(got, process.add_noise(p.x0, p.eps, grid[-1]), rtol=1e-10)


def test_v_steps_are_exact_for_standard_normal_data(x64):
    process = processes.vp()
    x = jax.random.normal(jax.random.key(0), (4, 2))
    s = build("exp_ab3_v", process, times.uniform(3, start=0.98, stop=0.02))
    got = diffjax.sample(jax.random.key(0), oracle(gaussian([0.0, 0.0], 1.0), process), s, x)
    np.testing.assert_allclose(got, x, rtol=1e-10)


READS = {"x0": diffjax.from_x0, "eps": diffjax.from_eps, "v": diffjax.from_v, "edm": diffjax.from_edm}


def read_by_number(denoiser, state, x, t, cond, key):
    """A network whose output is read in one of the `READS`; which one is a leaf, so that all share a compilation."""
    which, scale = denoiser.leaves
    out = scale * jnp.tanh(x) + 0.1
    return Evaluation(
        jax.lax.switch(which, [lambda r=r: r(out, x, denoiser.process, t) for r in READS.values()]), state
    )


@pytest.fixture(scope="module")
def endpoint_matrix():
    """Every method x process x parameterisation from exactly t = 1 to exactly t = 0, stacked: one compilation a process."""
    run = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))
    x1 = jax.random.normal(jax.random.key(0), (2, 3))
    out, refused = {}, {}
    for pname, make in PROCESSES.items():
        process = make()
        tables, names = [], []
        for name in LINEAR:
            try:
                tables.append(CATALOGUE[name].build(process, times.log_snr(process, 5)))
                names.append(name)
            except ValueError as e:
                refused[pname, name] = str(e)
        x = x1 * process.sigma(1.0)
        stacked = solvers.stack(tables)
        for i, rname in enumerate(READS):
            d = Denoiser((jnp.int32(i), jnp.float32(0.9)), process, apply=read_by_number)
            end = run(jax.random.key(0), d, stacked, x)
            out.update({(pname, name, rname): np.asarray(e) for name, e in zip(names, end, strict=True)})
    return out, refused


def test_endpoint_matrix_is_finite(endpoint_matrix):
    out, refused = endpoint_matrix
    assert {name for _, name in refused} <= {n for n in LINEAR if "finite_velocity" in CATALOGUE[n].flags}
    assert all("not finite" in message for message in refused.values())
    assert len(out) == (len(LINEAR) * len(PROCESSES) - len(refused)) * 4
    assert [k for k, v in out.items() if not np.all(np.isfinite(v))] == []


@pytest.mark.parametrize("process", [processes.vp(), processes.ve(), processes.edm(), processes.rectified()],
                         ids=["vp", "ve", "edm", "rectified"])  # fmt: skip
def test_samples_have_the_data_distribution(process):
    """From t = 1 to t = 0 on an exact Gaussian: mean and covariance, deterministic and stochastic methods."""
    cov = np.array([[0.5, 0.2], [0.2, 0.3]])
    m = gaussian([0.5, -0.25], cov)
    n = 4096
    x = process.prior(jax.random.key(5), (n, 2))
    names = ["ddim", "heun", "dpmpp_2m", "dpmpp_3m", "exp_ab3_v", "exp_ab2_eps", "ddpm", "ancestral", "edm_heun"]
    tables = [CATALOGUE[k].build(process, times.karras(process, 60)) for k in names]
    end = run_stack(tables, oracle(m, process), x)
    for name, e in zip(names, np.asarray(end), strict=True):
        limit = 0.12 if name in ("ddim", "ddpm", "ancestral") else 0.06  # discretisation (order 1) + 4 standard errors
        assert np.abs(np.cov(e.T) - cov).max() < limit, (name, np.cov(e.T))
        assert np.abs(e.mean(0) - [0.5, -0.25]).max() < 0.07, (name, e.mean(0))


def test_one_trace_for_all_tables_of_a_shape():
    traces = []

    def net(params, x, t, cond):
        traces.append(1)
        return params * x

    process = processes.cosine()
    run = jax.jit(diffjax.sample)
    x = jnp.ones((4, 2))
    ends = []
    for name in ("ddim", "dpmpp_2m", "exp_ab2_v", "ddpm", "euler", "heun", "edm_heun"):
        for n in (5, 8):
            s = build(name, process, times.uniform(n, start=0.98))
            s = solvers.pad(s, 16, p=1, q=1, noise=2)
            ends.append(run(jax.random.key(0), diffjax.denoiser(net, process, diffjax.from_v, 0.5), s, x))
    assert len(traces) == 1
    assert len({float(e.sum()) for e in ends}) > 10


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "heun", "edm_heun", "ddpm"])
def test_padding_is_bit_equal(name):
    process = processes.vp()
    d = diffjax.denoiser(lambda x, t: jnp.sin(x), process, diffjax.from_v)
    s = CATALOGUE[name].build(process, times.uniform(6))
    x = jax.random.normal(jax.random.key(0), (4, 2))
    run = lambda s: diffjax.sample(jax.random.key(1), d, s, x)
    np.testing.assert_array_equal(run(s), run(solvers.pad(s, 20, p=2, q=4, noise=2)))
    np.testing.assert_array_equal(run(s), run(solvers.compact(solvers.pad(s, s.evaluations, p=2, q=4, noise=2))))


def test_padded_tables_stack():
    """The padding of a table is not run, whatever made it."""
    process = processes.vp()
    s, other = solvers.heun(process, times.uniform(3)), solvers.ddim(process, times.uniform(3))
    plain, padded = (solvers.stack([first, other]) for first in (s, solvers.pad(s, 9)))
    x, n = np.array([[0.7, -1.2]]), plain.rows.t.shape[1]
    for i in range(2):
        a, b = (
            host_tables.run(jax.tree.map(lambda c, i=i: c[i], t), host_tables.network(process), x)
            for t in (plain, padded)
        )
        np.testing.assert_allclose(a, b, rtol=1e-14)
    assert padded.rows.t.shape[1] == 9 > n


def test_constants_are_a_prefix_of_the_state():
    state = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4), jnp.bfloat16)}
    one, own = diffjax.solvers.table.Start(1, 0)(state, (np.ones(()), {"a": np.ones((1, 3)), "b": np.ones(())})).c
    assert one["a"].dtype == own["a"].dtype == jnp.float32 and one["b"].dtype == jnp.bfloat16
    assert own["a"].shape == (1, 3) and one["b"].shape == ()


def test_what_takes_tables_refuses_other_solvers(tmp_path):
    other = solvers.ddpm_learned(processes.vp(), times.uniform(3))
    for use in (solvers.compact, lambda s: solvers.pad(s, 9), lambda s: solvers.stack([s]),
                lambda s: solvers.save_table(tmp_path / "x.npz", s)):  # fmt: skip
        with pytest.raises(ValueError, match="takes linear tables.*rows of type ChainRows"):
            use(other)
    s = solvers.ddim(processes.vp(), times.uniform(3))
    with pytest.raises(ValueError, match="at least one table"):
        solvers.stack([])
    with pytest.raises(ValueError, match="0, 1 or 2; got 3"):
        solvers.pad(s, 9, noise=3)
    with pytest.raises(ValueError, match="own way to apply its rows would be lost"):
        solvers.save_table(tmp_path / "x.npz", dataclasses.replace(s, read=len))
    np.testing.assert_array_equal(solvers.ddim(processes.vp(), [1.0, 0.5, 0.0]).grid, [1.0, 0.5, 0.0])


def test_equivalences(x64):
    process = processes.vp()
    grid = times.log_snr(process, 8, start=0.99, stop=0.01)
    same = lambda a, b: jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-9, atol=1e-12), a, b)
    d = oracle(MIX, process)
    x = jax.random.normal(jax.random.key(0), (4, 2))
    run = lambda s: diffjax.sample(jax.random.key(1), d, s, x)
    same(run(solvers.ddpm(process, grid)), run(solvers.ddim(process, grid, eta=1.0)))
    same(run(solvers.ancestral(process, grid)), run(solvers.ddim(process, grid, eta=1.0)))
    for name in ("dpmpp_1", "exp_ab1_x0", "exp_ab1_eps"):
        same(run(build(name, process, grid)), run(solvers.ddim(process, grid)))
    same(run(solvers.edm_heun(process, grid, s_churn=0.0)), run(solvers.heun(process, grid)))
    flow_ = processes.rectified()
    euler, ddim = (f(flow_, times.uniform(5)) for f in (solvers.euler, solvers.ddim))
    d = diffjax.denoiser(lambda x, t: jnp.cos(x), flow_, diffjax.from_velocity)
    same(*(diffjax.sample(jax.random.key(0), d, s, x) for s in (euler, ddim)))
    ve = processes.ve()  # Euler in sigma, by hand
    grid = times.uniform(5)
    d = oracle(MIX, ve)
    y = x * 50
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        y = y + (ve.sigma(b) - ve.sigma(a)) * d(y, a).eps
    same(diffjax.sample(jax.random.key(0), d, solvers.ddim(ve, grid), x * 50), y)


def test_dpmpp_2m_against_the_textbook_loop(x64):
    """The published pseudo-code, in (alpha, sigma, lambda) and Python."""
    process = processes.vp()
    grid = times.uniform(7, start=0.95, stop=0.05)
    d = oracle(MIX, process)
    x = start = jax.random.normal(jax.random.key(0), (4, 2))
    old = lam_old = None
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x0 = d(x, t).x0
        lam_t, lam_s = process.log_snr(t), process.log_snr(s)
        h = lam_s - lam_t
        target = x0 if old is None else (1 + h / (2 * (lam_t - lam_old))) * x0 - h / (2 * (lam_t - lam_old)) * old
        x = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * np.expm1(-h) * target
        old, lam_old = x0, lam_t
    got = diffjax.sample(jax.random.key(0), d, CATALOGUE["dpmpp_2m"].build(process, grid), start)
    np.testing.assert_allclose(got, x, rtol=1e-10)


def test_edm_churn_against_the_textbook_loop(x64):
    process = processes.edm()
    grid = times.karras(process, 6)
    d = oracle(MIX, process)
    x = start = process.prior(jax.random.key(0), (4, 2))
    s = solvers.edm_heun(process, grid, s_churn=3.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    got, noises = diffjax.sample(jax.random.key(0), d, s, start), {}
    from diffjax import numerics as nu

    keys = nu.item_keys(jax.random.key(0), jnp.arange(4))
    sigma = process.sigma(grid)
    for i in range(6):
        gamma = min(3.0 / 6, 2**0.5 - 1) if 0.05 <= sigma[i] <= 50 else 0.0
        hat = sigma[i] * (1 + gamma)
        noises[i] = nu.item_normal(keys, 2 * (2 * i), x)
        y = x + 1.003 * np.sqrt(hat**2 - sigma[i] ** 2) * noises[i]
        slope = d(y, hat / 80.0).eps
        x = y + (sigma[i + 1] - hat) * slope
        if sigma[i + 1] > 0:
            x = y + (sigma[i + 1] - hat) / 2 * (slope + d(x, grid[i + 1]).eps)
    np.testing.assert_allclose(got, x, rtol=1e-9)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_returns_to_the_start(name, x64):
    process = processes.vp()
    grid = times.log_snr(process, 200, start=0.9, stop=0.05)
    d = oracle(MIX, process)
    x = jax.random.normal(jax.random.key(0), (3, 2))
    forward, back = (CATALOGUE[name].build(process, g, **o) for g, o in ((grid, {}), (grid[::-1], {"inverse": True})))
    end = diffjax.sample(jax.random.key(0), d, forward, x)
    again = diffjax.sample(jax.random.key(0), d, back, end)
    assert np.abs(again - x).max() < (0.1 if CATALOGUE[name].order == 1 else 2e-3)


FIRST_ORDER_START = ["ddim", "heun", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_exact", "exp_ab3_x0", "exp_ab3_v",
                     "unipc3_x0", "unip2_eps", "deis_t3", "lms3", "pndm", "ipndm4", "ghvb2", "dpm_solver_3", "dpmpp_2s",
                     "dpm_v3_3", "sa"]  # fmt: skip


@pytest.mark.parametrize("name", FIRST_ORDER_START)
def test_the_first_step_from_sigma_zero_adds_the_predicted_noise(name):
    """Inverse from t = 0, where x says nothing of eps: alpha_s x0 + sigma_s eps, for whatever pair is predicted."""
    process, grid, x = processes.vp(), np.array([0.0, 0.3]), np.array([0.7, -1.2])
    options = {"tau": 0.0} if name == "sa" else {}
    model = lambda y, t: (0.9 * y - 0.2, np.sin(y))
    x0, eps = model(x, 0.0)
    end = host_tables.run(CATALOGUE[name].build(process, grid, inverse=True, **options), model, x)
    np.testing.assert_allclose(end, process.alpha(0.3) * x0 + process.sigma(0.3) * eps, rtol=1e-12)


def test_hyper_parameters_are_differentiable(x64):
    d0 = oracle(MIX, processes.vp())
    x = jax.random.normal(jax.random.key(0), (4, 2))
    grid = times.uniform(6, start=0.95)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    def end(beta_max, eta, churn, shift):
        process = processes.vp(0.1, beta_max)
        shifted = shift * jnp.asarray(grid)
        tables = [
            solvers.ddim(process, grid, eta=eta),
            solvers.ddpm(process, grid, variance=eta),
            solvers.edm_heun(process, grid, s_churn=churn),
            solvers.dpmpp(process, shifted, order=3),
            solvers.exp_ab(process, shifted, order=3, value=solvers.V),
            solvers.heun(process, shifted),
            solvers.euler(process, grid[:-1]),
        ]
        run = jax.vmap(diffjax.sample, (None, None, 0, None))
        return jnp.sum(run(jax.random.key(0), dataclasses.replace(d0, process=process), solvers.stack(tables), x) ** 2)

    grads = end(20.0, 0.5, 2.0, 0.99)[1]
    assert all(np.isfinite(g) and g != 0 for g in grads)
    assert np.isfinite(end(20.0, 0.0, 2.0, 0.99)[1][1])  # sqrt(0 * ...) has no finite derivative
    step = 1e-5
    for i, grad in enumerate(grads):
        up, down = ([v + sign * step * (j == i) for j, v in enumerate((20.0, 0.5, 2.0, 0.99))] for sign in (1, -1))
        np.testing.assert_allclose(grad, (end(*up)[0] - end(*down)[0]) / (2 * step), rtol=1e-5)


def programs(names):
    """One card for every program: of those that differ in their order alone, the last, which has the highest."""
    kind = lambda b: (b.f, *((k, v) for k, v in b.options if k != "order")) if isinstance(b, With) else b
    return {kind(CATALOGUE[name].build): name for name in names}.values()


@pytest.mark.slow
def test_traced_grid_builds_the_same_table(x64):
    process = processes.cosine()
    grid = times.uniform(7, start=0.97, stop=0.02)
    for name in programs(DETERMINISTIC):
        host = CATALOGUE[name].build(process, grid)
        # traced as under jit, then evaluated operation by operation: compiling every builder would take a minute
        traced, tree = jax.make_jaxpr(lambda g, name=name: CATALOGUE[name].build(process, g).rows, return_shape=True)(
            grid
        )
        traced = jax.tree.unflatten(jax.tree.structure(tree), jax.core.eval_jaxpr(traced.jaxpr, traced.consts, grid))
        for a, b in zip(jax.tree.leaves(host.rows), jax.tree.leaves(traced), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert isinstance(host.rows.qn, np.ndarray) and host.rows.qn.dtype == np.float64


def test_tables_save_and_load(tmp_path):
    process = processes.vp()
    s = solvers.edm_heun(process, times.uniform(5))
    solvers.save_table(tmp_path / "table.npz", s)
    loaded = solvers.load_table(tmp_path / "table.npz")
    jax.tree.map(np.testing.assert_array_equal, s, loaded)
    assert loaded.step is s.step and loaded.init == s.init
    whole = (tmp_path / "table.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[600] ^= 255
    for damaged in (b"no table", b"", whole[:500], bytes(flipped)):
        (tmp_path / "broken.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a file written by save_table"):
            solvers.load_table(tmp_path / "broken.npz")
    np.savez(tmp_path / "part.npz", format=1, qn=s.rows.qn)
    with pytest.raises(ValueError, match="lacks .*'accept'"):
        solvers.load_table(tmp_path / "part.npz")
    padded = solvers.pad(s, 20)  # the padding is no part of the table
    solvers.save_table(tmp_path / "padded.npz", padded)
    jax.tree.map(np.testing.assert_array_equal, s, solvers.load_table(tmp_path / "padded.npz"))
    np.savez(
        tmp_path / "newer.npz", format=99, grid=s.grid, **{k: v for k, v in s.rows._asdict().items() if v is not None}
    )
    with pytest.raises(ValueError, match="Upgrade diffjax"):
        solvers.load_table(tmp_path / "newer.npz")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (np.linspace(0, 1, 5), r"grid must decrease .* Did you mean grid\[::-1\]"),
        (np.array([1.0, 0.5, 0.5, 0.0]), "grid must decrease"),
        (np.array([1.0]), "at least two times"),
        (np.array([[1.0, 0.0]]), "one axis"),
        (np.array([1.0, np.nan, 0.0]), "finite times"),
        (np.array([1000.0, 500.0, 0.0]), r"times in \[0, 1\]"),
    ],
)
def test_bad_grids(grid, message):
    with pytest.raises(ValueError, match=message):
        solvers.ddim(processes.vp(), grid)


def test_bad_options():
    p, g = processes.vp(), times.uniform(4)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3"):
        solvers.dpmpp(p, g, order=4)
    with pytest.raises(ValueError, match="order must be"):
        solvers.exp_ab(p, g, order=5)
    with pytest.raises(ValueError, match="eta must be >= 0"):
        solvers.ddim(p, g, eta=-1.0)
    with pytest.raises(ValueError, match="the largest that fits"):
        solvers.ddim(p, g, eta=3.0)
    with pytest.raises(ValueError, match="deterministic"):
        solvers.ddim(p, g[::-1], eta=1.0, inverse=True)
    with pytest.raises(ValueError, match="variance must be in"):
        solvers.ddpm(p, g, variance=2.0)
    with pytest.raises(ValueError, match="s_churn must be >= 0"):
        solvers.edm_heun(p, g, s_churn=-1.0)
    with pytest.raises(ValueError, match="with inverse=True the grid must increase"):
        solvers.ddim(p, g, inverse=True)
    with pytest.raises(ValueError, match=r"euler has a coefficient that is not finite .* at t = 0"):
        solvers.euler(p, g[::-1], inverse=True)
    with pytest.raises(ValueError, match="does not fit"):
        solvers.pad(solvers.dpmpp(p, g, 3), 4, q=1)
