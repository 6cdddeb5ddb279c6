"""The manifest of a checkpoint: the SHA-256 of every file. Without it, one flipped bit in a data file loads silently."""

from __future__ import annotations

import hashlib
import json
import pathlib

FORMAT = 2  # 1: the manifest had no checksum of itself
MANIFEST = "manifest.json"
LATER = ("commit_success.txt", "_CHECKPOINT_METADATA")  # top-level files that Orbax still touches after the manifest
LONG = 200  # characters of a message
SYSTEM = ("No space left on device", "Disk quota exceeded", "File too large", "Input/output error", "Permission denied")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or written by a newer version."""


def write(folder: pathlib.Path, step: int) -> None:
    """Checksums of the finished files of a folder, written into it."""
    files = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in LATER
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))


def problem(folder: pathlib.Path, *, contents: bool = True) -> str | None:
    """What is wrong with the files of a folder, naming the first bad one, or None.

    Args: contents: compare checksums too, not only names and sizes.
    Raises: CheckpointError: written in a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, version, digest = dict(manifest["files"]), int(manifest["format"]), manifest.pop("sha256", None)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({first_line(error)})"
    # Before the format, which may be what has changed.
    if digest is not None and digest != _digest(manifest) or digest is None and version in (0, FORMAT):
        return f"{MANIFEST} has changed since it was written (SHA-256 differs)"
    check_format(version, folder)
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if contents and sha256(path) != digest:
                return f"{name} has changed since it was written (SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({first_line(error)})"
    return None


def check_format(version: int, where: pathlib.Path, what: str = "checkpoint") -> None:
    """Refuse what a newer diffjax wrote.   Raises: CheckpointError."""
    if version > FORMAT:
        raise CheckpointError(
            f"the {what} {where} has format {version}, written by a newer diffjax; this one reads format "
            f"{FORMAT}. Update diffjax to use it"
        )


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict) -> str:
    """The SHA-256 of the other entries of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type; of a long one, what the system said, which comes last."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    if len(line) > LONG:
        line = next((known for known in SYSTEM if known in str(error)), line[:LONG])
    return line
