"""What the interview looks at: a checkpoint, a prompt file, Ray's address, the reward."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from miles.config import RunConfig, resolve
from miles.data.tasks import resolve_builtin
from miles_cli.init.checkpoint_look import look_at_checkpoint
from miles_cli.init.data_look import look_at_columns, look_at_data
from miles_cli.init.ray_facts import read_ray
from miles_cli.init.reward_trial import try_reward
from miles_cli.init.world import DataLook, RayFacts


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the built-in task."""
    return resolve_builtin("builtin:sort", tmp_path_factory.mktemp("cache")).parent


@pytest.fixture
def checkpoint(task: Path, tmp_path: Path) -> Path:
    """A checkpoint directory that a test may change."""
    return Path(shutil.copytree(task / "checkpoint", tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_checkpoint_shows_its_numbers_and_stop_tokens(checkpoint: Path) -> None:
    look, tokenizer = look_at_checkpoint(str(checkpoint))
    assert tokenizer is not None
    assert look.stop_tokens == ((2, "<eos>"),)
    assert look.model_name == ""
    assert "226,112 parameters (78,656 active)" in str(look)
    assert "8 experts, 2 per token" in str(look)


def test_quantisation_is_named_with_its_blocks(checkpoint: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change(checkpoint / "config.json", quantization_config=fp8)
    assert "fp8 in blocks of 128x128" in str(look_at_checkpoint(str(checkpoint))[0])


def test_a_missing_or_broken_checkpoint_is_a_fact(checkpoint: Path, tmp_path: Path) -> None:
    assert str(look_at_checkpoint(str(tmp_path / "no"))[0]).endswith("no: is not a directory")
    (checkpoint / "config.json").write_text("{")
    assert "config.json" in str(look_at_checkpoint(str(checkpoint))[0])


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_columns_come_from_the_first_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+1="}]
    path = write(tmp_path / "p.jsonl", "not json", {"turns": turns, "n": 2}, {"turns": turns, "extra": None})
    columns = look_at_columns(path)
    assert (columns.names, columns.num_rows) == (("turns", "n", "extra"), 3)
    assert columns.messages == {"turns"}
    assert columns.texts is not None and columns.texts["n"] == ("2",)


def test_a_file_that_cannot_be_read_is_a_problem_in_words(tmp_path: Path) -> None:
    assert "no such prompt file" in look_at_columns(str(tmp_path / "no.jsonl")).problem
    assert "none of the first rows" in look_at_columns(write(tmp_path / "p.jsonl", "a", "b")).problem
    assert "unknown kind" in look_at_columns(write(tmp_path / "p.csv", "a")).problem


def test_lengths_are_tokens_and_bad_rows_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    _, tokenizer = look_at_checkpoint(str(checkpoint))
    rows = [{"q": "sort 21=", "a": "12"}, {"q": "", "a": "1"}, {"q": "sort 4321=", "a": "1234"}]
    look = look_at_data(write(tmp_path / "p.jsonl", *rows), "q", "a", tokenizer, chat_template=False)
    assert (look.unit, look.measured, look.longest, look.longest_label) == ("tokens", 2, 10, 4)
    assert look.bad_rows == 1 and look.first_bad.startswith("line 2")
    assert look.examples == (("sort 21=", "12"), ("sort 4321=", "1234"))
    untokenised = look_at_data(str(tmp_path / "p.jsonl"), "q", "a", None, chat_template=True)
    assert (untokenised.unit, untokenised.longest_label) == ("characters", None)


def test_only_the_beginning_of_a_long_file_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"q": f"{i}"} for i in range(3000)))
    assert look_at_data(path, "q", "", None, False).measured == 1000
    assert look_at_data(f"{path}@[2900:]", "q", "", None, False).measured == 100


def test_rows_that_no_run_could_use_are_a_problem(tmp_path: Path) -> None:
    look = look_at_data(write(tmp_path / "p.jsonl", {"q": 1}), "q", "", None, False)
    assert "no row can be used" in look.problem and "line 1" in look.problem


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}/"])
def test_a_ray_address_is_probed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", form.format(port))
        assert read_ray().reachable is True
    assert read_ray().reachable is False
    assert "does not answer" in str(read_ray())


def test_words_in_place_of_an_address_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert read_ray().reachable is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert (read_ray().address, read_ray().reachable) == ("", None)


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("head:6379", "http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("http://head:9000", "http://head:9000"),
        ("auto", ""),
        ("", ""),
    ],
)
def test_a_run_is_submitted_to_the_job_server_of_the_same_host(address: str, server: str) -> None:
    assert RayFacts(True, address).job_server == server


ROWS = DataLook("p.jsonl", examples=(("1+1=", "2"), ("half", r"\frac{1}{2}")))


def reward_config(**reward: object) -> RunConfig:
    return resolve(sets=[f"reward.{name}={value}" for name, value in reward.items()]).config


def test_a_verifier_works_when_the_answer_scores_1_and_nothing_0() -> None:
    trial = try_reward(reward_config(rm_type="exact"), ROWS)
    assert trial.passed and trial.lines[0] == "'2' scores 1, no answer 0"
    assert try_reward(reward_config(rm_type="math"), ROWS).passed


def test_a_verifier_that_cannot_read_the_answers_fails() -> None:
    blank = DataLook("p.jsonl", examples=(("capital", " "),))
    trial = try_reward(reward_config(rm_type="math"), blank)
    assert trial.passed is False and "math-verify cannot read the label" in str(trial)


def test_a_reward_function_must_tell_the_two_apart(tmp_path: Path) -> None:
    hook = tmp_path / "mine.py"
    hook.write_text(
        "def half(args, sample):\n    return 0.5 * (sample.response == sample.label)\n"
        "def flat(args, sample):\n    return 1.0\n"
        "def broken(args, sample):\n    return sample.nothing\n"
    )
    assert try_reward(reward_config(custom_rm_path=f"{hook}:half"), ROWS).passed
    assert try_reward(reward_config(custom_rm_path=f"{hook}:flat"), ROWS).passed is False
    broken = try_reward(reward_config(custom_rm_path=f"{hook}:broken"), ROWS)
    assert broken.passed is False and "mine.py:6" in str(broken)


def test_without_expected_answers_no_trial_is_made() -> None:
    assert try_reward(reward_config(rm_type="exact"), None).passed is None
    unlabelled = DataLook("p.jsonl", examples=(("1+1=", None),))
    assert try_reward(reward_config(rm_type="exact"), unlabelled).passed is None
