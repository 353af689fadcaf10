"""Facts are what is really on disk; a missing or damaged file is a fact, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from miles.arch import published_tensors, spec_from_hf_config
from miles.config import parse_flags, resolve
from miles.data.tasks import sort
from miles.planning import Facts, collect_facts, preflight
from miles.planning.facts.checkpoint import read_checkpoint
from miles.planning.facts.files import missing_paths
from miles.planning.facts.hooks import broken_hooks
from miles.planning.facts.machine import read_machine


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of the built-in architecture, with the built-in tokenizer."""
    directory = sort.build_assets(tmp_path / "assets", seed=0).checkpoint
    shapes = published_tensors(spec_from_hf_config(sort.model_config()))
    save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, directory / "model.safetensors")
    return directory


def look_at(*flags: str) -> Facts:
    return collect_facts(resolve(flags=parse_flags(flags)).config)


def test_a_whole_checkpoint(checkpoint: Path) -> None:
    facts, tokenizer = read_checkpoint(str(checkpoint))
    assert tokenizer is not None
    assert (facts.state, facts.weights_problem, facts.shapes_problem) == ("directory", "", "")
    assert facts.spec is not None and facts.spec.num_parameters() == 226_112
    assert facts.weight_bytes == 226_112 * 4
    assert facts.tokenizer_size == 55
    assert not facts.has_chat_template
    assert not facts.has_mtp_weights


def test_a_truncated_weight_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    facts, _ = read_checkpoint(str(checkpoint))
    assert "truncated" in facts.weights_problem
    assert str(path) in facts.weights_problem


def test_weights_of_another_shape_are_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 56}))
    facts, _ = read_checkpoint(str(checkpoint))
    assert "model.embed_tokens.weight" in facts.shapes_problem


def test_mtp_weights_are_found_behind_the_last_layer(checkpoint: Path) -> None:
    save_file({"model.layers.2.eh_proj.weight": np.zeros(4, np.float32)}, checkpoint / "model.safetensors")
    facts, _ = read_checkpoint(str(checkpoint))
    assert facts.has_mtp_weights


def test_a_directory_without_files_has_a_problem_of_each_kind(tmp_path: Path) -> None:
    facts, tokenizer = read_checkpoint(str(tmp_path))
    assert tokenizer is None
    assert facts.spec_problem and facts.weights_problem and facts.tokenizer_problem


def test_names_that_lead_nowhere() -> None:
    assert read_checkpoint(None)[0].state == "unset"
    assert read_checkpoint("/no/such/dir")[0].state == "missing"
    assert read_checkpoint("builtin:chess")[0].state == "missing"


def test_prompt_lengths_are_sampled_through_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "sort 12="}\n{"input": "sort 1234="}\n')
    facts = look_at("--hf-checkpoint", str(checkpoint), "--prompt-data", str(path))
    assert facts.prompts is not None
    assert facts.prompts.num_rows == 2
    assert facts.prompts.prompt_tokens == (8, 10)
    assert facts.longest_prompt == 10


def test_bad_rows_are_found_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a"}\nnot json\n{"input": ""}\n')
    data = look_at("--prompt-data", str(path)).prompts
    assert data is not None
    assert [line for line, _ in data.bad_rows] == [2, 3]
    assert data.problem == ""


def test_a_file_without_one_good_row_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("not json\n")
    data = look_at("--prompt-data", str(path)).prompts
    assert data is not None and data.exists
    assert "line 1" in data.problem


def test_a_missing_column_is_not_reported_as_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a", "solution": "b"}\n')
    data = look_at("--prompt-data", str(path), "--label-key", "answer").prompts
    assert data is not None
    assert data.keys == {"input", "solution"}
    assert data.columns == (("data.input_key", "input"), ("data.label_key", "answer"))
    assert (data.bad_rows, data.problem) == ((), "")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    data = look_at("--prompt-data", str(tmp_path / "promts.jsonl")).prompts
    assert data is not None and not data.exists
    assert data.suggestion == str(tmp_path / "prompts.jsonl")


def test_slices_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a"}\n' * 10)
    data = look_at("--prompt-data", f"{path}@[2:5]").prompts
    assert data is not None and data.num_rows == 3
    built_in = look_at("--prompt-data", "builtin:sort/train@[0:64]").prompts
    assert built_in is not None and built_in.num_rows == 64


def test_other_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("")
    present = look_at("--load", str(tmp_path), "--custom-rm-path", f"{tmp_path}/reward.py:score")
    assert present.missing == ()
    absent = look_at(
        "--load", f"{tmp_path}/x", "--custom-rm-path", f"{tmp_path}/x.py:score", "--ref-load", "builtin:sort"
    )
    assert [(item.setting, item.expected) for item in absent.missing] == [
        ("model.load", "a directory"),
        ("reward.custom_rm_path", "a file"),
    ]


def test_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = read_machine(tmp_path / "not" / "yet" / "made")
    assert machine.cores >= 1
    assert machine.memory_bytes >= machine.memory_available_bytes > 0
    assert machine.disk_path == str(tmp_path)
    assert machine.disk_free_bytes > 0
    assert machine.variable("OMP_NUM_THREADS") == "3"
    assert machine.variable("CUDA_DEVICE_MAX_CONNECTIONS") is None


def test_missing_hooks_and_teachers_are_named(tmp_path: Path) -> None:
    there = tmp_path / "mine.py"
    there.write_text("")
    words = (
        f"--use-opd --opd-teacher-load {tmp_path}/teacher --rollout-sample-filter-path {tmp_path}/gone.py:f "
        f"--custom-reward-post-process-path {there}:f"
    )
    config = resolve(flags=parse_flags(words.split())).config
    assert [missing.setting for missing in missing_paths(config)] == [
        "distillation.opd_teacher_load",
        "rollout.rollout_sample_filter_path",
    ]


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("def judge(a, s):\n    return 1.0\n", "has no 'judg'; it has judge", "mine.py:judge"),
        ("def judg(a, s) return", ":1 does not parse: expected ':'", ""),
        ("judg = other\n", None, ""),
        ("if True:\n    from rewards import judg\n", None, ""),
        ("from rewards import *\n", None, ""),
    ],
)
def test_a_hook_is_looked_for_in_its_file_without_running_it(
    text: str, said: str | None, fix: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    config = resolve(flags=parse_flags(["--custom-rm-path", f"{tmp_path}/mine.py:judg"])).config
    found = broken_hooks(config)
    if said is None:
        assert found == ()
    else:
        assert said in found[0].what and fix in found[0].fix and found[0].setting == "reward.custom_rm_path"


def test_a_problem_of_a_checkpoint_is_one_line_and_the_rule_has_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    facts, _ = read_checkpoint(str(tmp_path))
    for problem in (facts.spec_problem, facts.weights_problem, facts.tokenizer_problem):
        assert problem and "\n" not in problem and "fix:" not in problem


def test_a_name_of_the_hub_is_told_how_to_come_here() -> None:
    for name, fix in (
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"),
        ("./modl", ""),
    ):
        resolved = resolve(flags=parse_flags(["--hf-checkpoint", name]))
        (found,) = (f for f in preflight(resolved, collect_facts(resolved.config)) if f.rule == "MOD1")
        assert fix in found.fix
        assert bool(fix) == ("hf download" in found.fix)
