"""The rule base measured: faults put into real runs of the quickstart, and healthy seeds beside them.

    python benchmarks/diagnosis.py [--only NAME ...] [--json FILE]

Each fault is a run of its own through the command line: a fault that the run injects (`--inject-fault`), a
wrong setting, a reward hook that breaks, a process that is killed or hangs. Reported are, for each: whether
the expected rule fired (recall), the steps from the fault to its first alarm, and what else was told. Then
the same for healthy seeds, on which every finding is a false alarm. Exit code 1 when a fault was missed or a
healthy seed was accused.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from miles.record import RunReader

STEPS = 40
SETTINGS = (
    "--profile",
    "quickstart",
    "--skip-eval-before-train",
    "--eval-prompt-data",
    "sort",
    "builtin:sort/test@[0:8]",
)
HEALTHY_SEEDS = (11, 12, 13, 14, 15)
HOOK = """
import time
calls = 0

def judge(args, sample):
    global calls
    calls += 1
    late = calls > {after}
    {action}
    return 1.0 if sample.response.strip() == str(sample.label) else 0.0
"""
CALLS_PER_STEP = 256
GiveFault = Callable[[Path], tuple[str, ...]]
Disturb = Callable[[subprocess.Popen[str], Path], None]


@dataclass(frozen=True)
class Fault:
    """One way to break a run: at `step`, seen by any of `rules`."""

    name: str
    rules: tuple[str, ...]
    step: int
    arguments: GiveFault
    disturb: Disturb | None = None
    steps: int = STEPS


@dataclass
class Outcome:
    """What diagnosis said of one run."""

    name: str
    expected: tuple[str, ...]
    fault_step: int | None
    findings: list[str] = field(default_factory=list)
    raised_at: int | None = None
    seconds: float = 0.0

    @property
    def found(self) -> bool:
        return any(rule in self.expected for rule in self.findings)

    @property
    def delay(self) -> int | None:
        """Steps from the first faulty one to the first alarm; None when the running trainer raised none."""
        return None if self.raised_at is None or self.fault_step is None else self.raised_at - self.fault_step


def words(*arguments: str) -> GiveFault:
    return lambda folder: arguments


def hook(after_step: int, action: str) -> GiveFault:
    """A reward function that does something else from a step on."""

    def give(folder: Path) -> tuple[str, ...]:
        path = folder / "judge.py"
        path.write_text(HOOK.format(after=(after_step - 1) * CALLS_PER_STEP, action=action))
        return ("--custom-rm-path", f"{path}:judge")

    return give


def kill_at(step: int) -> Disturb:
    def disturb(process: subprocess.Popen[str], run_dir: Path) -> None:
        wait_for_step(process, run_dir, step)
        process.send_signal(signal.SIGKILL)

    return disturb


def hang_at(step: int, seconds: float) -> Disturb:
    """Let the run hang past the limit, look at it while it hangs, then end it."""

    def disturb(process: subprocess.Popen[str], run_dir: Path) -> None:
        wait_for_step(process, run_dir, step - 1)
        time.sleep(seconds)

    return disturb


FAULTS = (
    Fault("NaN in a gradient", ("NF1",), 10, words("--inject-fault", "nan_grad@10")),
    Fault(
        "engine keeps old weights, claims new ones",
        ("MM4", "MM6", "MM8"),
        10,
        words("--inject-fault", "stale_engine@10"),
    ),
    Fault("weights are no longer sent", ("SY17",), 10, words("--inject-fault", "skip_sync@10")),
    Fault("routes of the neighbouring token", ("RT3",), 10, words("--inject-fault", "corrupt_routes@10")),
    Fault("routes are lost", ("RT1",), 10, words("--inject-fault", "drop_routes@10")),
    Fault("learning rate 1e-2", ("OP8",), 1, words("--lr", "1e-2")),
    Fault("learning rate 4e-3", ("OP8",), 1, words("--lr", "4e-3")),
    Fault("learning rate 3e-3", ("OP8", "OP11"), 1, words("--lr", "3e-3")),
    Fault("reward turns to 0", ("OP8", "RO1"), 15, hook(15, "if late: return 0.0")),
    Fault("reward is 0 from the start", ("RO1",), 1, hook(1, "if late: return 0.0")),
    Fault(
        "reward fails for some samples", ("RO10",), 10, hook(10, "if late and calls % 5 == 0: return None")
    ),
    Fault("reward raises", ("EX1",), 10, hook(10, "if late: return 1 / 0")),
    Fault("length cap below the answers", ("RO2",), 1, words("--rollout-max-response-len", "5")),
    Fault("process killed", ("LV1",), 10, hook(10, "if late: time.sleep(0.002)"), kill_at(11)),
    Fault("reward service hangs", ("SY1",), 10, hook(10, "if late: time.sleep(600)"), hang_at(10, 34.0)),
)


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Return when the run has recorded `step`, or has ended."""
    while process.poll() is None:
        runs = list(run_dir.glob("*/events/driver.jsonl"))
        if runs and (RunReader(runs[0].parent.parent).history.last_step or 0) >= step:
            return
        time.sleep(0.1)


