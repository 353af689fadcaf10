"""The dashboard measured: first frame of a long record, processor time and memory while events arrive.

    python benchmarks/dashboard.py [--rows 10000] [--rate 20] [--seconds 20]

It writes a record of `--rows` steps in a temporary directory, opens it in a pseudo-terminal of 160x45,
appends `--rate` steps (five events each) a second and prints one JSON object. Times are wall time on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import random
import select
import signal
import struct
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from miles.record import RecordWriter

SIZE = (45, 160)
WARM_UP = 5.0
CHILD = "import sys; from pathlib import Path; from miles_cli.dashboard.app import run_dashboard; "
CHILD += "run_dashboard([Path(sys.argv[1])], 'braille')"
NAMES = (
    "rollout/raw_reward", "rollout/response_len/mean", "train/loss", "train/grad_norm", "train/entropy",
    "train/train_rollout_logprob_abs_diff", "train/train_rollout_kl", "train/kl_loss", "train/ppo_kl",
    "train/tis", "train/lr", "route/flip_frac", *(f"route/flip_frac/layer_{i}" for i in range(8)),
    "perf/step_time", "perf/rollout_time", "perf/train_time", "perf/tokens_per_sec",
)  # fmt: skip


def write_step(writer: RecordWriter, rng: random.Random, step: int) -> None:
    with writer.phase("rollout", step):
        pass
    with writer.phase("train", step):
        pass
    noise = rng.gauss(0, 1)
    values = {name: 0.02 + 0.001 * noise + 0.01 * math.sin(step / 300 + i) for i, name in enumerate(NAMES)}
    writer.metrics(step, values)


class Terminal:
    """A pseudo-terminal with the dashboard in it; counts what it is sent and when the first chart came."""

    def __init__(self, run_dir: Path) -> None:
        self.started = time.monotonic()
        self.first_chart: float | None = None
        self.received = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")}
            environment |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LINES": "45", "COLUMNS": "160"}
            os.execve(sys.executable, [sys.executable, "-c", CHILD, str(run_dir)], environment)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while True:
            select.select([self._fd], [], [])
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:
                return
            self.received += len(data)
            if self.first_chart is None and "log-prob gap" in data.decode("utf-8", "replace"):
                self.first_chart = time.monotonic() - self.started

    def quit(self) -> None:
        os.write(self._fd, b"q")
        time.sleep(1.0)
        if psutil.pid_exists(self.pid):
            os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)


def measure(run_dir: Path, rows: int, rate: float, seconds: float) -> dict[str, float | int | None]:
    rng = random.Random(0)
    with RecordWriter(run_dir) as writer:
        for step in range(1, rows + 1):
            write_step(writer, rng, step)
        record = sum(path.stat().st_size for path in (run_dir / "events").iterdir())
        terminal = Terminal(run_dir)
        process, step, mark = psutil.Process(terminal.pid), rows, None
        while (now := time.monotonic() - terminal.started) < WARM_UP + seconds:
            step += 1
            write_step(writer, rng, step)
            if mark is None and now >= WARM_UP:
                mark = (now, sum(process.cpu_times()[:2]), process.memory_info().rss, terminal.received)
            time.sleep(1 / rate)
        assert mark is not None
        spent = now - mark[0]
        result = {
            "rows": rows,
            "record_mb": round(record / 1e6, 1),
            "first_frame_s": None if terminal.first_chart is None else round(terminal.first_chart, 2),
            "events_per_s": rate,
            "core_percent": round(100 * (sum(process.cpu_times()[:2]) - mark[1]) / spent, 1),
            "memory_mb_before": round(mark[2] / 1e6, 1),
            "memory_mb_after": round(process.memory_info().rss / 1e6, 1),
            "wire_kb_per_s": round((terminal.received - mark[3]) / spent / 1e3, 1),
        }
        terminal.quit()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder) / "run", options.rows, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
