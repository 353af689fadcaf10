"""The prompt source loses nothing silently, and its order is reproducible and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from miles.data.prompts import PromptFormat, PromptKeys
from miles.data.rows import DataPath, parse_data_path
from miles.data.sample import SampleStatus
from miles.data.source import PromptSource, SourceSettings
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import DataError


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def numbered(n: int) -> list[Any]:
    return [{"input": f"Add {i}", "label": str(i)} for i in range(n)]


def source(
    path: Path | str, checkpoint: Path, chat: bool = False, label: str | None = "label", **settings: Any
) -> PromptSource:
    settings.setdefault("keys", PromptKeys(label=label))
    prompt_format = PromptFormat(CheckpointTokenizer(checkpoint), apply_chat_template=chat)
    return PromptSource(parse_data_path(str(path)), prompt_format, SourceSettings(**settings))


def drawn(stream: PromptSource, n: int) -> list[str | None]:
    return [group[0].label for group in stream.next_groups(n)]


def test_groups_are_pending_samples_of_one_prompt(tmp_path: Path, checkpoint: Path) -> None:
    stream = source(write_rows(tmp_path / "p.jsonl", numbered(3)), checkpoint, n_samples_per_prompt=2)
    groups = stream.next_groups(2)
    assert [[(s.index, s.group_index) for s in g] for g in groups] == [[(0, 0), (1, 0)], [(2, 1), (3, 1)]]
    sample = groups[1][1]
    sample.validate()
    assert (sample.prompt, sample.label, sample.status) == ("Add 1", "1", SampleStatus.PENDING)
    assert sample.tokens == CheckpointTokenizer(checkpoint).encode("Add 1")
    assert groups[0][0].tokens is not groups[0][1].tokens


def test_file_order_wraps_around_epochs(tmp_path: Path, checkpoint: Path) -> None:
    stream = source(write_rows(tmp_path / "p.jsonl", numbered(3)), checkpoint)
    assert drawn(stream, 7) == ["0", "1", "2", "0", "1", "2", "0"]
    assert stream.epoch == 2


def test_shuffling_is_keyed_by_seed_and_epoch(tmp_path: Path, checkpoint: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", numbered(20))
    first = source(path, checkpoint, shuffle=True, seed=1)
    epochs = [drawn(first, 20), drawn(first, 20)]
    assert all(sorted(e, key=str) == sorted(map(str, range(20)), key=str) for e in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [str(i) for i in range(20)]
    again = source(path, checkpoint, shuffle=True, seed=1)
    assert [drawn(again, 20), drawn(again, 20)] == epochs
    assert drawn(source(path, checkpoint, shuffle=True, seed=2), 20) != epochs[0]


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 9, 12])
def test_a_resumed_stream_continues_where_it_stood(taken: int, tmp_path: Path, checkpoint: Path) -> None:
    rows = [*numbered(4), {"input": "too " * 50, "label": "long"}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    settings = {"shuffle": True, "seed": 3, "max_prompt_len": 30, "n_samples_per_prompt": 2}
    whole = source(path, checkpoint, **settings)
    before, state = whole.next_groups(taken), json.loads(json.dumps(whole.state()))
    after = whole.next_groups(6)
    resumed = source(path, checkpoint, **settings)
    resumed.load_state(state)
    assert [[s.to_dict() for s in g] for g in resumed.next_groups(6)] == [
        [s.to_dict() for s in g] for g in after
    ]
    assert len({s.index for g in before + after for s in g}) == 2 * (taken + 6)


def test_a_changed_file_or_order_does_not_resume(tmp_path: Path, checkpoint: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", numbered(4))
    state = source(path, checkpoint).state()
    with pytest.raises(DataError, match="shuffle_seed was no shuffle and is 42"):
        source(path, checkpoint, shuffle=True).load_state(state)
    write_rows(path, [*numbered(3), {"input": "Add 9", "label": "9"}])
    with pytest.raises(DataError, match="digest") as error:
        source(path, checkpoint).load_state(state)
    assert "bring the old file" in error.value.fix


def test_malformed_rows_are_reported_by_line_and_counted(tmp_path: Path, checkpoint: Path) -> None:
    rows: list[Any] = [
        *numbered(1),
        "",
        '{"input": "Add',
        {"label": "3"},
        {"input": 7, "label": "4"},
        {"input": [{"content": "no role"}], "label": "5"},
        {"input": "Add", "label": None},
        {"input": "Add", "label": "1", "metadata": "{oops"},
        {"input": "Add", "label": "1", "tools": {"name": "f"}},
        {"input": "", "label": "1"},
        {"input": "Add 8", "label": 8},
    ]
    stream = source(write_rows(tmp_path / "p.jsonl", rows), checkpoint)
    assert len(stream) == 2
    assert drawn(stream, 2) == ["0", "8"]
    assert stream.problem_counts() == {"malformed": 8}
    assert [str(p) for p in stream.problems] == [
        "line 3: not JSON at column 11: Unterminated string starting at",
        "line 4: no 'input'; the row has 'label'",
        "line 5: 'input' is a number, neither text nor a list of messages",
        "line 6: message 0 of 'input' is no object with a role",
        "line 7: 'label' is null",
        "line 8: 'metadata' is text that is not JSON: Expecting property name enclosed in double quotes",
        "line 9: 'tools' is an object, not a list of tool definitions",
        "line 10: 'input' is an empty text",
    ]


def test_the_refusing_policy_names_the_lines(tmp_path: Path, checkpoint: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [*numbered(2), "nonsense", {"label": "3"}])
    with pytest.raises(DataError, match="2 malformed rows") as error:
        source(path, checkpoint, on_bad_row="refuse")
    assert error.value.where == f"{path}:3"
    assert "line 4: no 'input'" in error.value.why


def test_a_mistyped_key_is_named_once_not_run_into(tmp_path: Path, checkpoint: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", numbered(20))
    with pytest.raises(DataError, match="no row of the prompt file can be used") as error:
        source(path, checkpoint, keys=PromptKeys(input="prompt"))
    assert "no 'prompt'; the row has 'input', 'label'" in error.value.why
    assert "and 15 more" in error.value.why
    with pytest.raises(DataError, match="no row"):
        source(path, checkpoint, keys=PromptKeys(metadata="meta"))


def test_long_prompts_are_left_out_and_counted_once(tmp_path: Path, checkpoint: Path) -> None:
    rows = [*numbered(2), {"input": "word " * 40, "label": "2"}]
    stream = source(write_rows(tmp_path / "p.jsonl", rows), checkpoint, max_prompt_len=10)
    assert drawn(stream, 6) == ["0", "1"] * 3
    assert stream.problem_counts() == {"too_long": 1}
    assert stream.problems[0].line == 3
    assert "the limit is 10" in stream.problems[0].reason


def test_a_limit_that_no_prompt_meets_ends_the_search(tmp_path: Path, checkpoint: Path) -> None:
    stream = source(write_rows(tmp_path / "p.jsonl", numbered(3)), checkpoint, max_prompt_len=1)
    with pytest.raises(DataError, match="no prompt of a whole epoch") as error:
        stream.next_groups(1)
    assert "--rollout-max-prompt-len" in error.value.fix
    with pytest.raises(DataError, match="no prompt of the file can be used"):
        list(stream.prompts())


def test_slices_select_rows(tmp_path: Path, checkpoint: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", numbered(10))
    assert drawn(source(f"{path}@[2:4]", checkpoint), 3) == ["2", "3", "2"]
    assert drawn(source(f"{path}@[-1:]", checkpoint), 2) == ["9", "9"]
    with pytest.raises(DataError, match="selects no row"):
        source(f"{path}@[20:]", checkpoint)


def test_messages_texts_and_tools_go_through_the_chat_template(tmp_path: Path, checkpoint: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "Add 2"}]
    rows = [
        {"input": "Add 1"},
        {"input": messages, "tools": json.dumps(tools), "metadata": {"level": 3}},
    ]
    stream = source(write_rows(tmp_path / "p.jsonl", rows), checkpoint, chat=True, label=None)
    (first,), (second,) = stream.next_groups(2)
    tokenizer = CheckpointTokenizer(checkpoint)
    assert tokenizer.decode(first.tokens) == "<|im_start|>user\nAdd 1<|im_end|>\n<|im_start|>assistant\n"
    assert second.prompt == messages
    assert second.metadata == {"level": 3, "tools": tools}
    plain = source(tmp_path / "p.jsonl", checkpoint, label=None)
    assert len(list(plain.prompts())) == 1
    assert "--apply-chat-template" in plain.problems[0].reason


def test_template_arguments_reach_the_template(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }} {{ mood }}")
    prompt_format = PromptFormat(CheckpointTokenizer(checkpoint), True, {"mood": "calm"})
    path = write_rows(tmp_path / "p.jsonl", numbered(1))
    stream = PromptSource(DataPath(path), prompt_format, SourceSettings())
    assert next(stream.prompts()).text == "Add 0 calm"


def test_parquet_serves_as_json_lines_do(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([*numbered(3), {"input": None, "label": "3"}]), path
    )
    stream = source(path, checkpoint)
    assert drawn(stream, 4) == ["0", "1", "2", "0"]
    assert str(stream.problems[0]) == "line 4: 'input' is null, neither text nor a list of messages"


def test_one_pass_does_not_move_the_stream(tmp_path: Path, checkpoint: Path) -> None:
    stream = source(write_rows(tmp_path / "p.jsonl", numbered(3)), checkpoint, shuffle=True)
    state = stream.state()
    assert [p.row.label for p in stream.prompts()] == ["0", "1", "2"]
    assert stream.state() == state
