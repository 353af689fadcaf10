"""`miles data show` prints what a run would read, and every row that it would leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_cli.main import run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        '{"input": "Add 1", "label": 2}',
        '{"input": "Add',
        '{"input": "Add \\u001b[31m 2", "label": "3"}',
    ]
    path.write_text("\n".join([*rows, json.dumps({"input": "word " * 30, "label": "4"})]))
    return path


def test_rows_lengths_and_problems_are_shown(
    prompts: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--label-key", "label", "--tokenizer", str(checkpoint), "--rollout-max-prompt-len", "20"]
    assert run(["data", "show", str(prompts), *arguments]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 2 usable" in out
    assert "left out: 2 rows" in out
    assert "line 2: not JSON at column 11" in out
    assert "line 4: the prompt has" in out
    assert "· label 2\n  Add 1\n  ids " in out
    assert "\x1b" not in out
    assert r"Add \x1b[31m 2" in out


def test_json_holds_the_same_facts(
    prompts: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--apply-chat-template", "--tokenizer", str(checkpoint), "--n", "1", "--json"]
    assert run(["data", "show", str(prompts), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["usable"], found["unit"], found["measured"]) == (4, 3, "tokens", 3)
    assert found["problems"][0]["line"] == 2
    (prompt,) = found["prompts"]
    assert prompt["text"] == "<|im_start|>user\nAdd 1<|im_end|>\n<|im_start|>assistant\n"
    assert len(prompt["token_ids"]) == found["lengths"]["min"]


def test_without_a_tokenizer_lengths_are_characters(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "show", f"{prompts}@[0:1]"]) == 0
    captured = capsys.readouterr()
    assert "prompt characters of 1 rows: min 5  median 5" in captured.out
    assert "--tokenizer" in captured.err


def test_built_in_data_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path))
    assert (
        run(["data", "show", "builtin:sort/test", "--label-key", "label", "--tokenizer", "builtin:sort"]) == 0
    )
    out = capsys.readouterr().out
    assert "512 rows, 512 usable" in out
    assert "prompt tokens of 512 rows: min 10" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.jsonl"], 1, "no such prompt file"),
        (["{path}", "--apply-chat-template"], 2, "without a tokenizer"),
        (["{path}", "--tokenizer", "nowhere"], 1, "no such checkpoint directory"),
        (["{path}", "--tokenizer", "{ckpt}", "--apply-chat-template-kwargs", "[1]"], 2, "not a JSON object"),
        (["{path}@[9:]"], 1, "selects no row"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str],
    code: int,
    message: str,
    prompts: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [a.format(path=prompts, ckpt=checkpoint) for a in arguments]
    assert run(["data", "show", *filled]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
