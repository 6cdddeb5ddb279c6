"""Endless shuffled batches, the same for every number of hosts, resumable to the exact item; built on Grain."""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diffjax.data.dataset import DataError, Dataset, permutation

STATE_FORMAT = 1
LONGEST = 2**62  # the length that Grain is told: the stream has no end
READ_THREADS = 4  # batches that are decoded at a time where items are read from files


class Order:
    """The endless order of a split: a fresh permutation for every epoch, cut into global batches, cut by host.

    Batch `n` is places [n B, (n + 1) B) of the stream, so that batches are always full and may straddle two epochs;
    host `h` of `H` takes the h-th of H equal slices. The global batches do not depend on the number of hosts.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, process_index: int, process_count: int) -> None:
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.local = batch_size // process_count
        self.offset = process_index * self.local
        self.epoch = functools.lru_cache(maxsize=4)(lambda e: permutation((seed, e), len(indices)))

    def batch(self, n: int) -> np.ndarray:
        """The global indices of this host's part of batch `n`, [B / H]."""
        start = n * self.batch_size + self.offset
        epochs, places = np.divmod(np.arange(start, start + self.local), len(self.indices))
        parts = [self.epoch(int(e))[places[epochs == e]] for e in range(int(epochs[0]), int(epochs[-1]) + 1)]
        return self.indices[np.concatenate(parts)]


class _Elements:
    """What Grain indexes: element `i` holds `steps` batches from `first + i steps` on, as encoded arrays."""

    def __init__(self, dataset: Dataset, order: Order, steps: int, first: int, stack: bool) -> None:
        self.dataset, self.order, self.steps, self.first, self.stack = dataset, order, steps, first, stack

    def __len__(self) -> int:
        return LONGEST

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        batches = [self.order.batch(self.first + int(i) * self.steps + k) for k in range(self.steps)]
        indices = np.concatenate(batches)
        rows = self.dataset.rows(indices)
        out = rows | {"x": self.dataset.transform.encode(rows["x"]), "index": indices.astype(np.int32)}
        if not self.stack:
            return out
        return {k: v.reshape(self.steps, -1, *v.shape[1:]) for k, v in out.items()}


class Batches(Iterator[dict[str, Any]]):
    """An endless iterator of batches with a position; made by `batches`. Close it, or use it in `with`."""

    def __init__(
        self, dataset: Dataset, split: str, order: Order, steps: int | None, start: int, prefetch: int, put: Any
    ):
        self._dataset, self._order, self._steps, self._put = dataset, order, steps, put
        self._prefetch = prefetch
        self._identity = {
            "dataset": dataset.name,
            "split": split,
            "seed": order.seed,
            "batch_size": order.batch_size,
            "items": len(order.indices),
            "checksum": zlib.crc32(np.ascontiguousarray(order.indices, np.int64).tobytes()),
        }
        self._open(start)

    def __next__(self) -> dict[str, Any]:
        if not self._grain:
            raise ValueError("this iterator of batches is closed; make a new one with batches(..., start=)")
        return next(self._grain[0])

    @property
    def batches_done(self) -> int:
        """How many batches were handed out since the beginning of training, those of earlier runs included."""
        if not self._grain:
            return self._done
        return self._first + self._grain[0].get_state()["next_index"] * (self._steps or 1)

    @property
    def epoch(self) -> float:
        """How often the split was passed, as a fraction."""
        return self.batches_done * self._order.batch_size / len(self._order.indices)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: batches that were prefetched but not handed out do not count."""
        return {"format": STATE_FORMAT, "batches": self.batches_done, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out when `state` was taken.

        The number of hosts, prefetching and `steps_per_item` may differ.
        Raises: DataError: the state belongs to another data set, split, seed or batch size.
        """
        if state.get("format") != STATE_FORMAT:
            raise DataError(f"the position has format {state.get('format')!r}; this version reads {STATE_FORMAT}")
        for field, value in self._identity.items():
            if state.get(field) != value:
                raise DataError(
                    f"the saved position in the data cannot be used: its {field} is {state.get(field)!r}, here it is "
                    f"{value!r}"
                )
        self.close()
        self._open(int(state["batches"]))

    def close(self) -> None:
        """Stop the background thread and drop what it had prefetched."""
        if self._grain:
            self._done = self.batches_done
            self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, first: int) -> None:
        import grain

        self._first = first
        elements = _Elements(self._dataset, self._order, self._steps or 1, first, self._steps is not None)
        threads = READ_THREADS if self._dataset.source is not None and self._prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        stream = grain.MapDataset.source(elements).to_iter_dataset(options)
        if self._put is not None:
            stream = stream.map(self._put)
        stream = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=self._prefetch)
        self._grain = [iter(stream)]
        self._finalizer = weakref.finalize(self, _shut, self._grain)  # also runs at exit


