"""GHVB: momentum that trades accuracy for stability in steps with few evaluations and strong guidance.

With y = x / alpha and rho = sigma / alpha the flow is dy = eps drho. Order p, momentum b:
  v_{n+1} = (1 - b) v_n + b eps_n;   y_{n+1} = y_n + (rho_{n+1} - rho_n) sum_j a_j v_{n+1-j},   b = 1: Adams-Bashforth
Order p with momentum b is also named by the order p - 1 + b, `ghvb(process, grid, order=3.5)`. Heavy ball averages the slopes of
Adams-Bashforth with the same velocity, and is of first order.

Orders are measured in equal steps of rho on a Gaussian-mixture flow known to 1e-12, from a history on the exact trajectory. The
divergence score is the mean over samples of the largest |x|, over that of the exact flow, for a narrow guided class of a mixture.
All settings (guidance weight, steps, order) in which Adams-Bashforth diverges, score > 1.2, are counted: b = 1/2 lowers most,
not all; where a method is far beyond its stable step the scores of both are arbitrary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import guidance, processes, solvers, testing, times
from diffjax.solvers import table
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=15,
    paper="arXiv:2307.11118",
    claim="b = 1 is Adams-Bashforth; order p for every b, heavy ball order 1; stable steps grow and divergence falls with b",
    expect={
        "adams_gap": at_most(1e-10),
        "order_error": at_most(0.25),
        "heavy_ball_order_error": at_most(0.25),
        "error_growth_as_b_falls": at_least(1.0),
        "cold_start_order": at_most(1.3),
        "order_from_first_slope": at_least(1.7),
        "stable_step_over_adams": at_least(1.2),
        "divergence_over_adams": at_most(0.8),
        "share_of_divergent_lowered": at_least(0.8),
    },
    minutes=1,
)

BETAS = (1.0, 0.8, 0.5)
ORDERS = (2, 3, 4)
HISTORY = 4  # rows that the exact trajectory replaces
sample = jax.jit(diffjax.sample)
sample_all = jax.jit(jax.vmap(diffjax.sample, (None, None, 0, None)))


def from_history(x, constants):
    """Registers that hold past states and values from the exact trajectory instead of copies of the start."""
    past_x, past_d = constants
    return table.Registers((x, *past_x), tuple(past_d), ())


def seeded(tables, past_x, past_d):
    """All tables in one, from row HISTORY on."""
    stacked = solvers.stack(tables)
    repeat = lambda a: jnp.broadcast_to(a, (len(tables), *a.shape))
    return dataclasses.replace(
        stacked,
        rows=jax.tree.map(lambda r: r[:, HISTORY:], stacked.rows),
        grid=stacked.grid[:, HISTORY:],
        constants=jax.tree.map(repeat, (past_x, past_d)),
        init=from_history,
    )


def equal_steps(process, n, first=6.0, last=3.0):
    return process.time_of_log_snr(-np.log(np.linspace(first, last, n + 1)))


def errors(process, mixture, x, counts):
    """rms error of GHVB and heavy ball by (method, p, b), for every number of steps."""
    denoiser, out = testing.oracle(mixture, process), {}
    end = testing.flow(mixture, process, x, *equal_steps(process, 1))
    keys = [(m, p, b) for m in (solvers.ghvb, solvers.heavy_ball) for p in (1, *ORDERS) for b in BETAS]
    for n in counts:
        grid, exact = equal_steps(process, n), [jnp.asarray(x)]
        for a, b in zip(grid[:HISTORY], grid[1:], strict=False):
            exact = [jnp.asarray(testing.flow(mixture, process, exact[0], a, b)), *exact]  # newest first
        slopes = [denoiser(y, t).eps for y, t in zip(exact[1:], grid[HISTORY - 1 :: -1], strict=True)]
        tables = seeded([m(process, grid, p, b) for m, p, b in keys], (exact[1],), tuple(slopes[:3]))
        got = np.asarray(sample_all(jax.random.key(0), denoiser, tables, exact[0]))
        for (m, p, b), e in zip(keys, got, strict=True):
            out.setdefault((m.__name__, p, b), []).append(np.sqrt(((e - end) ** 2).sum(-1).mean()))
    return out


def start_orders(process, mixture, x, counts):
    """Order of GHVB-3 with b = 1/2 and no history, by the first velocity: 0, and the first slope."""
    error, (t, s) = [], equal_steps(process, 1)
    exact = testing.flow(mixture, process, x, t, s)
    for n in counts:
        tables = [solvers.ghvb(process, equal_steps(process, n), 3, 0.5, seed=seed) for seed in (0.0, 1.0)]
        got = sample_all(jax.random.key(0), testing.oracle(mixture, process), solvers.stack(tables), x)
        error.append(np.sqrt(((np.asarray(got) - exact) ** 2).sum(-1).mean(-1)))
    return np.log2(error[0] / error[1])


def stable_steps():
    """The largest L h for which steps of y' = -L y stay bounded, by (p, b): every L is one item of a batch."""
    process = processes.ve(0.01, 100.0)  # alpha = 1
    grid = process.time_of_log_snr(-np.log(np.linspace(99.0, 1.0, 99)))  # steps of -1 in rho
    rate = jnp.linspace(0.01, 3.0, 300)[:, None]
    net = lambda params, x, t, cond: params * x  # dx = L x drho, and rho falls by one
    keys = [(p, b) for p in ORDERS for b in BETAS]
    tables = solvers.stack([solvers.ghvb(process, grid, p, b) for p, b in keys])
    denoiser = diffjax.denoiser(net, process, diffjax.from_eps, rate)
    end = np.abs(sample_all(jax.random.key(0), denoiser, tables, jnp.ones((300, 1))))[..., 0]
    return {k: float(rate[np.argmax(e > 1), 0]) for k, e in zip(keys, end, strict=True)}


