"""`miles plan`: rules explained, the memory of a layout, the GPUs and the matrix."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from miles.planning.rules import REGISTRY

Miles = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("words", [("train", "--explain", "LAY6"), ("plan", "explain", "lay6")])
def test_a_rule_is_explained(miles: Miles, words: tuple[str, ...]) -> None:
    done = miles(*words)
    assert done.returncode == 0
    assert done.stdout.startswith("LAY6 (error): ")
    assert "  why: " in done.stdout and "  fix: " in done.stdout
    assert "docs/reference/preflight.md#lay6" in done.stdout


def test_an_explanation_names_who_ran_into_it(miles: Miles) -> None:
    assert "slime#1951" in miles("plan", "explain", "MEM7").stdout
    assert "slime#1951" in json.loads(miles("plan", "explain", "MEM7", "--json").stdout)["seen"]


def test_an_unknown_rule_suggests_near_ones(miles: Miles) -> None:
    done = miles("train", "--explain", "LAY66")
    assert done.returncode == 2
    assert "did you mean LAY6" in done.stderr


def test_rules_are_listed(miles: Miles) -> None:
    assert {row["rule"] for row in json.loads(miles("plan", "rules", "--json").stdout)} == REGISTRY.keys()
    assert len(miles("plan", "rules").stdout.splitlines()) == len(REGISTRY)


def test_gpus_are_listed(miles: Miles) -> None:
    rows = {row["name"]: row for row in json.loads(miles("plan", "hardware", "--json").stdout)}
    assert rows["B200"]["generation"] == "sm100"
    assert rows["A100"]["fp8_tflops"] is None
    assert "H100         79.6  sm90" in miles("plan", "hardware").stdout


def test_the_matrix_is_listed(miles: Miles) -> None:
    rows = {row["feature"]: row for row in json.loads(miles("plan", "features", "--json").stdout)}
    assert rows["r3"]["state"]["trainer.native"]["cpu"] == "supported"
    assert rows["nvfp4-training"]["hardware"] == ["sm100"]
    line = next(
        row for row in miles("plan", "features").stdout.splitlines() if row.startswith("nvfp4-training")
    )
    assert line.split()[3:6] == ["-", "-", "-"], "only the last generation can do it"


def memory(miles: Miles, *words: str) -> dict:  # type: ignore[type-arg]
    done = miles("plan", "memory", *words, "--json")
    assert done.returncode == 0, done.stderr
    outline: dict = json.loads(done.stdout)  # type: ignore[type-arg]
    return outline


def test_memory_of_a_layout(miles: Miles) -> None:
    outline = memory(miles, "qwen3-30b-a3b", "--hardware", "16xH100", "--layout", "tp4,ep8,etp1")
    assert (outline["layout"]["tp"], outline["layout"]["dp"], outline["layout"]["edp"]) == (4, 4, 2)
    assert outline["layout"]["sequence_parallel"] is True
    training = next(phase for phase in outline["phases"] if phase["name"] == "training")
    weights = next(part for part in training["parts"] if part["name"] == "weights")
    assert weights["bytes"] == 2 * 4_018_747_392


def test_memory_without_a_layout_takes_the_first_that_fits(miles: Miles) -> None:
    outline = memory(miles, "qwen3-14b", "--hardware", "8xA100-80GB")
    assert not outline["problems"]
    assert all(phase["total_bytes"] <= 0.92 * 80 * 2**30 for phase in outline["phases"])


def test_precision_changes_the_engine_and_the_trainer(miles: Miles) -> None:
    sizes = {}
    for precision in ("bf16", "fp8", "int4"):
        layout = ("--layout", "tp4,ep8,etp1", "--precision", precision)
        outline = memory(miles, "qwen3-30b-a3b", "--hardware", "16xB200", *layout)
        sizes[precision] = outline["engine"]["weight_bytes"]
    assert sizes["fp8"] == pytest.approx(sizes["bf16"] / 2, rel=0.03)
    assert sizes["int4"] < 0.35 * sizes["bf16"]


def test_flags_of_train_are_taken_too(miles: Miles) -> None:
    words = ("qwen3-30b-a3b", "--hardware", "16xH100", "--layout", "tp4,ep8,etp1")
    usual = memory(miles, *words)
    fewer = memory(miles, *words, "--rollout-max-context-len", "4096", "--max-tokens-per-gpu", "4096")
    assert fewer["phases"][2]["total_bytes"] < usual["phases"][2]["total_bytes"]
    assert memory(miles, *words, "--disaggregated")["placement"]["total_gpus"] == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("qwen3-9b",), "qwen3-8b"),
        (("qwen3-8b", "--precision", "fp7"), "bf16"),
        (("qwen3-8b", "--layout", "tp4+ep8"), "tp4,pp1"),
        (("qwen3-8b", "--hardware", "cpu"), "8xH100"),
        (("qwen3-8b", "--hardware", "3xFOO"), "error: --hardware: unknown GPU 'FOO'"),
        (("--profile", "quickstart"), "the model comes first"),
        (("qwen3-8b", "--no-such-flag"), "--no-such-flag"),
    ],
)
def test_words_that_cannot_be_read(miles: Miles, words: tuple[str, ...], said: str) -> None:
    done = miles("plan", "memory", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
