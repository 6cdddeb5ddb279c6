"""Where a process stands among the others of its job, as environment variables tell it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

VARIABLES = ("DIFFJAX_COORDINATOR", "DIFFJAX_PROCESSES", "DIFFJAX_PROCESS")  # what `diffjax launch` sets
AUTO = "auto"  # as coordinator: JAX finds all by itself, also where no variable tells, as on TPU machines of Google's cloud
DEVICES = "DIFFJAX_DEVICES"  # optional: devices of this machine for this process, such as 0,1
TORCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")  # what most launchers of other libraries set
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The place of a process in a job.   None: JAX finds the value by itself, as on TPU pods and under Open MPI.

    Args: coordinator: "host:port", where process 0 listens.   processes: how many there are.   process: which one this is.
        devices: ids of the GPUs of this machine that it uses, default all.   source: where the values came from.
    Raises: ValueError: a coordinator without port, or a process that is not in [0, processes).
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None
    source: str = "arguments"

    def __post_init__(self) -> None:
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator must be host:port, as 10.0.0.1:1234; got {self.coordinator!r}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1; got {self.processes}")
        if self.process is not None and not 0 <= self.process < (self.processes or self.process + 1):
            raise ValueError(f"process must be in [0, {self.processes}); got {self.process}")


def detect(environ: Mapping[str, str]) -> Settings | None:
    """The place of a process by its environment variables, or None where they tell of no other process.

    Looked for in this order: DIFFJAX_COORDINATOR, DIFFJAX_PROCESSES and DIFFJAX_PROCESS (`diffjax launch` sets them; the first
    may be "auto", alone: JAX finds all by itself, which TPU machines of Google's cloud need, where no variable tells);
    MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK; a job step of SLURM (`srun`); Open MPI; a TPU pod.

    Raises: ValueError: some but not all of the first three, or a value that is not a number.

    Example:
        >>> detect({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[03-04]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
        ...         "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"})
        Settings(coordinator='n03:61447', processes=2, process=1, devices=None, source='SLURM')
    """
    ids = environ.get(DEVICES)
    devices = tuple(_number(DEVICES, i) for i in ids.split(",")) if ids else None
    if environ.get(VARIABLES[0]) == AUTO:
        return Settings(devices=devices, source="JAX")
    given = [name for name in VARIABLES if environ.get(name)]
    if given:
        missing = [name for name in VARIABLES if name not in given]
        if missing:
            raise ValueError(f"{', '.join(given)} is set, but not {' and '.join(missing)}; set all three, or none")
        where, *counts = (environ[name] for name in VARIABLES)
        processes, process = map(_number, VARIABLES[1:], counts)
        return Settings(where, processes, process, devices, "DIFFJAX variables")
    if all(environ.get(name) for name in TORCH):
        processes, process = (_number(name, environ[name]) for name in TORCH[2:])
        if devices is None and environ.get("LOCAL_RANK") and environ.get("LOCAL_WORLD_SIZE") != "1":
            devices = _own_gpu(environ, _number("LOCAL_RANK", environ["LOCAL_RANK"]))
        where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        return Settings(where, processes, process, devices, "MASTER_ADDR")
    # Without a step, as in the script of sbatch or an interactive shell, there are tasks to come but no other process.
    if all(environ.get(name) for name in SLURM) and "SLURM_PTY_PORT" not in environ:
        return _slurm(environ, devices)
    if all(environ.get(name) for name in OPEN_MPI):
        processes, process = (_number(name, environ[name]) for name in OPEN_MPI[1:])
        return Settings(None, processes, process, devices, "Open MPI")
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if len(workers.split(",")) > 1 or _number("MEGASCALE_NUM_SLICES", environ.get("MEGASCALE_NUM_SLICES") or "1") > 1:
        return Settings(devices=devices, source="TPU")
    return None


def _slurm(environ: Mapping[str, str], devices: tuple[int, ...] | None) -> Settings:
    """One process for each task; process 0 runs on the first node of the step, at a port that the job's number gives."""
    job, nodes = _number("SLURM_JOB_ID", environ["SLURM_JOB_ID"]), environ["SLURM_STEP_NODELIST"]
    processes, process, local = (_number(name, environ[name]) for name in SLURM[2:])
    step = environ.get("SLURM_STEP_ID", "0")
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + (job + (int(step) if step.isdecimal() else 0)) % 4096
    first = re.match(r"([^,\[]*)(?:\[([^\],-]*))?", nodes)  # 'a', 'a,b', 'a[01-04],b' or 'a[1,7-9]'
    on_each_node_one = environ.get("SLURM_STEP_NUM_NODES") == environ["SLURM_NTASKS"]
    devices = devices or (None if on_each_node_one else _own_gpu(environ, local))
    return Settings(f"{first[1]}{first[2] or ''}:{port}", processes, process, devices, "SLURM")


def _own_gpu(environ: Mapping[str, str], local: int) -> tuple[int, ...] | None:
    """One GPU for each process of a machine, unless the scheduler shows each process its own alone."""
    visible = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    return (local,) if visible is None or len(visible.split(",")) > 1 else None


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number; got {text!r}") from None