def divergence(guides, counts, n, fine):
    """The divergence score of every guidance weight, number of steps, order and momentum."""
    process = processes.vp()
    mixture = testing.mixture([1, 3], [[0.8, 0.4], [0.0, 0.0]], stds=[0.2, 1.0])
    x = process.prior(jax.random.key(2), (n, 2))
    tables = {
        (c, p, b): solvers.ghvb(process, times.log_snr(process, c), p, b) for c in counts for p in ORDERS for b in BETAS
    }
    stacked, exact = solvers.stack(list(tables.values())), solvers.heun(process, times.log_snr(process, fine))
    size = lambda x: jnp.abs(x).max(-1).mean(-1)
    out = {}
    for w in guides:
        denoiser = guidance.cfg(w)(testing.oracle(mixture, process)).bind(jnp.zeros(n, jnp.int32))
        reached = size(sample_all(jax.random.key(0), denoiser, stacked, x))
        reached = np.asarray(reached / size(sample(jax.random.key(0), denoiser, exact, x)))
        out |= {(w, *k): r for k, r in zip(tables, reached, strict=True)}
    return out


@jax.enable_x64(True)
def run(preset):
    full = preset == "full"
    counts, n = ((50, 100), 16) if full else ((8, 16), 2)
    process, mixture = processes.vp(), testing.smooth_mixture()
    x, _ = testing.draw(jax.random.key(1), mixture, n, process, equal_steps(process, 1)[0])

    grid, d = equal_steps(process, 20, 8.0, 0.1), testing.oracle(mixture, process)
    adams = [solvers.CATALOGUE[f"lms{p}"].build(process, grid) for p in ORDERS]
    same = [f(process, grid, p, 1.0) for f in (solvers.ghvb, solvers.heavy_ball) for p in ORDERS]
    ends = np.asarray(sample_all(jax.random.key(0), d, solvers.stack([*same, *adams, *adams]), x))

    error = errors(process, mixture, x, counts)
    order = {k: np.log2(a / b) for k, (a, b) in error.items()}
    last = {k: e[-1] for k, e in error.items()}
    cold, warm = start_orders(process, mixture, x, counts)
    reach = stable_steps()
    if full:
        score = divergence((6.0, 8.0, 12.0), (8, 10, 12, 15, 18), 256, 500)
    else:
        score = divergence((12.0,), (8, 10), 8, 20)
    diverged = [k for k, a in score.items() if k[-1] == 1.0 and a > 1.2]
    ratios = np.array([score[*k[:-1], 0.5] / score[k] for k in diverged])
    return {
        "adams_gap": np.abs(ends[:6] - ends[6:]).max(),
        "order_error": max(abs(o - p) for (m, p, b), o in order.items() if m == "ghvb"),
        "heavy_ball_order_error": max(abs(o - 1) for (m, p, b), o in order.items() if m == "heavy_ball" and b < 1),
        "error_growth_as_b_falls": min(
            last["ghvb", p, low] / last["ghvb", p, high] for p in ORDERS for high, low in ((1.0, 0.8), (0.8, 0.5))
        ),
        "cold_start_order": cold,
        "order_from_first_slope": warm,
        "stable_step_over_adams": min(reach[p, 0.5] / reach[p, 1.0] for p in ORDERS),
        "divergence_over_adams": np.median(ratios),
        "share_of_divergent_lowered": np.mean(ratios < 1),
        "divergent_settings": len(ratios),
        **{f"stable_step_{p}_{b}": reach[p, b] for p, b in reach},
        "start_grid": x,
        **{f"adams_{p}_grid": e for p, e in zip(ORDERS, ends[6:], strict=False)},
    }
