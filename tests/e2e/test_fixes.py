"""From the symptom to its fix with two keys, in a real dashboard on a real, collapsing run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_support import Cli, summary_of
from terminal import Terminal

from miles.record import RunReader

pytestmark = pytest.mark.slow

LR = 4e-3
COLLAPSING = ("--profile", "quickstart", "--lr", str(LR), "--save-interval", "4", "--skip-eval-before-train")
UNHURRIED_REWARD = """
import time
from pathlib import Path

def judge(args, sample):
    time.sleep(0.002)
    while Path("{hold}").exists():
        time.sleep(0.002)
    return float(sample.response == sample.label and sample.status.value == "completed")
"""
"""The exact reward at half a second per step, and without an end while there is that file."""
SIZE = (120, 40)
Watch = Callable[..., Terminal]


@pytest.fixture
def watch(cli: Cli) -> Iterator[Watch]:
    """Starts `miles` on a pseudo-terminal; what it leaves running is killed."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(list(arguments), cli.environment, SIZE))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()
    for run in cli.runs.glob("*"):
        if run.is_dir() and not RunReader(run, read=False).status().ended:
            for beat in RunReader(run, read=False).heartbeats().values():
                os.kill(beat.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def untouched(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe that collapses, left alone."""
    cli = Cli(shared_cache, tmp_path_factory.mktemp("untouched"))
    assert cli("train", *COLLAPSING).returncode == 0
    return cli.only_run()


def rewards(run: Path) -> list[float]:
    return list(RunReader(run).series("rollout/raw_reward").values)


def rates(run: Path) -> dict[int, float]:
    return dict(RunReader(run).series("train/lr"))


def raised(run: Path) -> list[str]:
    return [alert["rule"] for alert in RunReader(run).alerts() if alert["state"] == "raised"]


def proposed_lr(terminal: Terminal) -> float:
    """The learning rate in the fix on the screen."""
    rate = float(on_screen(terminal, r"\+ lr = ([0-9.e-]+)[^0-9.e-]"))
    assert rate <= LR / 5
    return rate


def on_screen(terminal: Terminal, pattern: str) -> str:
    """The one group of `pattern` once it is drawn; what follows the group shows that it is whole."""
    terminal.wait_for(lambda: bool(re.search(pattern, terminal.text())), f"{pattern!r}")
    (found,) = set(re.findall(pattern, terminal.text()))
    return str(found)


def a_run(cli: Cli, other_than: tuple[Path, ...] = ()) -> Path | None:
    found = [path for path in cli.runs.glob("*") if path.is_dir() and path not in other_than]
    return found[0] if found else None


def test_left_alone_the_recipe_dies(untouched: Path) -> None:
    assert "OP8" in raised(untouched)
    assert statistics.fmean(rewards(untouched)[-10:]) < 0.1


def test_a_live_fix_changes_the_run_at_the_next_step_and_it_recovers(
    cli: Cli, watch: Watch, untouched: Path, tmp_path: Path
) -> None:
    hook, hold = tmp_path / "unhurried.py", tmp_path / "hold"
    hook.write_text(UNHURRIED_REWARD.format(hold=hold))
    terminal = watch("train", *COLLAPSING, "--custom-rm-path", f"{hook}:judge", "--watch")
    terminal.wait_for(lambda: a_run(cli) is not None, "a run directory")
    run = a_run(cli)
    assert run is not None
    terminal.wait_for(lambda: "OP8" in raised(run), "the alert of the collapse")
    hold.touch()  # The policy falls in steps, a hand moves in seconds.
    terminal.wait_for_text("OP8")
    terminal.press("f")
    rate = proposed_lr(terminal)
    terminal.press("enter")
    terminal.wait_for(lambda: bool(list((run / "control").glob("*.json"))), "the request")
    hold.unlink()
    terminal.wait_for_text(f"optimizer.lr = {rate:g}")
    terminal.wait_for(lambda: bool(RunReader(run).events("control")), "the answer of the run")
    (answer,) = RunReader(run).events("control")
    assert (answer["action"], answer["state"], answer["by"]) == ("set", "applied", "watch")
    assert answer["patch"] == {"optimizer.lr": rate}
    terminal.wait_for(lambda: RunReader(run).status().ended, "the end of the run")
    assert terminal.leave() == 0

    fixed_after = answer["step"]
    assert rates(run)[fixed_after] == pytest.approx(LR)
    assert rates(run)[fixed_after + 1] == pytest.approx(rate)
    recovered = statistics.fmean(rewards(run)[-10:])
    at_the_fix = statistics.fmean(rewards(run)[fixed_after - 5 : fixed_after])
    assert recovered > at_the_fix + 0.2
    assert recovered > statistics.fmean(rewards(untouched)[-10:]) + 0.3
    shown = cli("runs", "show", run.name).stdout
    assert f"after step {fixed_after} by watch: optimizer.lr = {rate:g}" in shown


def test_a_resume_fix_goes_back_before_the_fall_and_ends_healthy(
    cli: Cli, watch: Watch, untouched: Path
) -> None:
    run = shutil.copytree(untouched, cli.runs / untouched.name)
    terminal = watch("watch", run.name)
    terminal.wait_for_text("OP8")
    terminal.press("f")
    rate = proposed_lr(terminal)
    start = int(on_screen(terminal, r"--from-step (\d+)\D"))
    terminal.press("enter")
    terminal.wait_for(lambda: RunReader(run).attempt == 2, "the second attempt")
    terminal.wait_for_text(f"goes on from step {start}")
    terminal.press("escape")
    terminal.wait_for(lambda: summary_of(run)["attempt"] == 2, "the end of the second attempt")
    assert terminal.leave() == 0

    assert rates(run)[start] == rates(untouched)[start] > 2 * rate
    assert rates(run)[start + 1] == pytest.approx(rate)
    assert rewards(run)[:start] == rewards(untouched)[:start]
    assert statistics.fmean(rewards(run)[-10:]) > 0.6
    assert summary_of(run)["status"] == "finished"
    shown = cli("runs", "show", run.name).stdout
    assert f"started from step {start} by watch, optimizer.lr {LR:g} -> {rate:g}" in shown
