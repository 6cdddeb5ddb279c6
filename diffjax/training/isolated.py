"""Many runs that know nothing of each other, in one program: every device trains its own, and nothing is communicated.

The usual way to train experts in isolation is one run each, with `fit` on its own data set, key and checkpoints. This is
the same computation for small experts and for one machine with several devices: the states stand side by side along a
leading axis that is cut over the devices, the runs of one device follow one another, and each computes what it would alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.numerics import PyTree
from diffjax.training import devices as devices_
from diffjax.training.state import TrainState

AXIS = "run"


@dataclasses.dataclass(frozen=True)
class Isolated:
    """A training step for many runs at once. `step` donates its state: the one passed in may not be used again."""

    runs: int
    per_dispatch: int
    mesh: Mesh
    call: Callable[[TrainState, PyTree, Any], tuple[TrainState, dict]]

    def place(self, states: Sequence[TrainState]) -> TrainState:
        """A copy of the states side by side, every leaf [runs, ...], each run on its device.

        Raises: ValueError: another number of states, or states of different shapes.
        """
        outlines = {str(jax.tree.map(lambda a: (a.shape, a.dtype), s)) for s in states}
        if len(states) != self.runs or len(outlines) != 1:
            raise ValueError(
                f"place takes {self.runs} states of one architecture; got {len(states)} of {len(outlines)} different shapes"
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jax.device_put(stacked, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def put(self, batches: Sequence[Sequence[Mapping[str, Any]]]) -> PyTree:
        """Batches of up to `per_dispatch` steps, each a list with one batch per run, as leaves [K, runs, B, ...]."""
        if not 1 <= len(batches) <= self.per_dispatch:
            raise ValueError(f"batches must hold 1 to {self.per_dispatch} steps (per_dispatch); got {len(batches)}")
        if any(len(step) != self.runs for step in batches):
            raise ValueError(f"every step needs {self.runs} batches, one per run; got {[len(b) for b in batches]}")
        padded = [*batches, *[batches[-1]] * (self.per_dispatch - len(batches))]
        side = [jax.tree.map(lambda *a: np.stack(a), *map(dict, step)) for step in padded]
        stacked = jax.tree.map(lambda *a: np.stack(a), *side)
        return jax.device_put(stacked, NamedSharding(self.mesh, PartitionSpec(None, AXIS)))

    def step(
        self, state: TrainState, batches: Sequence[Sequence[Mapping[str, Any]]]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run `len(batches) <= per_dispatch` steps of every run; the state is donated.

        Returns: the state and metrics [runs, per_dispatch], of which the first `len(batches)` are real.
        Raises: ValueError: too many steps, or another number of batches than runs.
        """
        return self.call(state, self.put(batches), np.int32(len(batches)))

    def lower(self, state: TrainState, batches: Sequence[Mapping[str, Any]]) -> Any:
        """The lowered program, to see that it has no collectives."""
        return self.call.lower(state, self.put([batches] * self.per_dispatch), np.int32(1))

    def split(self, state: TrainState) -> list[TrainState]:
        """The states of the runs, as they would be alone."""
        return [jax.tree.map(lambda a, k=k: a[k], state) for k in range(self.runs)]


def isolated(
    train_step: Callable[..., tuple[TrainState, dict]],
    runs: int,
    *,
    devices: Sequence[Any] | None = None,
    per_dispatch: int = 1,
) -> Isolated:
    """`runs` independent training runs over devices, without any collective.

    Args: train_step: from `make_train_step`, the same for all; keys, parameters and data are each run's own.   runs: a
    multiple of the devices.   devices: default as many as divide the runs.   per_dispatch: most steps per call.
    Raises: ValueError: runs that the devices do not divide.
    Reference: arXiv:2501.05450.

    Example:
        >>> isolated(lambda state, batch: (state, {}), 4, devices=jax.devices()[:1]).runs
        4
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1; got {runs}")
    if devices is None:
        found = jax.devices()
        devices = found[: max(n for n in range(1, len(found) + 1) if runs % n == 0)]
    if runs % len(devices):
        raise ValueError(f"{runs} runs cannot be shared equally by {len(devices)} devices; use a multiple or fewer")
    mesh = Mesh(np.array(devices), (AXIS,))

    def local(state: TrainState, batches: PyTree, n: Any) -> tuple[TrainState, dict]:
        """The runs of one device, one after the other: stacked matrix products would round otherwise."""
        own = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), batches)
        return jax.lax.map(lambda run: devices_._many(train_step, per_dispatch, *run, n), (state, own))

    body = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(AXIS), PartitionSpec(None, AXIS), PartitionSpec()),
        out_specs=PartitionSpec(AXIS), check_vma=False,
    )  # fmt: skip
    return Isolated(runs, per_dispatch, mesh, jax.jit(body, donate_argnums=0))


def fit_isolated(
    states: Sequence[TrainState],
    train_step: Callable[..., tuple[TrainState, dict]],
    batches: Sequence[Iterator[Mapping[str, Any]]],
    *,
    steps: int,
    devices: Sequence[Any] | None = None,
    per_dispatch: int = 16,
) -> tuple[list[TrainState], list[dict[str, np.ndarray]]]:
    """Train every state for `steps` steps on its own batches; for checkpoints and resuming, run `fit` once per state.

    Args: states: from `init_state`, of one architecture, each with its own key.   batches: one iterator per state.
    Returns: the states, and the metrics of each run, leaves [steps].
    Raises: ValueError: steps < 1, another number of iterators than states, and what `isolated` raises.
    """
    if steps < 1 or len(batches) != len(states):
        raise ValueError(
            f"steps must be at least 1 and every state needs an iterator; got {steps} steps, {len(states)} states and "
            f"{len(batches)} iterators"
        )
    program = isolated(train_step, len(states), devices=devices, per_dispatch=min(per_dispatch, steps))
    state, kept, done = program.place(states), [], 0
    while done < steps:
        n = min(program.per_dispatch, steps - done)
        state, metrics = program.step(state, [[next(source) for source in batches] for _ in range(n)])
        kept.append((metrics, n))
        done += n
    kept = [jax.tree.map(lambda m, n=n: np.asarray(m)[:, :n], metrics) for metrics, n in kept]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept)
    return program.split(state), [jax.tree.map(lambda m, k=k: m[k], whole) for k in range(len(states))]
