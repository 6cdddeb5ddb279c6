"""diffjax: train, sample and score diffusion models; `python -m diffjax` is the same."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

COMMANDS = {
    "train": "train a model: `diffjax train digits`; continue one: `diffjax train --resume RUN`",
    "launch": "train with several processes: `diffjax launch -n 4 -- train digits`",
    "sample": "draw samples of a run: a PNG grid and an .npz",
    "eval": "score a run's samples beside real data",
    "plan": "what a training step needs on many devices: `diffjax plan CONFIG --devices 256`",
    "export": "write the weights of a run to a safetensors file",
    "ema": "make averages of any length from a run's snapshots: `diffjax ema RUN --sigma-rel 0.05`",
    "pretrained": "show what a folder with weights of another library holds: `diffjax pretrained FOLDER`",
    "list": "show the methods: `diffjax list solvers`",
    "cite": "print BibTeX of methods",
    "data": "prepare a data set: `diffjax data prepare NAME`",
}
EXITS = """exit codes: 0 done, 1 failed while running (diverged, out of memory, or something could not be written), 2 wrong
input, 75 hung (--abort-on-hang), 130 Ctrl-C, 143 SIGTERM; after 1, 75, 130 and 143 go on with --resume RUN;
DIFFJAX_TRACEBACK=1 shows where an error was raised"""


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download and prepare a data set of tensorflow-datasets, once."""

    name: Annotated[str, tyro.conf.Positional]
    """name of the set, for example mnist"""
    directory: str | None = None
    """default ~/tensorflow_datasets"""
    timeout: float = 3600.0
    """seconds after which to give up"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong input, 130 or 143 stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # of the parser: 0 after --help, 2 after an option that it cannot read
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _left(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone: what is still buffered goes nowhere
        return 141
    except Exception as error:
        found = _explained(error)
        if found is None or os.environ.get("DIFFJAX_TRACEBACK"):
            raise
        code, text = found
        print(f"diffjax: error: {text}", file=sys.stderr)
        return _left(code)


def _left(code: int) -> int:
    """Leave with this code; without waiting, if there are other processes that would wait for this one."""
    if "diffjax.training.hosts" in sys.modules:
        sys.modules["diffjax.training.hosts"].leave(code)
    return code


def _explained(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of errors that are not our mistake: wrong input, full disks, training that diverged."""
    from diffjax.cli.run import Failed
    from diffjax.training import Diverged, OutOfMemory

    if "Gloo" in str(error) and type(error).__module__.startswith(("jax", "builtins")):
        return 1, f"lost another process ({str(error).splitlines()[0]})"
    if isinstance(error, (Diverged, Failed, OutOfMemory)):
        return 1, str(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        return 1, "the device is out of memory; use a smaller --training.batch-size, --training.accumulate, or --chunk"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return 1, f"{error}. Make room there, and go on with --resume"
    if isinstance(error, ImportError):
        return 2, f"{error}. Install the missing package"
    return (2, str(error)) if isinstance(error, (ValueError, OSError)) else None


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(f"usage: diffjax {{{','.join(COMMANDS)}}} ...\n\n{__doc__}\n")
        print("\n".join(f"  {name:12s}{what}" for name, what in COMMANDS.items()))
        print(f"\n`diffjax COMMAND --help` shows the options of a command.\n{EXITS}")
        return 0
    if command == "--version":
        import diffjax

        print(diffjax.__version__)
        return 0
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no command {command!r}.{hint} Commands are {', '.join(COMMANDS)}")
    commands = {
        "train": _train,
        "launch": _launch,
        "sample": _sample,
        "eval": _eval,
        "plan": _plan,
        "export": _export,
        "ema": _ema,
        "pretrained": _pretrained,
        "list": _list,
        "cite": _cite,
        "data": _data,
    }
    return commands[command](argv[1:])


def _launch(argv: list[str]) -> int:
    from diffjax.cli import launch

    cut = argv.index("--") if "--" in argv else len(argv)
    return launch.main(_parse(launch.Launch, "launch", argv[:cut]), argv[cut + 1 :])


def _parse(kind: Any, command: str, argv: list[str], **options: Any) -> Any:
    description = f"{inspect.getdoc(kind)}\n\n{EXITS}"
    return tyro.cli(kind, prog=f"diffjax {command}", description=description, args=argv, **options)


def _train(argv: list[str]) -> int:
    from diffjax.cli import config, train
    from diffjax.cli import run as runs

    argv = _profile(argv)
    for flag in ("--resume", "--config"):  # what the run is comes from there; the same options may be repeated
        if (place := _value(argv, flag)) is not None:
            read = runs.read_config if flag == "--config" else lambda folder: runs.read(folder)[0]
            default = dataclasses.replace(read(pathlib.Path(place)), **{flag[2:]: place})
            return train.main(_options("train", argv, default))
    default = config.preset(argv[0] if argv and not argv[0].startswith("-") else "digits")
    given = _parse(config.Train, "train", argv, default=default)
    if given.data != default.data:  # the data set was not the first word: read again over its own defaults
        default = config.preset(given.data)
    return train.main(_options("train", argv, default))


def _options(command: str, argv: list[str], default: Any) -> Any:
    """The options of a run over a preset, without its numbers for another network, process or law."""
    from diffjax.cli import config, model

    given = _parse(config.Train, command, argv, default=default)
    own = config.defaults(given, default)
    given = given if own == default else _parse(config.Train, command, argv, default=own)
    model.check_given(given.model, own.model)
    return given


def _profile(argv: list[str]) -> list[str]:
    """`--profile` may stand without a number: 5 steps."""
    if "--profile" not in argv:
        return argv
    after = argv.index("--profile") + 1
    return argv if argv[after : after + 1] and argv[after].isdecimal() else [*argv[:after], "5", *argv[after:]]


def _value(argv: list[str], flag: str) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1]
    return None


