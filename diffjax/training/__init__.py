"""Training: a state, a pure step, the devices it runs on, and the loop around it.

`state = init_state(params, optimizer, key, emas=emas)`, then
`train_step = make_train_step(model, loss, optimizer, emas=emas)`, then
`fit(state, train_step, batches, steps=1000, store=CheckpointStore("run/checkpoints"))`.
"""

from diffjax.training import devices, dynamics, ema, layouts, optimizer, posthoc, snapshots
from diffjax.training.devices import Driver, steps_per_dispatch
from diffjax.training.ema import ema_update
from diffjax.training.isolated import Isolated, fit_isolated, isolated
from diffjax.training.layouts import Layout
from diffjax.training.loop import Diverged, FitResult, Hook, fit
from diffjax.training.manifest import CheckpointError
from diffjax.training.memory import OutOfMemory
from diffjax.training.optimizer import adamw
from diffjax.training.profile import Profile
from diffjax.training.reading import Part, Restored
from diffjax.training.state import TrainState, abstract, init_sharded, init_state
from diffjax.training.step import TrainStep, condition, make_train_step
from diffjax.training.store import CheckpointStore
from diffjax.training.trainable import join, only, split
from diffjax.training.watch import Watchdog
from diffjax.training.weights import Weights, export_safetensors, load_safetensors

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "Diverged",
    "Driver",
    "FitResult",
    "Hook",
    "Isolated",
    "Layout",
    "OutOfMemory",
    "Part",
    "Profile",
    "Restored",
    "TrainState",
    "TrainStep",
    "Watchdog",
    "Weights",
    "abstract",
    "adamw",
    "condition",
    "devices",
    "dynamics",
    "ema",
    "ema_update",
    "export_safetensors",
    "fit",
    "fit_isolated",
    "init_sharded",
    "init_state",
    "isolated",
    "join",
    "layouts",
    "load_safetensors",
    "make_train_step",
    "only",
    "optimizer",
    "posthoc",
    "snapshots",
    "split",
    "steps_per_dispatch",
]
