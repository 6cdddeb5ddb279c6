"""Exactly reversible solvers: coupled or two-step tables whose run from data to noise undoes the run from noise to data.

The `inverse=True` of `ddim`, `dpmpp` and the other tables is another thing: the method on the reversed grid, which evaluates
the network at other states and so returns to the start only up to the method's own error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffjax import numerics as nu
from diffjax.solvers import table
from diffjax.solvers.adams import EPS, V, Value
from diffjax.solvers.dense import Copies, DenseRows, check_algebra, check_reversible, first, invert, step
from diffjax.types import Card, Process, Solver


def _build(name: str, process: Process, k: table.Nodes, rows: DenseRows, inverse: bool = False) -> Solver:
    """The solver of dense rows, checked where they are concrete; `inverse` says that they run from data to noise."""
    solver = Solver(rows=rows, grid=k.grid, init=Copies(rows.p.shape[1]), step=step, read=first)
    if k.xp is np:
        for field, leaf in zip(rows._fields, rows, strict=True):
            if not np.all(np.isfinite(leaf)):
                bad = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))[0]
                raise ValueError(
                    f"{name} has a coefficient that is not finite ({field}) at t = {rows.t[bad]:.6g}: alpha or sigma is zero "
                    "there. Use a grid that stays off that end (start= or stop= of times.*), or o_belm(value=V), which "
                    "is finite at both"
                )
        check_algebra(solver)
        if inverse:  # this run undoes another, and has its errors
            check_reversible(process, invert(solver))
    return solver


def edict(process: Process, grid: Any, mixing: Any = 0.93, *, inverse: bool = False) -> Solver:
    """Two coupled copies x, y, each stepped by DDIM with the noise predicted at the other, then drawn together.

    x' = a x + b eps(y, t),  y' = a y + b eps(x', t),   x_s = p x' + (1 - p) y',  y_s = p y' + (1 - p) x_s
    a = alpha_s / alpha_t,  b = sigma_s - a sigma_t; x and y change roles every step

    A step that begins at alpha = 0 uses x0 in place of eps. Undoing N steps amplifies errors by about p^{-2N}.

    Args: process: Gaussian.   grid: [n + 1].   mixing: p in (0, 1].   inverse: the grid increases; the exact inverse of the
    run on the reversed grid, both copies starting from the data.
    Returns: a reversible table of 2n rows, two registers.
    Raises: ValueError: bad grid or mixing, with inverse=True an amplification that leaves no digits.

    Example:
        >>> from diffjax import processes, times
        >>> edict(processes.vp(), times.uniform(50)).evaluations
        100

    Reference: Wallace et al. 2023, arXiv:2211.12446.
    """
    if nu.namespace(mixing) is np and not 0 < float(mixing) <= 1:
        raise ValueError(f"mixing must be in (0, 1], 1 never mixes the two copies; got {mixing}")
    if inverse:
        k = table.nodes(process, grid, True, mixing)
        solver = edict(process, k.grid[::-1], mixing)
        check_reversible(process, solver)
        return invert(solver)
    k = table.nodes(process, grid, options=mixing)
    xp, n = k.xp, k.t.shape[0]
    a, u = _first_order(k)
    b = u[:, 0] * k.alpha_s + u[:, 1] * k.sigma_s - a * (u[:, 0] * k.alpha_t + u[:, 1] * k.sigma_t)
    p, one, zero = xp.broadcast_to(xp.asarray(mixing, a.dtype), (n,)), xp.ones_like(a), xp.zeros_like(a)
    matrix = lambda *entries: xp.stack(entries, axis=1).reshape(n, 2, 2)
    # for the copy that goes first (leader) and the other (follower)
    lead = matrix(a, zero, zero, one)
    mix = matrix(p, 1 - p, (1 - p) * p, p + (1 - p) ** 2)
    follow = mix @ matrix(one, zero, zero, a)
    swap = np.arange(n) % 2 == 1
    turned = lambda m: xp.where(nu.expand(swap, m), xp.flip(m, axis=tuple(range(1, m.ndim))), m)
    both = lambda first, second: table.interleave(xp, turned(first), turned(second))
    rows = DenseRows(
        t=table.interleave(xp, k.t, k.t),
        p=both(xp.stack([zero, one], 1), xp.stack([one, zero], 1)),
        u=table.interleave(xp, u, u),
        a=both(lead, follow),
        b=both(xp.stack([b, zero], 1), xp.stack([(1 - p) * b, (p + (1 - p) ** 2) * b], 1)),
        accept=np.arange(2 * n) % 2 == 1,
    )
    return _build("edict", process, k, rows)


def _first_order(k: table.Nodes) -> tuple[Any, Any]:
    """`(a, u)` of a DDIM step `a x + b d`: the value d is eps, or x0 where alpha_t = 0.   [n], [n, 2]"""
    xp = k.xp
    noise = ~(k.alpha_t > 0)
    a = xp.where(noise, k.sigma_s / xp.where(noise, k.sigma_t, 1.0), k.alpha_s / xp.where(noise, 1.0, k.alpha_t))
    one, zero = xp.ones_like(a), xp.zeros_like(a)
    return a, xp.stack([xp.where(noise, one, zero), xp.where(noise, zero, one)], axis=1)


def _two_step(name: str, process: Process, k: table.Nodes, parts: tuple, start: tuple, inverse: bool) -> Solver:
    """Rows `x_{i+1} = q0 x_i + q1 x_{i-1} + c d(x_i)` on the registers (x_i, x_{i-1}); the first row is `(a, b, u)` of one step."""
    xp = k.xp
    q0, q1, c, u = parts
    (a0, b0, u0), one, zero = start, xp.ones_like(c), xp.zeros_like(c)
    begins = np.arange(c.shape[0]) == 0
    # both registers hold the start: weigh the older one, so that this row can be undone too
    q0, q1, c = xp.where(begins, zero, q0), xp.where(begins, a0, q1), xp.where(begins, b0, c)
    rows = DenseRows(
        t=k.t,
        p=xp.stack([one, zero], 1),
        u=xp.where(begins[:, None], u0, u),
        a=xp.stack([xp.stack([q0, q1], 1), xp.stack([one, zero], 1)], axis=1),
        b=xp.stack([c, zero], 1),
        accept=np.ones(c.shape[0], bool),
    )
    return _build(name, process, k, rows, inverse)


def bdia(process: Process, grid: Any, gamma: Any = 1.0, *, inverse: bool = False) -> Solver:
    """Bi-directional integration: a DDIM step forward, corrected by the DDIM step back from the same prediction.

    x_{i+1} = gamma x_{i-1} + (1 - gamma) x_i - gamma D(t_i -> t_{i-1}) + D(t_i -> t_{i+1}),  D the change by DDIM from x_i

    gamma = 1 is symmetric in time and second order on smooth grids, gamma < 1 is first order and is undone with an
    amplification of gamma^{-N}; gamma = 0 would be DDIM, which cannot be undone.

    Args: process: Gaussian.   grid: [n + 1].   gamma: in (0, 1].   inverse: the grid increases; the rows after the first are
    the exact inverse of those of the run on the reversed grid.
    Returns: a reversible table of n rows, two registers.
    Raises: ValueError: bad grid or gamma, with inverse=True an amplification that leaves no digits.
    Reference: Zhang, Lewis and Kleijn 2024, arXiv:2307.10829.
    """
    if nu.namespace(gamma) is np and not 0 < float(gamma) <= 1:
        raise ValueError(f"gamma must be in (0, 1]; gamma = 0 is ddim, which cannot be undone; got {gamma}")
    k = table.nodes(process, grid, inverse, gamma)
    xp = k.xp
    gamma = 1 / gamma if inverse else gamma  # solved for x_{i-1}, the equation has its own form again
    alpha_b, sigma_b = table.past(k, k.alpha_t, 1, 1.0), table.past(k, k.sigma_t, 1, 0.0)
    alpha_t = xp.where(
        k.alpha_t > 0, k.alpha_t, 1.0
    )  # alpha = 0 is possible at the first step alone, which is replaced
    forth, back = k.alpha_s / alpha_t, alpha_b / alpha_t
    rise, fall = k.sigma_s - forth * k.sigma_t, sigma_b - back * k.sigma_t
    one, zero = xp.ones_like(rise), xp.zeros_like(rise)
    q0 = forth - gamma * back  # (1 - gamma) - gamma (back - 1) + (forth - 1)
    a, u = _first_order(k)
    b = u[:, 0] * k.alpha_s + u[:, 1] * k.sigma_s - a * (u[:, 0] * k.alpha_t + u[:, 1] * k.sigma_t)
    parts = q0, gamma * one, rise - gamma * fall, xp.stack([zero, one], 1)
    return _two_step("bdia", process, k, parts, (a, b, u), inverse)


def o_belm(process: Process, grid: Any, value: Value = EPS, *, inverse: bool = False) -> Solver:
    """The explicit two-step method of smallest local error that is explicit in both directions: variable-step leapfrog.

    With x = c w and dw/dtau = d (c = alpha, tau = sigma / alpha, d = eps):
    w_{i+1} = (h / h')^2 w_{i-1} + (1 - (h / h')^2) w_i + h (h + h') / h' d(x_i),   h = tau_{i+1} - tau_i,  h' = tau_i - tau_{i-1}

    The first step is one of first order. `value=V` (c = sqrt(alpha^2 + sigma^2), tau = the angle atan(sigma / alpha)) is
    finite at both ends, and on a grid of equal angles h = h' it amplifies nothing: the choice for gradients through many
    steps. Steps that vary amplify errors when undone by the ratio (h / h')^2 of every step.

    Args: process: Gaussian; with `EPS` alpha > 0 on the grid.   grid: [n + 1].   value: `EPS` or `V`.   inverse: the grid
    increases; the rows after the first are the exact inverse of those of the run on the reversed grid.
    Returns: a reversible table of n rows, two registers.
    Raises: ValueError: bad grid, another value, alpha = 0 with `EPS`, with inverse=True an amplification that leaves no digits.

    Example:
        >>> from diffjax import processes, times
        >>> from diffjax.solvers.dense import amplification
        >>> amplification(processes.cosine(), o_belm(processes.cosine(), times.uniform(1000), V)) < 4
        True

    Reference: Wang et al. 2024, arXiv:2410.07273.
    """
    if value not in (EPS, V):
        raise ValueError(f"value must be EPS or V; got {getattr(value, 'name', value)!r}")
    k = table.nodes(process, grid, inverse)
    xp = k.xp
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = lambda alpha, sigma: sigma / alpha if value is EPS else xp.arctan2(sigma, alpha)
        unit = lambda alpha, sigma: alpha if value is EPS else (alpha**2 + sigma**2) ** 0.5
        scale_t, scale_s = unit(k.alpha_t, k.sigma_t), unit(k.alpha_s, k.sigma_s)
        scale_b = table.past(k, scale_t, 1, 1.0)
        h = tau(k.alpha_s, k.sigma_s) - tau(k.alpha_t, k.sigma_t)
        before = table.past(k, h, 1, 1.0)
        ratio = (h / before) ** 2
        carry = value.carry(k)
        parts = (
            carry * (1 - ratio), scale_s / scale_b * ratio, scale_s * h * (h + before) / before,
            xp.stack(value.read(xp, k.alpha_t, k.sigma_t), 1),
        )  # fmt: skip
        start = carry, scale_s * h, parts[3]
    return _two_step("o_belm", process, k, parts, start, inverse)


CARDS = {
    "edict": Card(edict, "arXiv:2211.12446", "coupled DDIM pair, exactly reversible", 1, 2, flags=("nonlinear",)),
    "bdia": Card(bdia, "arXiv:2307.10829", "DDIM forward and back, exactly reversible", 2, 1, flags=("nonlinear",)),
    "o_belm": Card(o_belm, "arXiv:2410.07273", "leapfrog in sigma / alpha, exactly reversible", 2, 1, flags=("nonlinear",)),
    "o_belm_v": Card(
        table.options(o_belm, value=V), "arXiv:2410.07273", "leapfrog in the angle, exactly reversible", 2, 1, flags=("nonlinear",)
    ),
}  # fmt: skip