def _shut(box: list[Any]) -> None:
    """Close Grain's iterator and drop it at once: its own clean-up at exit would find Grain's modules gone."""
    box[0].close()
    box.clear()


def batches(
    dataset: Dataset,
    split: str,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    steps_per_item: int | None = None,
    start: int = 0,
    prefetch: int = 2,
    device: jax.Device | jax.sharding.Sharding | Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Batches:
    """Endless batches of a split, reshuffled every epoch: `x` encoded, the other fields, and the global `index` [B].

    Args: batch_size: over all hosts; each of `process_count` gets its equal slice. Larger than the split is allowed:
        items repeat.   steps_per_item: K stacks K batches, [K, B, ...]; None gives [B, ...].   start: batches already
        done.   prefetch: elements made ahead by a background thread; 0 makes them when asked.   device: where arrays
        go: a device, a sharding of the global element (each host gives its part), or a function of the host's element;
        None keeps NumPy.
    Returns: an iterator with `get_state`, `set_state`, `close`; an error in the thread is raised by `next`.
    Raises: DataError: unknown or empty split, a batch size that hosts or devices do not divide, negative numbers.

    Example:
        >>> from diffjax import data
        >>> with batches(data.load("digits"), "train", 4, seed=0, prefetch=0) as stream:
        ...     batch = next(stream)
        >>> batch["x"].shape, batch["label"].dtype, stream.get_state()["batches"]
        ((4, 8, 8, 1), dtype('int32'), 1)
    """
    indices = dataset.split(split)
    counts = {"batch_size": batch_size, "process_count": process_count, "steps_per_item": steps_per_item or 1}
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1; got {value}")
    if steps_per_item == 0 or min(start, prefetch, seed) < 0:
        raise DataError(
            "steps_per_item must be at least 1, start, prefetch and seed at least 0; got "
            f"{steps_per_item}, {start}, {prefetch}, {seed}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index must be in [0, {process_count}); got {process_index}")
    if batch_size % process_count:
        low = max(1, batch_size // process_count) * process_count
        raise DataError(
            f"batch_size {batch_size} is not divisible by process_count {process_count}; use for example {low}"
        )
    order = Order(indices, batch_size, seed, process_index, process_count)
    put = _put(device, batch_size, process_count, steps_per_item)
    return Batches(dataset, split, order, steps_per_item, start, prefetch, put)


def _put(device: Any, batch_size: int, process_count: int, steps: int | None) -> Callable[..., Any] | None:
    """How an element of this host gets to `device`."""
    if device is None:
        return None
    if isinstance(device, jax.Device):
        return functools.partial(jax.device_put, device=device)
    if not isinstance(device, jax.sharding.Sharding):
        return device
    try:
        device.shard_shape((batch_size,) if steps is None else (steps, batch_size))
    except ValueError as error:
        count = len(device.device_set)
        raise DataError(
            f"batch_size {batch_size} cannot be laid out on {count} devices by {device}: {str(error).splitlines()[0]}"
        ) from None
    if process_count == 1:
        return functools.partial(jax.device_put, device=device)

    def place(element: dict[str, np.ndarray]) -> dict[str, Any]:
        return {k: jax.make_array_from_process_local_data(device, v) for k, v in element.items()}

    return place
