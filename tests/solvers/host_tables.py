"""A linear solver run in NumPy, row by row, from any row and any history: what tables are checked with, without compiling."""

import numpy as np

from diffjax import processes


def run(solver, model, x, first=0, past_x=(), past_d=(), noise=(), points=None):
    """The state after the last row, from row `first`; `model(y, t) -> (x0, eps)`; histories are newest first.

    noise: the normals, in the order in which rows draw them.   points: a list that gets every `(t, y)` of an evaluation.
    """
    r, noise = solver.rows, iter(noise)
    xs = [x, *past_x, *[x] * r.qx.shape[1]][: r.qx.shape[1]]
    ds = [*past_d, *[0 * x] * r.qd.shape[1]][: r.qd.shape[1]]
    dot = lambda c, registers: sum((a * b for a, b in zip(c, registers, strict=True)), 0 * x)
    for i in range(first, len(r.t)):
        shared = r.pz is not None and (r.pz[i] != 0 or r.qz[i] != 0)
        z = next(noise) if shared else 0 * x
        y = dot(r.px[i], xs) + dot(r.pd[i], ds) + (r.pz[i] * z if shared else 0)
        x0, eps = model(y, r.t[i])
        d = r.u[i, 0] * x0 + r.u[i, 1] * eps
        new = dot(r.qx[i], xs) + dot(r.qd[i], ds) + r.qn[i] * d + (r.qz[i] * z if shared else 0)
        if r.noise is not None and r.noise[i] != 0:
            new = new + r.noise[i] * next(noise)
        xs = [new, *xs[:-1]]
        if r.keep[i] and ds:
            ds = [d, *ds[:-1]]
        if points is not None:
            points.append((r.t[i], y))
    return xs[0]


def network(process):
    """A smooth nonlinear `(y, t) -> (x0, eps)` that keeps the pair's invariant."""

    def model(y, t):
        eps = np.sin(1.3 * y) + 0.3 * y * np.cos(2 * t)
        return (y - process.sigma(t) * eps) / process.alpha(t), eps

    return model


def gaussian(process, std=0.7, mean=0.4):
    """The exact pair of data N(mean, std^2), and its flow `(x, t, s) -> x_s`."""

    def model(y, t):
        a, s = process.alpha(t), process.sigma(t)
        z = (y - a * mean) / (a * a * std * std + s * s)
        return mean + a * std * std * z, s * z

    def flow(x, t, s):
        spread = lambda u: np.sqrt(process.alpha(u) ** 2 * std**2 + process.sigma(u) ** 2)
        return process.alpha(s) * mean + spread(s) / spread(t) * (x - process.alpha(t) * mean)

    return model, flow


def rho_grid(process, rho):
    """The times at which sigma / alpha takes the values `rho`."""
    return process.time_of_log_snr(-np.log(np.asarray(rho)))


def slope(errors):
    """log2 of the last ratio of errors at n and 2 n steps."""
    return np.log2(errors[-2] / errors[-1])


VP = processes.vp()
