"""What a run is: typed dataclasses that the command line reads and that a run folder keeps as readable JSON."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Annotated, Any, Literal

import tyro

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """The network."""

    network: Annotated[str, tyro.conf.arg(aliases=["--network"])] = "unet"
    """see `diffjax list networks`: unet, dit, ... or a published size such as dit-s/2"""
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE ...")] = ()
    """fields of the network, such as depth=6 qk_norm=True"""
    width: int | None = None
    """channels of the first level (unet; default 32), of the tokens (dit) or of the layers (mlp)"""
    multipliers: tuple[int, ...] | None = None
    """width of every level of the unet, in units of width (default 1 2)"""
    blocks: int | None = None
    """residual blocks a level (unet; default 1)"""
    attention: tuple[int, ...] | None = None
    """levels with self-attention (unet; default 1)"""
    depth: int | None = None
    """blocks (dit, mlp; default 4)"""
    heads: int | None = None
    """attention heads (dit; default 4)"""
    patch: int | None = None
    """side of a patch in pixels (dit; default 2)"""
    dropout: float = 0.0
    """share of the activations dropped while training"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the network's arithmetic; parameters, state and outputs stay float32"""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """what the backward pass recomputes: nothing, all but the blocks' inputs, all but dense layers, those kept by the host"""
    scan_layers: bool = False
    """one compiled block for all layers (dit, mlp)"""


@dataclasses.dataclass(frozen=True)
class Path:
    """The process from data to noise."""

    name: str = "edm"
    """see `diffjax list processes`"""
    sigma_min: float | None = None
    """least noise (edm, ve)"""
    sigma_max: float | None = None
    """most noise (edm, ve)"""
    beta_min: float | None = None
    """first rate (vp, subvp)"""
    beta_max: float | None = None
    """last rate (vp, subvp)"""
    shift: float | None = None
    """multiply the noise, as for higher resolutions"""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the network predicts and how its errors are weighed."""

    prediction: Literal["edm", "v", "x0", "eps", "velocity", "score"] = "edm"
    """edm is the preconditioned network of EDM for data of unit deviation"""
    law: str = "lognormal"
    """law of the training time, see `diffjax list laws`"""
    law_mean: float | None = None
    """of laws that have one; default that of the law"""
    law_std: float | None = None
    """of laws that have one; default that of the law"""
    weighting: str = "edm"
    """weight of the squared error of x0, see `diffjax list weights`"""
    coupling: Literal["independent", "assignment", "nearest"] = "independent"
    """how noise and data are paired"""
    label_drop: float = 0.1
    """share of the labels hidden while training, for guidance"""
    uncertainty: bool = False
    """divide the loss by its own learned size at every noise level"""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained beside the network of --init, which stays frozen. Options of that run are taken by --config."""

    kind: Annotated[
        Literal["none", "lora", "controlnet", "control_next", "skip_tuner"], tyro.conf.arg(aliases=["--adapter"])
    ] = "none"
    """none: the network itself is trained; lora: low-rank additions to its kernels; the others read a hint (unet)"""
    rank: Annotated[int, tyro.conf.arg(aliases=["--adapter-rank"])] = 8
    """of the additions (lora), of the bottlenecks (skip_tuner)"""
    targets: Annotated[str | None, tyro.conf.arg(aliases=["--adapter-targets"])] = None
    """regular expression of the kernels that change, such as attention/; default all (lora)"""
    hint: Annotated[
        Literal["edges", "blur", "low_resolution", "mask"] | None, tyro.conf.arg(aliases=["--adapter-hint"])
    ] = None
    """what is made of the pictures and told to the adapter (controlnet, control_next, skip_tuner)"""
    widths: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--adapter-widths"])] = (16, 32)
    """channels of the encoder of the hint"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the devices share model and batch; those left over by these three hold copies, which share the batch."""

    fsdp: int = 1
    """parts of every parameter, average and moment; they share the batch too"""
    model: int = 1
    """parts of the wide layers and the attention heads"""
    sequence: int = 1
    """parts of the sequence of patches (dit)"""


