"""Mean and covariance of a table's result on Gaussian data, where every row is linear; NumPy, float64, one dimension."""

import numpy as np


def run(solver, process, mean, variance, start):
    """`(mean, variance)` of the last state of a table, from a start with these two, for data N(mean, variance)."""
    r = solver.rows
    p, q = r.px.shape[1], r.qd.shape[1]
    m = np.concatenate([np.full(p, start[0]), np.zeros(q)])
    c = np.zeros((p + q, p + q))
    c[:p, :p] = start[1]
    for i, (alpha, sigma) in enumerate(zip(process.alpha(r.t), process.sigma(r.t), strict=True)):
        spread = alpha**2 * variance + sigma**2
        slope = r.u[i] @ [alpha * variance / spread, sigma / spread]  # d = slope y + shift
        shift = r.u[i] @ [sigma**2 * mean / spread, -sigma * alpha * mean / spread]
        pz, qz, noise = (0.0 if a is None else a[i] for a in (r.pz, r.qz, r.noise))
        d = slope * np.concatenate([r.px[i], r.pd[i]])
        move, draw, constant = np.zeros((p + q, p + q)), np.zeros((p + q, 2)), np.zeros(p + q)
        move[0] = np.concatenate([r.qx[i], r.qd[i]]) + r.qn[i] * d
        draw[0], constant[0] = [qz + r.qn[i] * slope * pz, noise], r.qn[i] * shift
        move[1:p, : p - 1] = np.eye(p - 1)
        if q and r.keep[i]:
            move[p], draw[p, 0], constant[p] = d, slope * pz, shift
            move[p + 1 :, p : p + q - 1] = np.eye(q - 1)
        elif q:
            move[p:, p:] = np.eye(q)
        m, c = move @ m + constant, move @ c @ move.T + draw @ draw.T
    return np.array([m[0], c[0, 0]])


def exact(process, mean, variance, start, t, s, eta):
    """The same for the SDE dx = [f x - (1 + eta) / 2 g^2 score] dt + sqrt(eta) g dW, from time t to s."""
    (a, r), (b, q) = ((float(process.alpha(u)), float(process.sigma(u) / process.alpha(u))) for u in (t, s))
    shrink = (variance + q**2) / (variance + r**2)  # from d(mean) / dr = (1 + eta) r / (variance + r^2) (mean - mean_0)
    off = start[0] / a - mean, start[1] / a**2 - variance - r**2
    return np.array([b * (mean + off[0] * shrink ** ((1 + eta) / 2)),
                     b**2 * (variance + q**2 + off[1] * shrink ** (1 + eta))])  # fmt: skip


def errors(build, process, grid, steps, eta):
    """Errors of mean and variance [len(steps), 2], from a start that is not the marginal; `grid(n)` between interior times."""
    mean, variance = 0.7, 0.5
    t, s = grid(1)
    start = (
        float(process.alpha(t)) * mean + 0.8,
        1.6 * float(process.alpha(t) ** 2 * variance + process.sigma(t) ** 2),
    )
    truth = exact(process, mean, variance, start, t, s, eta)
    return np.array([np.abs(run(build(process, grid(n)), process, mean, variance, start) - truth) for n in steps])
