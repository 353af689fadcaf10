"""What a killed process left in the cache goes at the next start; nobody's work in progress does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from miles.scratch import FOREIGN_SECONDS, scratch_directory, sweep

WORK = """
import sys
from pathlib import Path
from miles.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1]), ".made-") as scratch:
    (scratch / "half").write_text("half")
    print(scratch, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_swept_once_nobody_works_beside_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    scratch = Path(worker.stdout.readline().strip())
    sweep(tmp_path, ".made-")
    assert (scratch / "half").exists(), "its process lives"
    worker.kill()
    worker.communicate()
    assert scratch.exists(), "a kill cleans nothing"
    with scratch_directory(tmp_path, ".made-") as mine:
        sweep(tmp_path, ".made-")
        assert scratch.exists() and mine.exists(), "somebody works here"
    assert not mine.exists()
    sweep(tmp_path, ".made-")
    assert not scratch.exists()


def test_what_another_machine_makes_is_left_until_it_is_old(tmp_path: Path) -> None:
    foreign, named, file = tmp_path / ".made-elsewhere-x1", tmp_path / "made", tmp_path / ".made-note"
    foreign.mkdir()
    named.mkdir()
    file.touch()
    sweep(tmp_path, ".made-")
    assert foreign.exists()
    os.utime(foreign, (0, foreign.stat().st_mtime - FOREIGN_SECONDS - 1))
    sweep(tmp_path, ".made-")
    assert not foreign.exists() and named.exists() and file.exists()


def test_a_cache_that_is_not_there_is_no_mistake(tmp_path: Path) -> None:
    sweep(tmp_path / "nowhere", ".made-")
