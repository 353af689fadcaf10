"""The interview is a function of what the user says and what the world shows; nothing else decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from miles.config import Origin, ResolvedConfig, resolve, shipped_names
from miles.errors import ConfigError, MilesError
from miles.planning.facts import CheckpointFacts, Gpu, MachineFacts
from miles.planning.facts.checkpoint import read_checkpoint
from miles_cli.init.answers import as_text, as_words, parse
from miles_cli.init.interview import choices, hold
from miles_cli.init.profile_notes import comment_above
from miles_cli.init.questions import BY_ID, QUESTIONS, Value
from miles_cli.init.run_file import command, minimal, render, settings
from miles_cli.init.suggest_model import LAPTOP
from miles_cli.init.world import Answers, CheckpointLook, Columns, DataLook, RayFacts

GIB = 2**30
MACHINE = MachineFacts(2, 16 * GIB, 8 * GIB, "/", 50 * GIB, (), ())
NO_CLUSTER = RayFacts(installed=True)
SORT = read_checkpoint("builtin:sort")[0]
OWN = CheckpointLook(replace(SORT, name="/models/own", state="directory"))
CHAT = replace(OWN, facts=replace(OWN.facts, has_chat_template=True))
NUMBERS = Columns("p.jsonl", "", 1000, ("question", "answer"), frozenset(), {"answer": ("42", "-3.5")})
SHORT = DataLook("p.jsonl", "", 1000, "tokens", 20, 30, 33, 5)


@dataclass
class FakeWorld:
    """A world made of values."""

    machine: MachineFacts = MACHINE
    ray: RayFacts = NO_CLUSTER
    look: CheckpointLook = OWN
    found: Columns = NUMBERS
    lengths: DataLook = SHORT
    bytes_per_request: int = 1
    asked: list[Answers] = field(default_factory=list)

    def recipes(self) -> tuple[str, ...]:
        return tuple(name for name in shipped_names() if "/" not in name)

    def recipe(self, profile: str) -> ResolvedConfig | None:
        try:
            return resolve(run_file=Path("run.toml"), run_text=minimal({"profile": profile}))
        except ConfigError:
            return None

    def note(self, origin: Origin) -> str:
        return ""

    def checkpoint(self, name: str) -> CheckpointLook:
        return CheckpointLook(SORT) if name == "builtin:sort" else self.look

    def columns(self, path: str) -> Columns:
        if path.startswith("builtin:"):
            return Columns(path, "", 8192, ("input", "label"), frozenset(), {"label": ("123",)})
        return self.found

    def data(
        self, path: str, input_key: str, label_key: str, checkpoint: str, chat_template: bool
    ) -> DataLook:
        return self.lengths

    def memory_needed(self, answers: Answers) -> int | None:
        self.asked.append(answers)
        return int(answers.get("max_running_requests", 1)) * self.bytes_per_request


MINE: dict[str, Value] = {"hf_checkpoint": "/models/own", "prompt_data": "p.jsonl"}


def test_without_a_word_it_is_the_quickstart() -> None:
    interview = hold(FakeWorld(), {})
    quickstart = resolve("quickstart")
    assert interview.missing == interview.unused == ()
    assert (interview.values["hf_checkpoint"], interview.values["profile"]) == ("builtin:sort", "quickstart")
    for key, (_, value) in settings(interview.values).items():
        if key != "rollout.rollout_max_prompt_len":
            assert value == quickstart.value(key), key
    assert not any(answer.given for answer in interview.answers)


def test_a_checkpoint_of_ones_own_needs_prompts_and_nothing_else() -> None:
    assert [q.id for q in hold(FakeWorld(), {"hf_checkpoint": "/models/own"}).missing] == ["prompt_data"]
    interview = hold(FakeWorld(), MINE)
    assert interview.missing == ()
    assert interview.values["profile"] == LAPTOP
    assert (interview.values["input_key"], interview.values["label_key"]) == ("question", "answer")


def test_a_recipe_without_a_checkpoint_asks_for_one() -> None:
    missing = [q.id for q in hold(FakeWorld(), {"profile": "qwen3-moe-fp8"}).missing]
    assert missing[0] == "hf_checkpoint"


def test_a_later_suggestion_follows_an_earlier_answer() -> None:
    small = hold(FakeWorld(), {**MINE, "rollout_batch_size": 4})
    assert small.values["num_rollout"] == min(200, (1000 - 50) // 4)
    assert hold(FakeWorld(), {**MINE, "hold_out": 0}).values["num_rollout"] == 1000 // 32


def test_columns_without_a_usual_name_are_asked_for() -> None:
    world = FakeWorld(found=replace(NUMBERS, names=("a", "b")))
    assert [q.id for q in hold(world, MINE).missing] == ["input_key", "label_key"]
    chat = replace(NUMBERS, names=("turns", "b"), messages=frozenset({"turns"}))
    assert hold(FakeWorld(found=chat), MINE).values["input_key"] == "turns"


@pytest.mark.parametrize(
    ("look", "labels", "reward"),
    [
        (OWN, ("42", "7"), "exact"),
        (CHAT, ("42", "7"), "math"),
        (OWN, (r"\frac{1}{2}", "$x$"), "math"),
        (CHAT, ("Paris", "42"), "exact"),
    ],
)
def test_the_reward_follows_the_expected_answers(
    look: CheckpointLook, labels: tuple[str, ...], reward: str
) -> None:
    world = FakeWorld(look=look, found=replace(NUMBERS, texts={"answer": labels}))
    assert hold(world, MINE).values["rm_type"] == reward


def test_a_reward_function_replaces_the_verifier_and_needs_no_answers() -> None:
    world = FakeWorld(found=replace(NUMBERS, names=("question",)))
    interview = hold(world, {**MINE, "custom_rm_path": "mine.py:reward"})
    assert interview.missing == ()
    assert (interview.values["rm_type"], interview.values["label_key"]) == ("custom", "")
    keys = settings(interview.values)
    assert keys["reward.custom_rm_path"][1] == "mine.py:reward"
    assert not {"reward.rm_type", "data.label_key"} & keys.keys()


def test_the_chat_template_is_for_prompts_that_it_was_not_applied_to() -> None:
    assert hold(FakeWorld(look=CHAT), MINE).values["apply_chat_template"] is True
    assert "apply_chat_template" not in hold(FakeWorld(), MINE).values
    rendered = replace(NUMBERS, texts={"question": ("<|im_start|>user",), "answer": ("1",)})
    assert hold(FakeWorld(look=CHAT, found=rendered), MINE).values["apply_chat_template"] is False


def test_the_end_of_a_turn_becomes_a_stop_token_only_where_it_is_none() -> None:
    ending = replace(CHAT, facts=replace(CHAT.facts, turn_end=(7, "<|im_end|>")))
    keys = settings(hold(FakeWorld(look=ending), MINE).values)
    assert keys["rollout.rollout_stop_token_ids"][1] == (7,)
    assert "rollout.rollout_stop_token_ids" not in settings(hold(FakeWorld(look=CHAT), MINE).values)


def test_rows_are_held_out_of_a_long_file_only() -> None:
    keys = settings(hold(FakeWorld(), MINE).values)
    assert keys["data.prompt_data"][1] == "p.jsonl@[:-50]"
    assert keys["eval.eval_prompt_data"][1] == ("held_out", "p.jsonl@[-50:]")
    short = settings(hold(FakeWorld(found=replace(NUMBERS, num_rows=199)), MINE).values)
    assert short["data.prompt_data"][1] == "p.jsonl"
    assert short["eval.eval_prompt_data"][1] == ()
    given = hold(FakeWorld(), {**MINE, "eval_prompt_data": "held/test.jsonl"})
    assert settings(given.values)["eval.eval_prompt_data"][1] == ("test", "held/test.jsonl")
    assert settings(given.values)["data.prompt_data"][1] == "p.jsonl"


def test_lengths_come_from_the_data_and_end_at_the_models_positions() -> None:
    exact = hold(FakeWorld(), MINE).values
    assert (exact["rollout_max_prompt_len"], exact["rollout_max_response_len"]) == (48, 5 + 1 + 1)
    long = hold(FakeWorld(lengths=replace(SHORT, longest=250)), {**MINE, "rm_type": "math"}).values
    assert (long["rollout_max_prompt_len"], long["rollout_max_response_len"]) == (128, 128)


def test_a_rollout_never_asks_for_more_prompts_than_there_are() -> None:
    interview = hold(FakeWorld(found=replace(NUMBERS, num_rows=20)), MINE)
    assert interview.values["rollout_batch_size"] == 16


def test_requests_are_halved_until_the_run_fits_the_free_memory() -> None:
    answer = hold(FakeWorld(bytes_per_request=GIB), MINE).answer("max_running_requests")
    assert answer is not None and answer.value == 4
    assert "256 would need more than the free memory" in answer.why


def test_an_answer_of_the_user_always_wins_and_says_what_was_suggested() -> None:
    answer = hold(FakeWorld(), {"lr": 1e-4}).answer("lr")
    assert answer is not None and answer.given and answer.value == 1e-4
    mine = hold(FakeWorld(), MINE).answer("hf_checkpoint")
    assert mine is not None and mine.why == "your answer"
    assert "suggested was 4e-4" in answer.why
    same = hold(FakeWorld(), {"lr": 4e-4}).answer("lr")
    assert same is not None and "suggested" not in same.why


def test_an_answer_that_would_have_no_effect_is_reported() -> None:
    interview = hold(FakeWorld(), {"custom_rm_path": "a:b", "rm_type": "exact", "hold_out": 5})
    assert [question.id for question in interview.unused] == ["custom_rm_path", "hold_out"]


def test_gpus_are_not_suggested_while_no_backend_can_use_them() -> None:
    from miles.planning.capabilities import capabilities

    parts = capabilities().parts
    usable = parts["executor", "ray"].available and parts["trainer", "megatron"].here(on_gpus=True).available
    world = FakeWorld(machine=replace(MACHINE, gpus=(Gpu("H200", 140 * GIB),)))
    assert hold(world, MINE).values["profile"].startswith("base/grpo,base/cluster" if usable else LAPTOP)


def test_a_cluster_profile_asks_where_the_cluster_is() -> None:
    world = FakeWorld(ray=RayFacts(True, "head:6379", True))
    interview = hold(world, {**MINE, "profile": "base/grpo,base/cluster"})
    assert interview.values["address"] == "http://head:8265"
    assert interview.values["actor_num_gpus_per_node"] == 8


def test_a_missing_checkpoint_does_not_stop_the_interview() -> None:
    nowhere = CheckpointLook(CheckpointFacts("/nowhere", "missing", problem="is not a directory"))
    interview = hold(FakeWorld(look=nowhere), {"hf_checkpoint": "/nowhere"})
    assert [question.id for question in interview.missing] == ["prompt_data"]
    assert str(interview.scene.checkpoint) == "/nowhere: is not a directory"


@pytest.mark.parametrize(
    ("question", "text", "value"),
    [
        ("lr", " 3e-4 ", 3e-4),
        ("num_rollout", "1,000", 1000),
        ("apply_chat_template", "N", False),
        ("label_key", "", ""),
        ("rollout_stop_token_ids", "1, 2", "1, 2"),
        ("actor_num_gpus_per_node", "0", 0),
    ],
)
def test_typed_words_become_answers(question: str, text: str, value: Value) -> None:
    assert parse(BY_ID[question], text) == value


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("lr", "fast"),
        ("lr", "inf"),
        ("num_rollout", "0"),
        ("num_rollout", "2.5"),
        ("apply_chat_template", "maybe"),
        ("prompt_data", ""),
        ("rollout_stop_token_ids", "eos"),
    ],
)
def test_what_is_no_answer_is_refused_under_its_flag(question: str, text: str) -> None:
    with pytest.raises(MilesError) as refused:
        parse(BY_ID[question], text)
    assert refused.value.where == BY_ID[question].flag


def test_a_reward_that_does_not_exist_is_refused_with_the_nearest() -> None:
    offered = choices("rm_type", hold(FakeWorld(), {}).scene)
    with pytest.raises(MilesError, match="mth") as refused:
        parse(BY_ID["rm_type"], "mth", offered)
    assert "math" in refused.value.fix


def test_every_question_has_a_flag_of_its_own_and_a_key_that_exists() -> None:
    from miles.config import find_flag, find_key

    assert len({question.flag for question in QUESTIONS}) == len(QUESTIONS)
    for question in QUESTIONS:
        if question.setting:
            found = find_key(question.setting)
            assert found is not None and found.flag == question.flag
            assert find_flag(question.flag) is not None


def test_the_run_file_says_why_for_every_value_and_reads_back() -> None:
    interview = hold(FakeWorld(), {**MINE, "lr": 2e-4})
    text = render(interview, "my run.toml", ("machine: two\ncores",), "file:///schema.json")
    lines = text.splitlines()
    assert lines[0] == "#:schema file:///schema.json"
    assert "# machine: two cores" in lines
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), f"nothing says why {line}"
    resolved = resolve(run_file=Path("my run.toml"), run_text=text)
    for key, (_, value) in settings(interview.values).items():
        assert resolved.value(key) == value
    assert str(resolved.origin("optimizer.lr")) == f"my run.toml:{lines.index('lr = 2e-4') + 1}"


def test_the_command_in_the_file_gives_every_answer_again() -> None:
    import shlex

    interview = hold(FakeWorld(look=CHAT), {**MINE, "hf_checkpoint": "/models/my own"})
    words = shlex.split(command(interview, "run.toml"))
    assert words[:4] == ["miles", "init", "run.toml", "--yes"]
    for answer in interview.answers:
        expected = as_words(answer.question, answer.value)
        at = words.index(expected[0])
        assert tuple(words[at : at + len(expected)]) == expected
        if len(expected) == 2:
            assert parse(answer.question, as_text(answer.value)) == answer.value


def test_a_profiles_own_comment_is_the_reason_for_its_value() -> None:
    resolved = resolve("quickstart")
    assert (
        comment_above(resolved.origin("reward.rm_type")) == "1 for the exact answer and an end token, else 0"
    )
    assert comment_above(resolved.origin("rollout.num_rollout")) == ""
