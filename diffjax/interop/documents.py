"""What is written beside weights: licences, notices and model cards, and what they say of licence and origin."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

DOCUMENTS = re.compile(r"(licen[cs]e|copying|notice|readme|model_?card|use_?policy)[^/]*", re.IGNORECASE)
TEXT = 1_000_000  # bytes of a document at most
UNKNOWN = "not stated"


def read_documents(folder: pathlib.Path) -> dict[str, str]:
    """Licence, notice and model card of a folder; those of its pipeline where it has none of the name.

    Bytes that are no UTF-8 are kept as surrogates, so that the file can be written again as it was.
    """
    pipeline = [folder.resolve().parent] if (folder.resolve().parent / "model_index.json").is_file() else []
    found: dict[str, str] = {}
    for place in (*pipeline, folder):
        for path in sorted(place.iterdir()):
            if path.is_file() and DOCUMENTS.fullmatch(path.name) and path.stat().st_size <= TEXT:
                found[path.name] = path.read_bytes().decode(errors="surrogateescape")
    return found


def front_matter(text: str) -> dict[str, str]:
    r"""The simple entries `name: value` at the head of a model card, between two lines of dashes.

    Example:
        >>> front_matter("---\nlicense: mit\ntags:\n- image\n---\n# Net")["license"]
        'mit'
    """
    found = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    lines = re.findall(r"^(\w+):[ \t]*(\S.*?)\s*$", found[1] if found else "", re.MULTILINE)
    return {name: value.strip("\"'") for name, value in lines}


def licence_of(documents: Mapping[str, str]) -> str:
    """What the model card names as licence, else the first line of the licence's text."""
    for text in documents.values():
        about = front_matter(text)
        named = [about[k] for k in ("license_name", "license", "license_link") if k in about and about[k] != "other"]
        if named:
            return printable(named[0])
    for name, text in documents.items():
        if re.match(r"licen[cs]e|copying", name, re.IGNORECASE) and text.strip():
            return printable(f"{text.strip().splitlines()[0].strip()} ({name})")
    return UNKNOWN


def origin_of(config: Mapping[str, Any], documents: Mapping[str, str]) -> str:
    """The name under which the configuration says that it was found, else the title of the model card."""
    if config.get("_name_or_path"):
        return printable(str(config["_name_or_path"]))
    for text in documents.values():
        about, title = front_matter(text), re.search(r"^# +(.+)$", text, re.MULTILINE)
        if "base_model" in about or title:
            return printable(about.get("base_model") or title[1].strip())
    return UNKNOWN


def printable(text: str) -> str:
    """A line of text without control characters and without bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in text)
