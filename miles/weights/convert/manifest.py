"""What a conversion says of itself: before, so that it can go on; and beside its weights, for good.

Neither holds a time: a conversion that was killed and went on leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles._version import __version__
from miles.arch.safetensors_header import INDEX_FILE
from miles.weights.convert.dcp_write import Place, write_dcp_metadata
from miles.weights.convert.hashes import MANIFEST, sha256_of
from miles.weights.convert.journal import Journal
from miles.weights.convert.plan import Conversion
from miles.weights.convert.run_state import MODEL_DIR, STATE_DIR, RunState
from miles.weights.file_manifest import STEP_MANIFEST, file_manifest
from miles.weights.hf import copy_companions


def fingerprint(plan: Conversion, verify: bool) -> dict[str, Any]:
    """What must be the same for a conversion to go on: the source's files, the request, this program."""
    paths = [*plan.source.files, plan.source.config_dir / "config.json"]
    return {
        "miles": __version__,
        "source": str(plan.source.directory.absolute()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "wanted": asdict(plan.wanted),
        "verify": verify,
    }


def write_companions(plan: Conversion, directory: Path, places: Mapping[str, Mapping[str, Place]]) -> None:
    """config.json, the index or metadata, tokenizer and generation settings.

    Args:
        places: where the files of a distributed checkpoint have their tensors.
    """
    is_step = plan.wanted.layout == "native"
    model = directory / MODEL_DIR if is_step else directory
    write_json(model / "config.json", dict(plan.config))
    shards = [shard for shard in plan.shards if (directory / shard.file).parent == model]
    if plan.wanted.layout == "dcp":
        write_dcp_metadata(directory, shards, places)
    elif len(shards) > 1:
        weight_map = {name: Path(shard.file).name for shard in shards for name in shard.names}
        total = sum(shard.size - len(shard.header) for shard in shards)
        write_json(model / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    copy_companions(plan.source.config_dir, model)
    if plan.carries_state:
        _copy_state(plan.source.state, directory if is_step else directory / STATE_DIR)
    if is_step:
        write_json(directory / STEP_MANIFEST, file_manifest(directory))


def _copy_state(state: RunState, directory: Path) -> None:
    for name, path in state.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / name)


def write_manifest(
    plan: Conversion, journal: Journal, source_hashes: dict[str, str], checks: dict[str, Any]
) -> dict[str, Any]:
    """Write and return it: every file and every weight of both sides, and what was left out."""
    directory, source = journal.files, plan.source
    files = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest: dict[str, Any] = {
        "miles": __version__,
        "source": {
            "directory": str(source.directory),
            "files": {
                path.relative_to(source.directory).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": source_hashes[str(path)],
                }
                for path in source.files
            },
            "left_out": dict(plan.left_out),
        },
        "wanted": asdict(plan.wanted),
        **({"checks": checks} if checks else {}),
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": journal.hashes.get(name) or sha256_of(path)}
            for name, path in files.items()
        },
        "weights": {one.name: journal.outcomes[one.name] for one in plan.moves},
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
