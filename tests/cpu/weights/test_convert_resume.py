"""A conversion that was killed goes on where it stopped, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from convert_support import converted, files_of, make_checkpoint

from miles.arch.precision import NumberFormat
from miles.errors import CheckpointError
from miles.weights.convert import (
    Wanted,
    convert,
    journal,
    open_source,
    partial_directory,
    plan_conversion,
)
from miles.weights.convert.transfer import Transfer

KILLED = """
import os, signal, sys
from pathlib import Path
from miles.arch.precision import NumberFormat
from miles.weights.convert import Wanted, convert, journal, open_source, plan_conversion

journal.FLUSH_BYTES = 40_000
def progress(done, total, file):
    if done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
wanted = Wanted(NumberFormat("fp8"), max_shard_bytes=100_000)
convert(plan_conversion(open_source(Path(sys.argv[1])), Path(sys.argv[2]), wanted), 2, progress=progress)
"""
WANTED = Wanted(NumberFormat("fp8"), max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resume") / "base")


@pytest.fixture(scope="module")
def killed_work(base: Path) -> Path:
    """What a conversion that was killed left behind."""
    target = base.parent / "killed"
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(base), str(target)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    return partial_directory(target)


@pytest.fixture
def killed(killed_work: Path, tmp_path: Path) -> Path:
    """A target whose conversion was killed."""
    shutil.copytree(killed_work, partial_directory(tmp_path / "target"))
    return tmp_path / "target"


def test_killed_and_run_again(
    base: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = partial_directory(killed)
    lines = (partial / "journal.jsonl").read_text().splitlines()
    credited = {name for line in lines for name in json.loads(line).get("weights", {})}
    assert credited
    moved: list[str] = []
    run = Transfer.run
    monkeypatch.setattr(
        Transfer,
        "run",
        lambda self, group, file: moved.extend(one.name for one in group) or run(self, group, file),
    )
    plan = plan_conversion(open_source(base), tmp_path / "target", WANTED)
    told: list[str] = []
    convert(plan, notice=told.append)
    assert told == [f"going on: {len(credited)} of {len(plan.moves)} weights are written already"]
    assert set(moved) == {one.name for one in plan.moves} - credited
    assert not partial.exists()
    convert(plan_conversion(open_source(base), tmp_path / "straight", WANTED))
    assert files_of(tmp_path / "target") == files_of(tmp_path / "straight")


def test_bytes_that_were_not_credited_are_written_again(base: Path, killed: Path, tmp_path: Path) -> None:
    """As after a loss of power: what was in flight is garbage."""
    partial = partial_directory(killed)
    journal_file = partial / "journal.jsonl"
    lines = journal_file.read_text().splitlines()
    kept = [line for line in lines if "weights" in line][:1]
    journal_file.write_text("\n".join([*kept, '{"weights": {"torn']))
    plan = plan_conversion(open_source(base), tmp_path / "target", WANTED)
    safe = json.loads(kept[0])["weights"]
    for shard in plan.shards:
        path = partial / "files" / shard.file
        if not path.is_file():
            continue
        content = bytearray(path.read_bytes())
        for group in shard.groups:
            for one in group:
                for name in one.forms:
                    if one.name not in safe:
                        content[shard.begins[name]] ^= 255
        path.write_bytes(content)
    convert(plan)
    convert(plan_conversion(open_source(base), tmp_path / "straight", WANTED))
    assert files_of(tmp_path / "target") == files_of(tmp_path / "straight")


def test_another_request_begins_anew(base: Path, killed: Path, tmp_path: Path) -> None:
    told: list[str] = []
    wanted = Wanted(NumberFormat("int8"))
    convert(plan_conversion(open_source(base), killed, wanted), notice=told.append)
    assert told == ["begun anew: there was work on another conversion into this target"]
    converted(base, tmp_path / "straight", "int8")
    assert files_of(killed) == files_of(tmp_path / "straight")


def test_another_source_begins_anew(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")

    def stop(done: int, total: int, file: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan = plan_conversion(open_source(tmp_path / "base"), tmp_path / "target", WANTED)
        convert(plan, 1, progress=stop)
    os.utime(min((tmp_path / "base").glob("*.safetensors")), ns=(1, 1))
    told: list[str] = []
    convert(plan_conversion(open_source(tmp_path / "base"), tmp_path / "target", WANTED), notice=told.append)
    assert told == ["begun anew: there was work on another conversion into this target"]


def test_an_interrupt_keeps_all_that_was_done(base: Path, tmp_path: Path) -> None:
    done: list[int] = []

    def stop(bytes_done: int, total: int, file: str) -> None:
        done.append(bytes_done)
        if bytes_done > total / 2:
            raise KeyboardInterrupt

    whole = Wanted(NumberFormat("fp8"))
    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(open_source(base), tmp_path / "target", whole), 1, progress=stop)
    seen: list[int] = []
    plan = plan_conversion(open_source(base), tmp_path / "target", whole)
    told: list[str] = []
    convert(plan, 1, progress=lambda bytes_done, total, file: seen.append(bytes_done), notice=told.append)
    assert told == [f"going on: {len(done)} of {len(plan.moves)} weights are written already"]


def test_two_processes_do_not_write_one_target(base: Path, tmp_path: Path) -> None:
    plan = plan_conversion(open_source(base), tmp_path / "target", WANTED)
    first = journal.Journal(plan.target, {"any": "plan"})
    with pytest.raises(CheckpointError, match="target: another process converts into it"):
        convert(plan)
    first.close(remove=True)
    convert(plan)
