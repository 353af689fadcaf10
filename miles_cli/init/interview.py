"""The interview: from what the user says and what the world shows to an answer for every question.

It is a pure function of both, so a form can hold it again after every key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from miles_cli.init import suggest_data, suggest_model, suggest_sizes
from miles_cli.init.answers import as_text
from miles_cli.init.questions import CUSTOM, QUESTIONS, Question, Value
from miles_cli.init.scene import Scene, Suggestion
from miles_cli.init.world import World

_SUGGEST: dict[str, Callable[[Scene], Suggestion | None]] = {
    "hf_checkpoint": suggest_model.hf_checkpoint,
    "profile": suggest_model.profile,
    "address": suggest_model.address,
    "actor_num_nodes": suggest_model.actor_num_nodes,
    "actor_num_gpus_per_node": suggest_model.actor_num_gpus_per_node,
    "prompt_data": suggest_data.prompt_data,
    "input_key": suggest_data.input_key,
    "label_key": suggest_data.label_key,
    "apply_chat_template": suggest_data.apply_chat_template,
    "rm_type": suggest_data.rm_type,
    "custom_rm_path": lambda scene: None,
    "hold_out": suggest_data.hold_out,
    "eval_prompt_data": suggest_data.eval_prompt_data,
    "rollout_max_prompt_len": suggest_sizes.rollout_max_prompt_len,
    "rollout_max_response_len": suggest_sizes.rollout_max_response_len,
    "rollout_stop_token_ids": suggest_sizes.rollout_stop_token_ids,
    "rollout_batch_size": suggest_sizes.rollout_batch_size,
    "n_samples_per_prompt": suggest_sizes.n_samples_per_prompt,
    "num_rollout": suggest_sizes.num_rollout,
    "lr": suggest_sizes.lr,
    "max_tokens_per_gpu": suggest_sizes.max_tokens_per_gpu,
    "max_running_requests": suggest_sizes.max_running_requests,
    "save_interval": suggest_sizes.save_interval,
}


def _needs_template(scene: Scene) -> bool:
    """Whether there is something to decide: a template, messages, or the user's word."""
    template = scene.checkpoint is not None and scene.checkpoint.facts.has_chat_template
    messages = scene.columns is not None and scene.text("input_key") in scene.columns.messages
    return template or messages or "apply_chat_template" in scene.given


def _holds_out(scene: Scene) -> bool:
    whole = scene.own_data() and "@[" not in scene.text("prompt_data")
    return whole and not scene.given.get("eval_prompt_data")


def _stops_early(scene: Scene) -> bool:
    known = scene.checkpoint is not None and scene.checkpoint.facts.turn_end is not None
    return "rollout_stop_token_ids" in scene.given or (
        known and bool(scene.answers.get("apply_chat_template"))
    )


def _has_lengths(scene: Scene) -> bool:
    """Whether prompts are known and can be measured, so that a limit can be suggested; or one is given."""
    return "rollout_max_prompt_len" in scene.given or bool(
        scene.positions and scene.data and not scene.data.problem and scene.data.unit == "tokens"
    )


_ASKED: dict[str, Callable[[Scene], bool]] = {
    "address": lambda scene: scene.on_cluster or "address" in scene.given,
    "actor_num_nodes": lambda scene: scene.on_cluster,
    "actor_num_gpus_per_node": lambda scene: scene.on_cluster,
    "input_key": lambda scene: bool(scene.text("prompt_data")),
    "label_key": lambda scene: bool(scene.text("prompt_data")),
    "apply_chat_template": _needs_template,
    "rm_type": lambda scene: "label_key" in scene.answers or "rm_type" in scene.given,
    "custom_rm_path": lambda scene: scene.text("rm_type") == CUSTOM,
    "hold_out": _holds_out,
    "eval_prompt_data": lambda scene: not scene.number("hold_out"),
    "rollout_max_prompt_len": _has_lengths,
    "rollout_stop_token_ids": _stops_early,
    "num_rollout": lambda scene: bool(scene.text("prompt_data")) or "num_rollout" in scene.given,
    "lr": lambda scene: scene.parameters is not None or "lr" in scene.given,
    "max_tokens_per_gpu": lambda scene: bool(
        scene.recipe and scene.recipe.config.training.use_dynamic_batch_size
    ),
    "max_running_requests": lambda scene: bool(
        scene.recipe and scene.recipe.config.rollout.backend == "native"
    ),
    "save_interval": lambda scene: scene.number("num_rollout") is not None,
}
"""When a question is asked; the others always are. Nothing is asked that waits for an open answer."""


@dataclass(frozen=True)
class Answer:
    """The answer to one question, and why it is that."""

    question: Question
    value: Value
    why: str
    given: bool
    """Whether the user said it."""


@dataclass(frozen=True)
class Interview:
    """Every question that was asked, with its answer or open."""

    answers: tuple[Answer, ...]
    missing: tuple[Question, ...]
    """Asked, but without an answer or a suggestion."""
    unused: tuple[Question, ...]
    """Answered by the user, but not asked: the answer would have no effect."""
    scene: Scene

    @property
    def values(self) -> dict[str, Value]:
        """The answers by question."""
        return {answer.question.id: answer.value for answer in self.answers}

    def answer(self, question: str) -> Answer | None:
        """The answer to one question."""
        return next((answer for answer in self.answers if answer.question.id == question), None)


def hold(world: World, given: Mapping[str, Value]) -> Interview:
    """Ask every question that applies; suggestions stand in for answers that the user did not give."""
    answers: list[Answer] = []
    missing: list[Question] = []
    unused: list[Question] = []
    values: dict[str, Value] = {}
    for question in QUESTIONS:
        scene = Scene(world, given, dict(values))
        if not _ASKED.get(question.id, lambda scene: True)(scene):
            unused += [question] if question.id in given else []
            continue
        answer = _answer(question, scene)
        if answer is None:
            missing.append(question)
            continue
        answers.append(answer)
        values[question.id] = answer.value
    return Interview(tuple(answers), tuple(missing), tuple(unused), Scene(world, given, values))


def _answer(question: Question, scene: Scene) -> Answer | None:
    suggestion = _SUGGEST[question.id](scene)
    if question.id not in scene.given:
        return Answer(question, suggestion.value, suggestion.why, given=False) if suggestion else None
    value = scene.given[question.id]
    if suggestion is not None and suggestion.value == value:
        return Answer(question, value, suggestion.why, given=True)
    if suggestion is None or suggestion.is_fallback:
        return Answer(question, value, "your answer", given=True)
    instead = as_text(suggestion.value) or "none"
    return Answer(question, value, f"your answer; suggested was {instead}: {suggestion.why}", given=True)


def choices(question: str, scene: Scene) -> tuple[str, ...]:
    """The answers to choose from; empty where any text will do."""
    if question == "profile":
        layers = (suggest_model.LAPTOP, suggest_model.CLUSTER)
        return tuple(dict.fromkeys((*scene.world.recipes(), *layers)))
    if question == "rm_type":
        return suggest_data.reward_choices()
    if question in ("input_key", "label_key") and scene.columns is not None:
        return scene.columns.names
    return ()
