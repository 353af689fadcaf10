"""From the first question of `miles init` to a run that trains: by flags, and by keys in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from e2e_support import PATIENCE_S, Cli, summary_of

pytestmark = pytest.mark.slow

HELD_OUT = "builtin:sort/test@[0:16]"
SMALL = ("--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--eval-prompt-data", HELD_OUT)
ESCAPES = re.compile(
    rb"\x1b(\[[0-?]*[ -/]*[@-~]|[PX^_][^\x1b]*\x1b\\|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>])"
)


class Terminal:
    """A pseudo-terminal of 80x24 in which one command after the other runs."""

    def __init__(self, cli: Cli, cwd: Path) -> None:
        self.environment = {**cli.environment, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        self.cwd = cwd
        self.seen = ""

    def start(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "miles_cli", *words],
            env=self.environment,
            cwd=self.cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def wait_for(self, text: str) -> None:
        """Read the screen until the text has come since the last call."""
        deadline = time.monotonic() + PATIENCE_S
        raw = b""
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[-2000:]!r}"
            if not self._readable(1.0):
                continue
            try:
                raw += os.read(self.master, 65536)
            except OSError:
                assert text in self.seen, f"ended before {text!r}: {self.seen[-2000:]!r}"
            self.seen = ESCAPES.sub(b"", raw).decode(errors="replace")
        self.seen = ""

    def _readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Drain what is left and return the exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it did not end"
            if self._readable(0.2):
                try:
                    os.read(self.master, 65536)
                except OSError:
                    break
        code = self.process.wait(timeout=PATIENCE_S)
        os.close(self.master)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def test_flags_make_a_file_that_trains(cli: Cli, tmp_path: Path) -> None:
    made = cli("init", "run.toml", "--yes", *SMALL, "--num-rollout", "2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    trained = cli("train", "--config", "run.toml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert summary_of(cli.only_run())["steps"] == 2


def test_a_checkpoint_and_prompts_of_ones_own_train(cli: Cli, warm_checkpoint: Path, tmp_path: Path) -> None:
    rows = (f'{{"question": "sort 4{i}31=", "answer": "{"".join(sorted(f"4{i}31"))}"}}' for i in range(300))
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    words = ("--hf-checkpoint", str(warm_checkpoint), "--prompt-data", "mine.jsonl", "--num-rollout", "2")
    made = cli("init", "--yes", *words, "--rollout-batch-size", "8", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    trained = cli("train", "--config", "run.toml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


def test_keys_in_the_form_make_a_file_that_trains(cli: Cli, tmp_path: Path) -> None:
    terminal = Terminal(cli, tmp_path)
    try:
        terminal.start("init", *SMALL)
        terminal.wait_for("no checkpoint was named")
        rollouts = 11  # Fields before the number of rollouts.
        terminal.press("\t" * rollouts)
        terminal.wait_for("Rounds of sampling and training")
        for key, answer in (
            ("\x7f", "8 of 32 samples"),
            ("\x7f", "needs an answer"),
            ("2", "2 of 32 samples"),
        ):
            terminal.press(key)
            terminal.wait_for(answer)
        terminal.press("\x13")
        terminal.wait_for("wrote  run.toml")
        assert terminal.end() == 0
        assert "num_rollout = 2\n" in (tmp_path / "run.toml").read_text()
        terminal.start("train", "--config", "run.toml")
        assert terminal.end() == 0
    finally:
        terminal.kill()
    assert summary_of(cli.only_run())["steps"] == 2


def test_leaving_the_form_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    terminal = Terminal(cli, tmp_path)
    try:
        terminal.start("init")
        terminal.wait_for("ready")
        terminal.press("\x03")
        assert terminal.end() == 130
    finally:
        terminal.kill()
    assert not (tmp_path / "run.toml").exists()
