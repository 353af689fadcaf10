"""Suggestions about the prompts, the reward and the evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from miles.data.tasks import is_builtin
from miles.planning.capabilities import capabilities
from miles_cli.init.questions import CUSTOM
from miles_cli.init.scene import Scene, Suggestion

INPUT_NAMES = ("input", "prompt", "question", "problem", "messages", "instruction", "query", "text")
LABEL_NAMES = (
    "label", "answer", "expected_answer", "final_answer", "ground_truth", "target", "solution", "reference",
    "response",
)  # fmt: skip
TEMPLATE_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<｜User｜>", "[gMASK]")
"""What a prompt holds that a chat template has rendered already."""

HOLD_OUT_FROM = 200
"""Rows from which on a part is kept for evaluation."""

HOLD_OUT_MOST = 256
MATHEMATICS = re.compile(r"\\|\$|^\s*[-+]?[\d.,]+\s*(/\s*\d+|%|e[-+]?\d+)?\s*$")
"""LaTeX, or a number."""


def prompt_data(scene: Scene) -> Suggestion | None:
    """The prompts that the profile names, where they are those of its own model."""
    known = scene.from_profile("data.prompt_data")
    return known if known and is_builtin(scene.text("hf_checkpoint")) else None


def input_key(scene: Scene) -> Suggestion | None:
    """The profile's column if the data has it; else a column by a usual name, or the one with messages."""
    columns = scene.columns
    if columns is None or columns.problem:
        return None
    known = scene.from_profile("data.input_key")
    if known and known.value in columns.names:
        return known
    return _by_name(INPUT_NAMES, columns.names) or _only(columns.messages, "the column with chat messages")


def label_key(scene: Scene) -> Suggestion | None:
    """The profile's column if the data has it; else a column by a usual name; none with a custom reward."""
    columns = scene.columns
    if columns is None or columns.problem:
        return None
    known = scene.from_profile("data.label_key")
    if known and known.value in columns.names:
        return known
    others = tuple(name for name in columns.names if name != scene.text("input_key"))
    named = _by_name(LABEL_NAMES, others)
    if named is None and "custom_rm_path" in scene.given:
        return Suggestion("", "no column has a usual name for answers, and your reward may need none")
    return named


def _by_name(usual: Iterable[str], names: tuple[str, ...]) -> Suggestion | None:
    listed = ", ".join(names)
    return next((Suggestion(name, f"the columns are {listed}") for name in usual if name in names), None)


def _only(names: Iterable[str], why: str) -> Suggestion | None:
    found = tuple(names)
    return Suggestion(found[0], why) if len(found) == 1 else None


def apply_chat_template(scene: Scene) -> Suggestion | None:
    """Messages need the template; text gets it where the checkpoint has one and it was not applied yet."""
    columns, checkpoint = scene.columns, scene.checkpoint
    if columns is None or checkpoint is None:
        return None
    if scene.text("input_key") in columns.messages:
        return Suggestion(True, "the prompts are chat messages")
    if not checkpoint.facts.has_chat_template:
        return Suggestion(False, "the checkpoint has no chat template")
    known = scene.from_profile("data.apply_chat_template")
    if known:
        return known
    first = (columns.texts or {}).get(scene.text("input_key"), ())
    if any(mark in text for text in first for mark in TEMPLATE_MARKS):
        return Suggestion(False, "the prompts hold the marks of a chat template already")
    return Suggestion(True, "the checkpoint has a chat template: each prompt becomes a user's message")


def reward_choices() -> tuple[str, ...]:
    """Verifiers that a run can use today, and `custom`; one that judges nothing is for rehearsals."""
    usable = map(str, capabilities().values.get("reward.rm_type", ()))
    return (*(name for name in usable if name != "random"), CUSTOM)


def rm_type(scene: Scene) -> Suggestion | None:
    """The profile's; `math` for mathematical answers in free text, `exact` for others."""
    if "custom_rm_path" in scene.given:
        return Suggestion(CUSTOM, "--custom-rm-path names your function")
    known = scene.from_profile("reward.rm_type")
    if known:
        return known
    labels = ((scene.columns.texts or {}) if scene.columns else {}).get(scene.text("label_key"), ())
    if not labels:
        return None
    mathematical = all(MATHEMATICS.search(label) for label in labels)
    if mathematical and (scene.answers.get("apply_chat_template") or any("\\" in label for label in labels)):
        return Suggestion(
            "math", "the expected answers are numbers or LaTeX, and the responses are free text"
        )
    return Suggestion("exact", "the expected answers are short texts: 1 for the same text, else 0")


def hold_out(scene: Scene) -> Suggestion | None:
    """One row in twenty of a file that is long enough."""
    rows = scene.columns.num_rows if scene.columns else 0
    if rows < HOLD_OUT_FROM:
        return Suggestion(0, f"{rows:,} rows are too few to spare some")
    return Suggestion(
        min(HOLD_OUT_MOST, rows // 20), f"a twentieth of {rows:,} rows, at most {HOLD_OUT_MOST}"
    )


def eval_prompt_data(scene: Scene) -> Suggestion | None:
    """The profile's held-out set beside its own prompts; else none."""
    known = scene.from_profile("eval.eval_prompt_data")
    if known and is_builtin(scene.text("prompt_data")) and scene.recipe:
        return Suggestion(scene.recipe.config.eval.eval_prompt_data[1], known.why)
    if scene.number("hold_out"):
        return Suggestion("", "the rows that are held out above")
    return Suggestion("", "no held-out prompts are known; the reward of the rollouts is the only curve")
