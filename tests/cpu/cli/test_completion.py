"""Shell completion: what bash and zsh are told, and that the real shells take it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Miles = Callable[..., "subprocess.CompletedProcess[str]"]

LINES = {
    "miles ini": {"init"},
    "miles profiles show quick": {"quickstart", "quickstart-mtp", "quickstart-sft"},
    "miles profiles explain quickstart optimizer.lr_d": {
        "optimizer.lr_decay_style",
        "optimizer.lr_decay_iters",
    },
    "miles init --rollout-b": {"--rollout-batch-size"},
    "miles init --profile base/grpo,base/l": {"base/grpo,base/laptop"},
    "miles init --rm-type ex": {"exact"},
    "miles train --profile quickstart-": {"quickstart-mtp", "quickstart-sft"},
    "miles train --n-samples-per-p": {"--n-samples-per-prompt"},
    "miles train --advantage-estimator g": {"grpo", "gspo"},
    "miles watch sort-2": {"sort-2026"},
    "miles runs resume sort-2": {"sort-2026"},
}
SLOW = list(LINES)[3:8]
"""Real shells take every line; `make check` tries some, and what zsh is told of all."""


@pytest.fixture
def shell(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A shell with `miles` on its path and one run."""
    (tmp_path / "runs" / "sort-2026").mkdir(parents=True)
    program = tmp_path / "bin" / "miles"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m miles_cli "$@"\n')
    program.chmod(0o755)
    paths = f"{program.parent}:{os.environ['PATH']}"
    return environment | {"PATH": paths, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def in_shell(shell: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, env=shell, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def bash_script() -> str:
    """What `miles` has bash read; the same for every line."""
    words = (sys.executable, "-m", "miles_cli", "--show-completion", "bash")
    return in_shell({**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}, *words)


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow) if line in SLOW else line for line in LINES]
)
def test_bash_completes(shell: dict[str, str], bash_script: str, line: str) -> None:
    words = line.split()
    drive = (
        f"{bash_script}\nCOMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        '_miles_completion miles; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(in_shell(shell, "bash", "--norc", "-c", drive).split()) == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_zsh_is_given_the_same(miles: Miles, tmp_path: Path, line: str) -> None:
    (tmp_path / "runs" / "sort-2026").mkdir(parents=True)
    answer = miles(_MILES_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line).stdout
    assert answer.startswith("_arguments '*: :((")
    for word in LINES[line]:
        assert f'"{word}"' in answer


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_a_profile_at_a_prompt(shell: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "_miles"
    script.write_text(in_shell(shell, "miles", "--show-completion", "zsh"))
    drive = f"""
    zmodload zsh/zpty
    zpty inner zsh -f -i
    zpty -w inner 'PS1=; autoload -U compinit; compinit -u; source {script}'
    zpty -w inner ''
    zpty -n -w inner $'miles train --profile qwen3-m\\t \\C-a\\C-k'
    zpty -w inner 'echo E""ND'
    while zpty -r inner line; do print -r -- "$line"; [[ $line == *END* ]] && break; done
    zpty -d inner
    """
    assert "miles train --profile qwen3-moe-fp8" in in_shell(shell, "zsh", "-f", "-c", drive)
