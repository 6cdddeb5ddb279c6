"""Predictor-corrector: after every step of a one-step table, Langevin steps at the level it reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import numerics as nu
from diffjax.numerics import PyTree
from diffjax.solvers import table
from diffjax.solvers.sde import check_corrector, reverse_diffusion
from diffjax.types import Card, Noise, Process, Solver


class CorrectedRows(NamedTuple):
    """Rows of a table, and which of them are corrector steps."""

    base: table.Rows
    correct: Any  # [n] bool

    @property
    def t(self) -> Any:
        """[n, ...] time of evaluation."""
        return self.base.t

    @property
    def accept(self) -> Any:
        """[n] bool, whether the state after a row is at the next point of the grid."""
        return self.base.accept


def predictor_corrector(
    process: Process,
    grid: Any,
    predictor: Callable[..., Solver] = reverse_diffusion,
    snr: Any = 0.16,
    corrector_steps: int = 1,
    *,
    by_norm: bool = True,
) -> Solver:
    """A predictor from t to s, then Langevin steps at s.   x <- x + e score + sqrt(2 e) z,  e = 2 a (snr ||z|| / ||score||)^2

    With `score = -eps / sigma_s` and q = ||z|| / ||eps|| a corrector step is `x - 2 a (snr q)^2 sigma_s eps +
    2 sqrt(a) snr q sigma_s z`; a = (alpha_t / alpha_s)^2 is 1 for VE and 1 - beta for VP. The paper averages both norms over
    the batch; here they are each item's own, so that a sample does not depend on the others. With few dimensions q varies
    much, and a step that depends on its own noise is biased: `by_norm=False` sets q to 1, its limit in many dimensions, which
    makes the method a table. A level without noise is not corrected.

    Args: process: Gaussian.   grid: [n + 1] from noise to data.   predictor: `(process, grid) -> Solver`, a linear table with
    one state.   snr: > 0.   corrector_steps: Langevin steps a level, >= 1.   by_norm: whether norms set the step.
    Returns: `corrector_steps` more evaluations for every step that ends with noise.
    Raises: ValueError: bad grid, snr or corrector_steps not positive, a predictor that is not such a table.

    Example:
        >>> from diffjax import processes, solvers, times
        >>> predictor_corrector(processes.vp(), times.uniform(10), solvers.ddim).evaluations
        19

    Reference: Song et al. 2021, arXiv:2011.13456, Section 4.2 and Appendix G.
    """
    check_corrector(snr, corrector_steps)
    k = table.nodes(process, grid, options=snr)
    solver = predictor(process, grid)
    r = solver.rows
    if not isinstance(r, table.Rows) or r.px.shape[1] != 1:
        raise ValueError(
            "predictor must build a linear table with one state register, such as ddim, reverse_diffusion or "
            f"euler_maruyama; got {type(r).__name__ if not isinstance(r, table.Rows) else f'{r.px.shape[1]} states'}"
        )
    xp = nu.namespace(r, k.grid, snr)
    a = (k.alpha_t / k.alpha_s) ** 2
    pull, push = -2 * a * snr**2 * k.sigma_s, 2 * k.alpha_t / k.alpha_s * snr * k.sigma_s
    corrector = table.build("predictor_corrector", k, t=k.s, u=(0.0, 1.0), qx=(1.0,), qn=pull, noise=push, keep=False)
    correct, accept, take = _order(table.ends_of_steps(solver), k, corrector_steps)
    both = [table.pad(s, s.evaluations, q=r.pd.shape[1], noise=max(table.draws(solver), 1)).rows
            for s in (solver, corrector)]  # fmt: skip
    rows = jax.tree.map(lambda p, c: xp.concatenate([p, c])[take], *both)
    rows = rows._replace(accept=accept)
    out = dataclasses.replace(solver, rows=rows)
    return dataclasses.replace(out, rows=CorrectedRows(rows, correct), step=step) if by_norm else out


def _order(accepted: np.ndarray, k: table.Nodes, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where m corrector rows follow an accepted row.   Returns: whether a row corrects, ends a step, and its source row."""
    noisy = np.asarray(k.sigma_s > 0) if k.xp is np else np.ones(k.t.shape[0], bool)
    correct, accept, take, step_index = [], [], [], 0
    for i, ends in enumerate(accepted):
        extra = m if ends and noisy[step_index] else 0
        correct += [False] + [True] * extra
        accept += [ends and not extra] + [j == extra - 1 for j in range(extra)]
        take += [i] + [len(accepted) + step_index] * extra
        step_index += int(ends)
    return np.array(correct), np.array(accept), np.array(take)


def step(noise: Noise, denoiser: Any, carry: Any, row: CorrectedRows) -> Any:
    """A row of the table, whose corrector rows are scaled per item by q = ||z|| / ||eps||."""
    z, d, model_state = table.value(noise, denoiser, carry, row.base)
    state = carry[0]
    ones = jnp.ones(nu.batch_size(d), jnp.result_type(*jax.tree.leaves(d)))
    q = jax.lax.cond(row.correct, lambda d: norm_ratio(noise.draw(d, 1), d), lambda d: ones, d)
    base = row.base._replace(qn=row.base.qn * q**2, noise=row.base.noise * q)
    return table.push(noise, state, base, z, d), model_state


def norm_ratio(z: PyTree, eps: PyTree) -> jax.Array:
    """`||z|| / ||eps||` of every item over all leaves, [B]; zero, no step, where eps is zero."""
    square = lambda x: sum((leaf**2).reshape(leaf.shape[0], -1).sum(axis=1) for leaf in jax.tree.leaves(x))
    above, below = square(z), square(eps)
    return nu.safe_sqrt(jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0))


CARDS = {
    "predictor_corrector": Card(
        predictor_corrector, "arXiv:2011.13456#Sec.4.2", "reverse diffusion corrected by norm-based Langevin steps",
        None, 2, noise=True, flags=("nonlinear",),
    ),
}  # fmt: skip