@dataclasses.dataclass(frozen=True)
class Training:
    """Optimisation."""

    steps: int = 10_000
    """updates of the parameters"""
    batch_size: int = 64
    """items of one update, over all devices"""
    learning_rate: float = 1e-3
    """the largest one of the schedule"""
    warmup: int = 200
    """steps of linear growth of the learning rate, at most a tenth of all"""
    decay: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "linear"
    """how the learning rate falls afterwards; linear over the last half"""
    b2: float = 0.99
    """decay of Adam's second moment"""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """type in which Adam's first moment is kept; parameters, averages and second moments stay float32"""
    weight_decay: float = 0.01
    """of matrices"""
    clip: float | None = 1.0
    """largest norm of the gradient"""
    ema: tuple[float, ...] = (0.999,)
    """decays of the averaged parameters; the first is used for sampling"""
    ema_power: tuple[float, ...] = ()
    """relative widths of averages that grow with the run, such as 0.05 0.1; `diffjax ema` makes any other from them"""
    snapshot_every: int | None = None
    """steps between snapshots of those averages; default a 64th of all steps"""
    snapshot_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the snapshots on disk"""
    augment: Literal["none", "flip", "affine"] = "none"
    """affine tells the network what was done, and samples without it"""
    accumulate: int = 1
    """parts of the batch, to save memory"""
    parallel: Literal["mesh", "pmap", "shard_map"] = "mesh"
    """how several devices share the work; the numbers are the same"""
    layout: Layout = dataclasses.field(default_factory=Layout)
    offload: bool = False
    """keep averages and moments in the memory of the host between calls (mesh)"""
    per_dispatch: int | None = None
    """steps for each call of the device; default by the size of the model"""
    save_every: int = 1000
    """steps between checkpoints"""
    sample_every: int = 1000
    """steps between pictures of samples"""
    log_every: int = 100
    """steps between lines of metrics.jsonl"""
    loss_bins: int = 0
    """bins of noise level, drawn equally often, whose loss is logged; 0 for none"""
    noise_scale: bool = False
    """log the noise scale of the gradient, the batch beyond which more items help little; needs accumulate >= 2"""
    magnitudes: bool = False
    """log root mean squares of weights, gradients and updates by layer, and of activations every sample_every steps"""
    max_skipped: int = 50
    """updates with NaN or infinity in a row that are too many"""
    on_bad: Literal["skip", "rewind", "stop"] = "skip"
    """stop then (skip), go back to the last good checkpoint and past these data (rewind), or stop at the first (stop)"""
    max_rewinds: int = 3
    """times to go back before the run is given up"""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How samples are drawn while training and for the scores."""

    solver: str = "recommended"
    """see `diffjax list solvers`"""
    steps: int = 25
    """steps of the solver"""
    grid: str = "auto"
    """see `diffjax list grids`; auto is the grid of recommended's rule, and karras for other solvers"""
    guidance: float = 1.0
    """weight of classifier-free guidance; 1 is the conditional model"""
    seeds: int = 4
    """sets of samples over which scores are averaged"""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes; by default what the environment says: `diffjax launch`, SLURM, a TPU pod."""

    coordinator: str | None = None
    """host:port at which process 0 listens; auto: JAX finds the other processes, as on TPU machines of Google's cloud"""
    processes: int | None = None
    """how many there are"""
    process: int | None = None
    """which one this is, from 0"""
    patience: float = 300.0
    """seconds to wait for the others at the start"""
    heartbeat: int = 15
    """seconds after which a silent process counts as lost"""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model; at the end print its scores and where the last grid of samples lies."""

    data: Annotated[str, tyro.conf.Positional] = "digits"
    """digits, photos, gaussians, moons, ..., arrays:FILE.npz, images:FOLDER, tfds:NAME (`diffjax list data`)"""
    run: str | None = None
    """run folder; default a new runs/DATA-N"""
    resume: str | None = None
    """run folder to continue; its options come from its config.json, only --training.steps may grow"""
    config: str | None = None
    """config.json (or run folder) to take the options from, for a new run"""
    init: str | None = None
    """weights of the network to begin with: RUN, RUN:ema_0.999, RUN:params or FILE.safetensors; all else begins afresh"""
    latent: str | None = None
    """diffuse the latents of an autoencoder: a preset such as kl4, trained first, or RUN or FILE.safetensors with one"""
    latent_steps: int = 1000
    """updates of that autoencoder"""
    seed: int = 0
    """of parameters, noise, order and splits of the data"""
    image_size: int | None = None
    """side of pictures in pixels (images:, tfds:)"""
    data_directory: str | None = None
    """where prepared tfds: sets lie"""
    on_error: Literal["stop", "skip"] = "stop"
    """at an unreadable item"""
    scores: bool = True
    """score samples at the end"""
    grace: float = 10.0
    """seconds after a signal in which data and pictures may end before they are left"""
    watchdog: float | None = None
    """seconds without a finished step after which RUN/hang-STEP.txt says why; 0 is never; default by the speed of the run"""
    abort_on_hang: bool = False
    """exit with code 75 then, so that a scheduler starts the run again"""
    peak_flops: float | None = None
    """floating-point operations a second of all devices together, to log the share that is used"""
    profile: int | None = None
    """trace that many steps into RUN/profile; without a number 5"""
    model: Model = dataclasses.field(default_factory=Model)
    process: Path = dataclasses.field(default_factory=Path)
    objective: Objective = dataclasses.field(default_factory=Objective)
    adapter: Adapter = dataclasses.field(default_factory=Adapter)
    training: Training = dataclasses.field(default_factory=Training)
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)


PLACES = ("run", "resume", "config", "hosts", "profile")  # where, not what: not kept in config.json
# may differ between a run and its continuation without a trace
FREE = ("scores", "grace", "watchdog", "abort_on_hang", "peak_flops")
OLDER = {("model.remat", True): "full", ("model.remat", False): "none"}  # values that earlier versions wrote
EXTENDABLE = (  # may differ, and config.json follows
    "training.steps",
    "training.accumulate",
    "training.parallel",
    "training.layout.fsdp",
    "training.layout.model",
    "training.layout.sequence",
    "training.offload",
    "training.on_bad",
    "training.max_skipped",
    "training.max_rewinds",
    "model.remat",
    "data_directory",
)

# The numbers of the digits job were measured: see "What the main job reaches" in the README.
DIGITS = Train(
    data="digits",
    model=Model("unet", width=16),
    process=Path("edm", sigma_min=0.02, sigma_max=40.0),
    objective=Objective(law_mean=-0.2, law_std=1.2),
    training=Training(steps=9500, learning_rate=3e-3, augment="affine", sample_every=1900, save_every=1900),
    sampler=Sampler(solver="dpmpp_2m", grid="karras"),
)
PLANE = Train(
    model=Model("mlp", width=128, depth=3),
    process=Path("edm", sigma_min=0.002, sigma_max=80.0),
    objective=Objective(law_mean=-0.6, law_std=1.4),
    training=Training(steps=5000, batch_size=256, sample_every=1000),
)
PICTURES = Train(
    model=Model("unet", width=64, multipliers=(1, 2, 2), attention=(2,)),
    objective=Objective(law_mean=-0.4, law_std=1.2),
    training=Training(steps=20_000, augment="flip"),
)


def preset(data: str) -> Train:
    """The defaults for a data set by name: measured ones for digits, one set each for points of the plane and pictures."""
    if data == "digits":
        return DIGITS
    base = PLANE if data in ("gaussians", "moons", "checkerboard", "swiss_roll", "pinwheel") else PICTURES
    if data.startswith("arrays:"):
        base = dataclasses.replace(base, training=dataclasses.replace(base.training, augment="none"))
    return dataclasses.replace(base, data=data)


def settle(given: Train, default: Train) -> Train:
    """The options read from the command line, without the preset's numbers for another network, process or law.

    `--process.name vp` must not inherit the sigmas of edm that the preset holds, nor `--network dit` the U-Net's width.
    """

    def fresh(chosen: Any, preset: Any, name: str, fields: tuple[str, ...]) -> Any:
        if getattr(chosen, name) == getattr(preset, name):
            return chosen
        return dataclasses.replace(chosen, **{f: None for f in fields if getattr(chosen, f) == getattr(preset, f)})

    if given.latent is not None and given.training.augment == default.training.augment:  # it moves pixels
        given = dataclasses.replace(given, training=dataclasses.replace(given.training, augment="none"))
    numbers = ("sigma_min", "sigma_max", "beta_min", "beta_max")
    sizes = ("width", "multipliers", "blocks", "attention", "depth", "heads", "patch")
    return dataclasses.replace(
        given,
        model=fresh(given.model, default.model, "network", sizes),
        process=fresh(given.process, default.process, "name", numbers),
        objective=fresh(given.objective, default.objective, "law", ("law_mean", "law_std")),
    )


def defaults(given: Train, default: Train) -> Train:
    """The preset for the network, process, law and latents of `given`, over which the command line is read again.

    So an option that was given counts also where it has the number of the preset for another network.
    """
    chosen = dataclasses.replace(
        default,
        latent=given.latent,
        model=dataclasses.replace(default.model, network=given.model.network),
        process=dataclasses.replace(default.process, name=given.process.name),
        objective=dataclasses.replace(default.objective, law=given.objective.law),
    )
    return dataclasses.replace(settle(chosen, default), latent=default.latent)


def to_json(config: Train) -> str:
    """A configuration as text, with its format version."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in PLACES}
    return json.dumps({"format": FORMAT, **fields}, indent=2) + "\n"


