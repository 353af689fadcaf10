"""A library appears in the cache whole or not at all, whatever becomes of the process that compiles it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.models.compiled import build
from miles.models.compiled.build import BuildFailed

COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo fake 1.0 && exit 0
while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done
printf half > "$out"
[ -e "$0.slow" ] && sleep 60
[ -e "$0.full" ] && echo "fatal error: No space left on device" >&2 && exit 1
printf whole > "$out"
"""
BUILD = "import sys; from miles.models.compiled import build; print(build.library(sys.argv[1]))"
PATIENCE_S = 120


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that writes in two halves; a file beside it, .slow or .full, says what befalls it between them."""
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path / "cache"))
    made = tmp_path / "c++"
    made.write_text(COMPILER)
    made.chmod(0o755)
    return made


def cached(compiler: Path) -> list[Path]:
    return sorted((compiler.parent / "cache" / "kernels").iterdir())


def started(compiler: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(compiler)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def assert_whole(library: Path, compiler: Path) -> None:
    assert library.read_text() == "whole"
    assert [path for path in cached(compiler) if not path.name.startswith(".")] == [library]


def test_a_build_that_was_killed_is_begun_anew(compiler: Path) -> None:
    slow = Path(f"{compiler}.slow")
    slow.touch()
    killed = started(compiler)
    kernels, end = compiler.parent / "cache" / "kernels", time.monotonic() + PATIENCE_S
    while not any(kernels.glob(".building-*/*.o")):
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    slow.unlink()
    (left,) = cached(compiler)
    assert_whole(build.library(str(compiler)), compiler)
    assert not left.exists()


def test_two_processes_build_at_once(compiler: Path) -> None:
    both = [started(compiler) for _ in range(2)]
    told = [process.communicate(timeout=PATIENCE_S)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0] and told[0] == told[1]
    assert_whole(Path(told[0]), compiler)
    assert len(cached(compiler)) == 1


def test_a_full_disk_leaves_nothing(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path(f"{compiler}.full")
    full.touch()
    with pytest.raises(BuildFailed, match="No space left"):
        build.library(str(compiler))
    full.unlink()

    def no_room(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(BuildFailed, match="does not take a library"):
        build.library(str(compiler))
    assert cached(compiler) == []


def test_a_cache_that_cannot_be_written_is_told(compiler: Path) -> None:
    (compiler.parent / "cache").write_text("a file where the directory should be")
    with pytest.raises(BuildFailed, match="does not take a library"):
        build.library(str(compiler))
