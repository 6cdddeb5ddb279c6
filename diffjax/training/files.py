"""How states become files and back: all that knows Orbax."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffjax.numerics import PyTree
from diffjax.training import partial

GOOD = "a_run_may_go_back_to_it"  # metric of a checkpoint, 1 or 0


def manager(
    folder: pathlib.Path, latest: int, n_best: int, best: str, before_rename: Callable[[], None], barriers: Any
) -> Any:
    """The Orbax manager of a folder.

    Args: latest, n_best: steps kept, of the newest and of the smallest `best`; beside them the newest with the metric `GOOD`.
        before_rename: called by process 0 when the files of a save are complete, before its folder gets its name.
        barriers: `(key=, timeout_ms=)` between processes, or None.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    _quiet()
    score = lambda metrics: (metrics or {}).get(best, float("inf"))
    # Orbax's own max_to_keep with best_fn deletes the newest step; and without best_fn it forgets the metrics.
    keep = [policies.LatestN(latest)]
    # The newest good one, beside those that signals left after it; of equal ones the last is kept.
    good = lambda metrics: (metrics or {}).get(GOOD, 0.0)
    keep.append(policies.BestN(n=1, get_metric_fn=good, keep_checkpoints_without_metrics=False))
    if n_best:
        best_n = {"n": n_best, "get_metric_fn": score, "reverse": True}  # reverse: smaller is better
        keep.append(policies.BestN(**best_n, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=score,
        best_mode="min",
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=before_rename, barrier_sync_fn=barriers),
    )
    return ocp.CheckpointManager(folder, options=options)


def start(manager: Any, step: int, state: PyTree, page: dict, numbers: dict[str, float]) -> None:
    """Begin to write a step: returns once the arrays are copied.   Raises: OSError: refused."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardSave(state), page=ocp.args.JsonSave(page))
    if not manager.save(step, args=args, metrics=numbers, force=True):
        raise OSError("the checkpoint library refused the step")


def read(folder: pathlib.Path, template: PyTree) -> PyTree:
    """A whole state. By the handler: the manager would clear the folder of a run that is being trained."""
    import orbax.checkpoint as ocp

    _quiet()
    return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(template))


def read_some(folder: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of a state with these paths, in the dtypes and shardings of `wanted`; the others are not read."""
    import orbax.checkpoint as ocp

    _quiet()
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree
    structure = jax.tree.structure(tree)
    targets = [wanted.get(name, ocp.PLACEHOLDER) for name, _ in partial.named(tree)]
    how = [
        ocp.ArrayRestoreArgs(sharding=a.sharding, dtype=a.dtype) if isinstance(a, jax.ShapeDtypeStruct)
        else ocp.RestoreArgs()
        for a in targets
    ]  # fmt: skip
    args = ocp.args.PyTreeRestore(item=structure.unflatten(targets), restore_args=structure.unflatten(how))
    return {name: a for name, a in partial.named(handler.restore(folder, args=args)) if name in wanted}


def target(a: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of an array, on the first device if it has none."""
    sharding = getattr(a, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _quiet() -> None:
    """Drop the tracebacks of failures which the store reports in one line: Orbax logs them, TensorStore prints them."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_no_tracebacks)
    if not getattr(sys.unraisablehook, "drops_late_news", False):
        sys.unraisablehook = _without_late_news(sys.unraisablehook)
    _uncounted()


def _uncounted() -> None:
    """Spare Orbax its question for the bytes that TensorStore has moved, which it logs alone.

    TensorStore (0.1.86) never frees an answer of `experimental_collect_matching_metrics`: 8 KB for each, two for a save.
    """
    with contextlib.suppress(ImportError):  # the place has no public name
        from orbax.checkpoint._src.serialization import tensorstore_utils

        if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
            tensorstore_utils.get_tensorstore_raw_bytes = lambda direction=None: 0


def _no_tracebacks(record: logging.LogRecord) -> bool:
    return not (record.exc_info and ("orbax" in record.pathname or "orbax" in record.getMessage()))


def _without_late_news(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook` without what TensorStore's threads print when a save has failed and nobody waits for its other arrays."""

    def filtered(news: Any) -> None:
        if not (isinstance(news.exc_value, RuntimeError) and str(news.exc_value) == "Event loop is closed"):
            hook(news)

    filtered.drops_late_news = True
    return filtered