def measure(
    name: str,
    expected: tuple[str, ...],
    step: int | None,
    arguments: tuple[str, ...],
    steps: int,
    disturb: Disturb | None,
    folder: Path,
) -> Outcome:
    """Run once and diagnose, while it still hangs where it does."""
    runs = folder / "runs"
    environment = os.environ | {"MILES_RUNS_DIR": str(runs), "OMP_NUM_THREADS": "1"}
    miles = [sys.executable, "-m", "miles_cli"]
    command = [*miles, "train", *SETTINGS, "--num-rollout", str(steps), *arguments]
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        if disturb is not None:
            disturb(process, runs)
        else:
            process.wait()
        made = [path for path in runs.glob("*") if path.is_dir()]
        if len(made) != 1:
            raise SystemExit(f"{name}: the run did not start: {process.communicate()[1]}")
        said = subprocess.run(
            [*miles, "diagnose", str(made[0]), "--json"], env=environment, capture_output=True, text=True
        )
    finally:
        process.kill()
        process.wait()
    findings = [finding["rule"] for finding in json.loads(said.stdout)["findings"]]
    alerts = [a for a in RunReader(made[0]).alerts() if a["state"] == "raised"]
    first = min((a["step"] for a in alerts if a["rule"] in expected), default=None)
    raised = findings + sorted({a["rule"] for a in alerts} - set(findings))
    return Outcome(name, expected, step, raised, first, time.monotonic() - started)


def table(outcomes: list[Outcome], healthy: list[Outcome]) -> str:
    """The result in Markdown."""
    lines = ["| fault | at step | found as | delay (steps) | also told |", "|---|---|---|---|---|"]
    for o in outcomes:
        named = ", ".join(rule for rule in o.findings if rule in o.expected) or "**missed**"
        others = ", ".join(rule for rule in o.findings if rule not in o.expected) or "–"
        delay = "post-mortem" if o.delay is None else str(o.delay)
        lines.append(f"| {o.name} | {o.fault_step} | {named} | {delay} | {others} |")
    delays = sorted(o.delay for o in outcomes if o.delay is not None)
    found, accused = sum(o.found for o in outcomes), [o for o in healthy if o.findings]
    lines += [
        "",
        f"Recall {found} of {len(outcomes)}; false alarms on {len(accused)} of {len(healthy)} healthy runs.",
    ]
    if delays:
        lines[-1] += f" Delay: median {delays[len(delays) // 2]}, at most {delays[-1]} steps."
    lines += [f"- {o.name}: {', '.join(o.findings)}" for o in accused]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", help="names (or beginnings) of faults; healthy seeds are left out then"
    )
    parser.add_argument("--json", type=Path, help="also write the outcomes here")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.only or any(f.name.startswith(n) for n in options.only)]
    outcomes, healthy = [], []
    with tempfile.TemporaryDirectory(prefix="miles-diagnosis-") as root:

        def run(
            number: int,
            name: str,
            expected: tuple[str, ...],
            step: int | None,
            arguments: GiveFault,
            steps: int,
            disturb: Disturb | None,
        ) -> Outcome:
            folder = Path(root) / str(number)
            folder.mkdir()
            outcome = measure(name, expected, step, arguments(folder), steps, disturb, folder)
            print(
                f"{name}: {', '.join(outcome.findings) or 'nothing'} ({outcome.seconds:.0f} s)",
                file=sys.stderr,
            )
            return outcome

        for number, fault in enumerate(chosen):
            outcomes.append(
                run(number, fault.name, fault.rules, fault.step, fault.arguments, fault.steps, fault.disturb)
            )
        for seed in () if options.only else HEALTHY_SEEDS:
            seeded = words("--seed", str(seed), "--rollout-seed", str(seed))
            healthy.append(run(1000 + seed, f"healthy seed {seed}", (), None, seeded, 80, None))
    print(table(outcomes, healthy))
    if options.json is not None:
        options.json.write_text(
            json.dumps([o.__dict__ | {"delay": o.delay} for o in [*outcomes, *healthy]], indent=1)
        )
    return 0 if all(o.found for o in outcomes) and not any(o.findings for o in healthy) else 1


if __name__ == "__main__":
    sys.exit(main())
