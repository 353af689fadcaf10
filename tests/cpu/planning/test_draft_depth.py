"""What MTP layers add to a plan: how far ahead they are taught, and their memory."""

from __future__ import annotations

import pytest

from miles.config import parse_flags, resolve
from miles.planning import collect_facts, make_plan
from miles.planning.speculation import mtp_training_steps

MTP = "--mtp-num-layers 1 --enable-mtp-training "
CASES = {
    "nothing but a layer": (MTP, 1),
    "two layers": (MTP.replace("1", "2"), 2),
    "what the engine guesses": (
        MTP + "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 4",
        4,
    ),
    "the engine's own number": (MTP + "--sglang-speculative-algorithm NEXTN", 3),
    "an engine that needs no layer": (MTP + "--sglang-speculative-algorithm NGRAM", 1),
    "as the run file says": (MTP + "--sglang-speculative-algorithm EAGLE --mtp-training-steps 2", 2),
}


@pytest.mark.parametrize(("line", "steps"), CASES.values(), ids=CASES)
def test_training_teaches_what_the_engine_guesses(line: str, steps: int) -> None:
    assert mtp_training_steps(resolve("quickstart", flags=parse_flags(line.split())).config) == steps


def test_the_shipped_profile_teaches_three_steps() -> None:
    assert mtp_training_steps(resolve("quickstart-mtp").config) == 3


@pytest.mark.parametrize(("line", "per_parameter"), [("--mtp-num-layers 1", 4), (MTP, 16)])
def test_mtp_layers_are_counted_in_memory(line: str, per_parameter: int) -> None:
    """119,648 parameters: fp32 weights; with training gradients and two moments as well."""
    run = resolve("quickstart", flags=parse_flags(line.split()))
    parts = {part.name: part.bytes for part in make_plan(run, collect_facts(run.config)).memory.parts}
    assert parts["MTP layers"] == 119_648 * per_parameter
    without = make_plan(resolve("quickstart"), collect_facts(resolve("quickstart").config)).memory.parts
    assert "MTP layers" not in {part.name for part in without}