def from_json(text: str) -> Train:
    """The configuration that `to_json` wrote.

    Raises: ValueError: no JSON, a newer format, or fields that this version does not know.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"the configuration is damaged, it is not JSON: {e}") from None
    version = fields.pop("format", None) if isinstance(fields, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"the configuration is damaged: its format must be an integer; got {version!r}")
    if version > FORMAT:
        raise ValueError(f"the configuration has format {version}; this diffjax reads up to {FORMAT}. Upgrade diffjax")
    return _build(Train, fields, "")


def _build(cls: type, fields: dict[str, Any], where: str) -> Any:
    kinds = typing.get_type_hints(cls)
    unknown = sorted(set(fields) - set(kinds))
    if unknown:
        raise ValueError(
            f"the configuration has unknown fields {[where + u for u in unknown]}; known are {sorted(kinds)}"
        )
    made = {}
    for name, value in fields.items():
        kind = kinds[name]
        value = tuple(value) if isinstance(value, list) else value
        value = OLDER.get((where + name, value), value) if isinstance(value, bool) else value
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = _build(kind, value, f"{where}{name}.")
        elif not fits(value, kind):
            raise ValueError(
                f"{where}{name} must be {getattr(kind, '__name__', kind)}; the configuration has {value!r}"
            )
        made[name] = value
    return cls(**made)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from text is of an annotated type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, k) for k in typing.get_args(kind))
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def differences(old: Train, new: Train) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (old, new) where two configurations describe different runs."""
    found = {}

    def walk(a: Any, b: Any, where: str) -> None:
        for field in dataclasses.fields(a):
            name = where + field.name
            u, v = getattr(a, field.name), getattr(b, field.name)
            if name in PLACES + FREE:
                continue
            if dataclasses.is_dataclass(u):
                walk(u, v, f"{name}.")
            elif u != v:
                found[name] = (u, v)

    walk(old, new, "")
    return found
