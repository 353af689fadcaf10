"""Everything that somebody else needs to judge a run, redacted, in one archive.

Left out on purpose: samples (prompts and responses are the user's data), checkpoints, and control requests.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from miles.diagnosis.logs import find_logs
from miles.diagnosis.redact import Redactor
from miles.errors import RunError
from miles.record import RunLayout

TAIL_BYTES = 1 << 20
"""Of each log, this much of the end."""
EVENT_BYTES = 64 << 20
"""Of each event file, this much of the end, beginning with a whole line."""


@dataclass(frozen=True)
class Packed:
    """One file of the bundle."""

    name: str
    size: int
    note: str = ""


def write_bundle(
    target: Path, source: Path, extras: Mapping[str, str], redactor: Redactor, is_run: bool
) -> list[Packed]:
    """Write `target` (tar.gz) from the run directory or logs at `source`, and texts made for it.

    Raises RunError when the file cannot be written. It is written aside and renamed, so a bundle is whole.
    """
    partial = target.with_name(f".{target.name}.partial")
    packed = []
    try:
        with tarfile.open(partial, "w:gz") as archive:
            for name, text, note in _contents(source, extras, is_run):
                data = redactor.text(text).encode()
                member = tarfile.TarInfo(f"{_stem(target)}/{redactor.text(name)}")
                member.size, member.mtime = len(data), int(time.time())
                archive.addfile(member, io.BytesIO(data))
                packed.append(Packed(redactor.text(name), len(data), note))
        partial.rename(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            "the bundle cannot be written", where=str(target), why=error.strerror or str(error)
        ) from error
    return packed


def _stem(target: Path) -> str:
    return target.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz") or "bundle"


def _contents(source: Path, extras: Mapping[str, str], is_run: bool) -> Iterator[tuple[str, str, str]]:
    """(name, text, note), those first whose paths tell user names."""
    layout = RunLayout(source)
    files = [layout.meta, layout.config_json, layout.config_toml, layout.plan, layout.summary]
    files += sorted(layout.heartbeat_dir.glob("*.json"))
    for path in files if is_run else ():
        if path.is_file():
            yield str(path.relative_to(source)), path.read_text("utf-8", "replace"), ""
    for path in sorted(layout.events_dir.glob("*.jsonl")) if is_run else ():
        yield f"events/{path.name}", *_tail(path, EVENT_BYTES)
    for path in find_logs(layout.logs_dir if is_run else source):
        name = path.name if source.is_file() else str(path.relative_to(source))
        yield name if is_run else f"logs/{name}", *_tail(path, TAIL_BYTES)
    for name, text in extras.items():
        yield name, text, ""


def _tail(path: Path, limit: int) -> tuple[str, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= limit:
            return file.read().decode("utf-8", "replace"), ""
        file.seek(size - limit)
        file.readline()
        return file.read().decode("utf-8", "replace"), f"the last {limit >> 20} MiB of {size >> 20}"
