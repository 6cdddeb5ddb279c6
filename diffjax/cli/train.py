"""`diffjax train`: the main job."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from diffjax import data as data_
from diffjax import latent, networks, training
from diffjax.cli import build, check, config, console, evaluate, hooks, latents, launch, plan, plot
from diffjax.cli import model as models
from diffjax.cli import run as runs
from diffjax.cli.hooks import kept
from diffjax.training import CheckpointStore, devices, flops, hosts
from diffjax.training import plan as plans


def resolve(args: config.Train) -> tuple[config.Train, pathlib.Path, bool]:
    """The configuration, the folder, and whether a run is continued; the same on every process.

    Raises: ValueError: a folder that holds another run, or options that differ from those of the run to continue or from
        those of process 0.
    """
    where, theirs = hosts.first(
        lambda: [args.resume or str(runs.new_folder(args.run, args.data)), config.to_json(args)]
    )
    others = config.differences(config.from_json(theirs), args)
    wrong = [f"process {jax.process_index()} has {k} {b!r} instead of {a!r}" for k, (a, b) in others.items()]
    if wrong := sum(hosts.share(wrong), []):
        raise ValueError(f"all processes must be started with the options of process 0, but {', '.join(wrong)}")
    if args.resume is None:
        return args, pathlib.Path(where), False
    folder = pathlib.Path(args.resume)
    for name in ("run", "config"):
        if getattr(args, name) is not None:
            raise ValueError(f"--resume continues {folder}, and takes no --{name}; leave one of them out")
    stored, _ = runs.read(folder)
    changed = {k: v for k, v in config.differences(stored, args).items() if k not in config.EXTENDABLE}
    if changed:
        lines = ", ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in changed.items())
        raise ValueError(
            f"{folder} is a run with another configuration: {lines}. Leave these options out, or start a new run "
            f"with --run; --init {folder} begins it with these weights"
        )
    reached = runs.check_steps(folder)[-1]
    if args.training.steps < reached:
        raise ValueError(
            f"{folder} has reached step {reached} already; --training.steps must not be below; got {args.training.steps}"
        )
    return args, folder, True


def write_settings(settings: config.Train, folder: pathlib.Path, store: CheckpointStore) -> None:
    """Keep what changed when a run is continued; only if there is a state to continue from."""
    stored = runs.read_config(folder)
    if config.differences(stored, settings) and any(store.check(s) is None for s in store.steps()[::-1]):
        free = {name: getattr(stored, name) for name in config.FREE}
        old, new = stored.training.steps, settings.training.steps
        if old != new:
            console.note(f"steps go from {old} to {new}; the schedule of the learning rate is now that of {new} steps")
        runs.write_text(folder / "config.json", config.to_json(dataclasses.replace(settings, **free)))


def write_first(settings: config.Train, folder: pathlib.Path, about: str, fill: Any = None) -> None:
    """Make a run folder.   Raises: ValueError: a process that does not see it."""
    hosts.first(lambda: runs.start(folder, {"model.json": about, "config.json": config.to_json(settings)}, fill))
    blind = [i for i, seen in enumerate(hosts.share((folder / "config.json").is_file())) if not seen]
    if blind:
        raise ValueError(
            f"{folder} is not seen by the processes {blind}; --run must lie on a disk that all of them share"
        )


def peak_of(settings: config.Train) -> float | None:
    """Operations of the devices in a second, as given or where they are known."""
    peaks = [flops.peak(d) for d in jax.devices()]
    return settings.peak_flops or (None if None in peaks else sum(peaks))


def less_memory(settings: config.Train, shape: tuple[int, ...], classes: int | None) -> str:
    """What a step of the run needs by plan, and the options that take less."""
    t, count = settings.training, jax.device_count()
    known = flops.device(jax.devices()[0])
    planned = plans.advice(plan.of(settings, shape, classes, count, known and known[1]))
    ways = [f"--training.batch-size {max(t.batch_size // 2, count)}"] if t.batch_size > count else []
    if t.batch_size // count >= 2 * t.accumulate:
        ways.append(f"--training.accumulate {2 * t.accumulate} (the same result)")
    if settings.model.remat == "none":
        ways.append("--model.remat full (slower, the same result)")
    if settings.model.dtype == "float32":
        ways.append("--model.dtype bfloat16")
    if count > 1 and t.layout.fsdp == 1:
        ways.append(f"--training.layout.fsdp {count} (the same result)")
    return f"plan: {planned}\n  options that take less: {', '.join([*ways, 'more devices'])}"


def watchdog(settings: config.Train, folder: pathlib.Path) -> training.Watchdog | None:
    """The watchdog of a run; none for 0 seconds."""
    if settings.watchdog == 0:
        return None
    return training.Watchdog(settings.watchdog, folder, settings.abort_on_hang)


def profile(settings: config.Train, folder: pathlib.Path) -> training.Profile | None:
    """Which steps are traced, and where: files are named after machines, so each process of several has its own folder."""
    if settings.profile is None:
        return None
    own = f"process-{jax.process_index()}" if jax.process_count() > 1 else ""
    return training.Profile(folder / "profile" / own, settings.profile)


def main(args: config.Train) -> int:
    """Run the command."""
    began = time.monotonic()
    hosts.start(**dataclasses.asdict(args.hosts))  # before anything asks for the devices
    check.numbers(args)
    settings, folder, resume = resolve(args)
    launch.report(folder)
    t = settings.training
    # Names are looked up, and refused, before anything is loaded.
    solver = build.solver(settings.sampler, build.process(settings.process))
    build.loss(settings.objective, None)
    optimizer, _ = build.optimiser(t)
    averages = build.averages(t)
    latents.check_steps(settings)
    dataset, pixels, space = evaluate.load_data(settings), None, None
    shape, classes = build.shape_of(dataset), dataset.num_classes
    if resume:
        about = runs.read(folder)[1]
        evaluate.same_data(settings, dataset, about)
    if settings.latent is not None:
        latents.check(settings, dataset)
        shape = tuple(about["shape"]) if resume else latents.shape_of(settings, shape)
    check.guidance("sampler.guidance", settings.sampler.guidance, classes, settings.objective.label_drop)
    train_step = build.train_step(settings, shape, classes)
    init = runs.initialiser(settings, shape, classes)
    module = models.network(settings.model, shape, classes, build.vector_size(t))
    layout = build.layout(t, module, jax.device_count())
    shapes = training.layouts.check(layout, init, jax.random.key(settings.seed))
    devices.driver(build.parallel(t), train_step, layout=layout)  # refuses what these devices or processes cannot do
    count = networks.parameter_count(build.of_network(settings.objective, shapes))
    own = dict(emas=averages, trainable=train_step.trainable)
    start = functools.partial(training.init_sharded, init, optimizer, settings.seed, **own)
    if settings.init is not None and not resume:
        if settings.adapter.kind == "none":
            begin = runs.start_from(settings.init, build.of_network(settings.objective, shapes))
            begin = build.trained(settings.objective, begin)
        else:
            begin = runs.start_from(settings.init, shapes["base"])
            begin = runs.initialiser(settings, shape, classes, begin)(jax.random.key(settings.seed))
        start = training.init_state(begin, optimizer, settings.seed, **own)
    if settings.latent is not None:  # after all that can be refused: it may take long
        space, pixels = latents.of_run(folder, settings) if resume else latents.first_stage(settings, dataset), dataset
        dataset = latent.encoded(space, pixels)
    store = CheckpointStore(folder / "checkpoints", best="loss", say=console.note)
    if resume:
        hosts.first(lambda: write_settings(settings, folder, store))
    else:
        fill = None if space is None else lambda folder: latents.save(folder, space, settings, pixels)
        write_first(settings, folder, runs.describe(dataset, count, pixels), fill)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.note(
        f"{folder}: {settings.model.network} with {count:,} parameters, {t.steps} steps of {t.batch_size} on "
        f"{jax.device_count()} {jax.default_backend()} device(s){processes}"
    )
    planned = plan.of(settings, shape, classes, jax.device_count(), None)
    console.note(
        f"planned: {plans.work(planned.flops / t.batch_size)} an example, {plans.amount(planned.total)} on a device, of "
        f"which {plans.amount(planned.memory['activations'])} are activations"
    )
    train_items = len(dataset.split("train"))
    console.note(f"{dataset.name}: {train_items} training items of shape {shape}; licence: {dataset.licence}")
    if dataset.skipped:
        console.note(f"left out {len(dataset.skipped)} unreadable items: {', '.join(dataset.skipped[:5])}")

    weights = next(iter(averages), None)
    denoiser_of = build.model(settings, shape, classes, training=False)

    def denoiser(state: Any) -> Any:
        params = build.of_network(settings.objective, state.params if weights is None else state.averaged(weights))
        return denoiser_of(jax.tree.map(jnp.asarray, hosts.gather(params)))

    failures: list[str] = []
    batches = data_.batches(
        dataset, "train", t.batch_size, seed=settings.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    with store, batches:
        try:
            result = training.fit(
                start, train_step, batches, steps=t.steps, parallel=build.parallel(t), layout=layout,
                per_dispatch=t.per_dispatch, store=store, save_every=t.save_every, resume=resume,
                hooks=hooks.of(
                    settings, folder, dataset, denoiser, solver, failures,
                    None if space is None else (space.decode_all, pixels.transform),
                ),
                log_every=t.log_every,
                metrics_file=folder / "metrics.jsonl", max_skipped=t.max_skipped, on_bad=t.on_bad, max_rewinds=t.max_rewinds,
                grace=settings.grace, watchdog=watchdog(settings, folder),
                flops=planned.flops, peak_flops=peak_of(settings),
                profile=profile(settings, folder),
            )  # fmt: skip
        except training.OutOfMemory as error:
            raise runs.Failed(f"{error}\n  {less_memory(settings, shape, classes)}") from error
    failures += result.failures
    if result.saved != result.step:
        text = f"the last checkpoint on disk is step {result.saved}: {'; '.join(result.failures)}"
        console.note(text, everywhere=True)
    if result.interrupted is not None or result.hung:
        console.note(f"interrupted at step {result.step}; continue with: diffjax train --resume {folder}")
        return result.exit_code
    trained = denoiser(result.state) if settings.scores else None
    if hosts.leader():
        about = {"step": result.step, "weights": weights or "params"}
        finish(settings, folder, dataset if pixels is None else pixels, trained, about, failures, space)
        console.show(f"run      {folder}  ({time.monotonic() - began:.0f} s)")
    if failures:
        console.note(f"done, but not everything could be written: {'; '.join(failures)}")
    return max(hosts.share(1 if failures else 0))  # those who have nothing to do at the end wait here


def finish(
    settings: config.Train, folder: pathlib.Path, dataset: Any, trained: Any, about: dict, failures: list[str],
    space: Any = None,
) -> None:  # fmt: skip
    """Scores of the trained model, and where everything lies."""
    if trained is not None:
        found = evaluate.scores(trained, settings, dataset, space=space) | about
        evaluate.report(found)
        if kept(folder, "metrics.json", lambda: evaluate.save(found, folder / "metrics.json") or True, failures):
            console.show(f"scores   {folder / 'metrics.json'}  (all of them: diffjax eval {folder} --all)")
    if drawn := kept(folder, "loss.png", lambda: plot.loss(folder), failures):
        console.show(f"loss     {drawn}")
    if grids := sorted((folder / "samples").glob("step_*.png")):
        console.show(f"grid     {grids[-1]}")
