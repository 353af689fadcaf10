"""Start-up is cheap: what a command does not need is never loaded, and help and dry run keep their budgets.

A budget is compared with the processor time of the cheapest of several starts: on an idle core that is the
wall time of these single-threaded processes, and beside other work it still says what the program costs. A
quiet two-core machine shows 0.13 s for `--help` and 0.40 s for the dry run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from miles_cli.app import VERBS

HEAVY = {"torch", "ray", "transformers", "textual", "megatron", "sglang"}
PLANNING_ONLY = {"numpy", "pydantic", "asyncio", "pyarrow", "tokenizers", "miles.config", "miles.planning"}

HELP_BUDGET_S = 0.3
DRY_RUN_BUDGET_S = 1.0
STARTS = 10
"""A start that kept the budget settles it; others may have met a busy machine."""

LOADED = """
import json, sys
from miles_cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def loaded(environment: dict[str, str], *words: str) -> tuple[int, set[str]]:
    """Exit code and loaded modules of a command line."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], env=environment, capture_output=True, text=True, timeout=600
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_loads_nothing_but_the_command_tree(environment: dict[str, str], word: str) -> None:
    code, modules = loaded(environment, word)
    assert code == 0
    assert not modules & (HEAVY | PLANNING_ONLY)


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_help_of_a_verb_loads_only_its_module(environment: dict[str, str], verb: str) -> None:
    code, modules = loaded(environment, verb, "--help")
    assert code == 0
    # Typer itself brings pydantic in to read a verb's options.
    assert not modules & (HEAVY | PLANNING_ONLY - {"pydantic"})


def test_a_dry_run_loads_no_heavy_library(environment: dict[str, str]) -> None:
    code, modules = loaded(environment, "train", "--profile", "quickstart", "--dry-run")
    assert code == 0
    assert not modules & HEAVY


def test_profiles_load_no_heavy_library(environment: dict[str, str]) -> None:
    code, modules = loaded(environment, "profiles", "ls")
    assert code == 0
    assert not modules & (HEAVY | {"numpy"})


def keeps(budget: float, environment: dict[str, str], *words: str) -> bool:
    """Whether one of several starts takes fewer processor seconds than the budget."""
    for _ in range(STARTS):
        command = [sys.executable, "-m", "miles_cli", *words]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        if usage.ru_utime + usage.ru_stime < budget:
            return True
    return False


def test_help_keeps_its_budget(environment: dict[str, str]) -> None:
    assert keeps(HELP_BUDGET_S, environment, "--help")


def test_a_dry_run_keeps_its_budget(environment: dict[str, str]) -> None:
    assert keeps(DRY_RUN_BUDGET_S, environment, "train", "--profile", "quickstart", "--dry-run")


def test_help_lists_every_verb_in_its_panel_and_the_exit_codes(miles: Callable) -> None:  # type: ignore[type-arg]
    text = " ".join(miles("--help").stdout.split())
    for verb in VERBS:
        assert verb.panel in text
        assert verb.summary.split(":")[0].split(",")[0] in text
    assert "3 preflight refused" in text


def test_every_verb_has_its_module() -> None:
    commands = Path(__file__).parents[3] / "miles_cli" / "commands"
    assert {path.stem for path in commands.glob("*.py")} - {"__init__"} == {verb.name for verb in VERBS}