def _plan(argv: list[str]) -> int:
    from diffjax.cli import plan

    args, rest = _parse(plan.Plan, "plan", argv, return_unknown_args=True)
    default = plan.settings_of(args.what)
    return plan.main(args, _options("plan", rest, default))


def _sample(argv: list[str]) -> int:
    from diffjax.cli import sample

    return sample.main(_parse(sample.Sample, "sample", argv))


def _eval(argv: list[str]) -> int:
    from diffjax.cli import evaluate

    return evaluate.main(_parse(evaluate.Eval, "eval", argv))


def _export(argv: list[str]) -> int:
    from diffjax.cli import export

    return export.main(_parse(export.Export, "export", argv))


def _ema(argv: list[str]) -> int:
    from diffjax.cli import ema

    return ema.main(_parse(ema.Ema, "ema", argv))


def _pretrained(argv: list[str]) -> int:
    from diffjax.cli import pretrained

    return pretrained.main(_parse(pretrained.Pretrained, "pretrained", argv))


def _list(argv: list[str]) -> int:
    from diffjax.cli import listing

    return listing.main(_parse(listing.List, "list", argv))


def _cite(argv: list[str]) -> int:
    from diffjax.cli import listing

    return listing.cite(_parse(listing.Cite, "cite", argv))


def _data(argv: list[str]) -> int:
    from diffjax import data

    if not argv or argv[0] != "prepare":
        if argv and argv[0] in ("-h", "--help"):
            print("usage: diffjax data prepare NAME [--directory DIR] [--timeout SECONDS]")
            print("\nPrepares a data set of tensorflow-datasets, once (extra `tf`); the others need no preparation.")
            return 0
        raise ValueError(f"the data command is `diffjax data prepare NAME`; got {' '.join(argv) or 'nothing'}")
    args = _parse(Prepare, "data prepare", argv[1:])
    where = data.prepare(args.name, args.directory, timeout=args.timeout)
    print(f"{args.name} is ready" + (f" in {where}" if where else ": it needs no preparation"))
    return 0
