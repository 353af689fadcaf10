"""A job's log carries messages and talk; the record that crosses it is the record that was written."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest

from miles.errors import RunError, Unavailable
from miles.orchestration.job_order import ORDER_FILE, JobOrder, write_order
from miles.orchestration.job_wire import WireReader, WireWriter, plain
from miles.orchestration.record_stream import Mirror, RecordStream
from miles.orchestration.worker_loss import WorkerLost


def messages(text: str, size: int = 7) -> list[Any]:
    """What a reader makes of a log that arrives in small pieces."""
    reader = WireReader()
    found = [item for i in range(0, len(text), size) for item in reader.feed(text[i : i + size])]
    assert reader.consumed == len(text)
    return [*found, *reader.finish()]


def test_messages_survive_between_lines_of_talk_whatever_the_pieces() -> None:
    log = io.StringIO()
    log.write("loading\n")
    WireWriter(log).send("step", row={"text": "größer\nthan \x1e that"})
    log.write("done")
    assert messages(log.getvalue()) == [
        "loading",
        {"kind": "step", "row": {"text": "größer\nthan \x1e that"}},
        "done",
    ]


def test_a_message_that_follows_unfinished_talk_on_its_line_is_still_one() -> None:
    log = io.StringIO("progress: 5 %")
    log.seek(0, io.SEEK_END)
    WireWriter(log).send("step", row=1)
    assert messages(log.getvalue()) == ["progress: 5 %", {"kind": "step", "row": 1}]


def test_talk_loses_colours_and_the_prefixes_of_ray() -> None:
    assert plain("\x1b[36m(EngineActor pid=123, ip=10.0.0.1)\x1b[0m hot\x1b[1m!\x1b[0m\r") == "hot!"
    assert plain("(a note) stays") == "(a note) stays"


def stream(source: Path, have: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Everything that one look at a run directory sends."""
    log = io.StringIO()
    RecordStream(source, WireWriter(log), have or {}).send_new()
    return messages(log.getvalue(), 4096)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    run = tmp_path / "job"
    for name, content in {
        "events/driver.jsonl": b'{"kind":"metrics"}\n{"torn',
        "logs/engine-0.log": b"not text: \xff\xfe\n",
        "heartbeat/driver.json": b"{}",
        "summary.json": b'{"status":"finished"}',
        "checkpoints/step-000001/big": b"weights",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    return run


def test_the_mirror_holds_the_same_bytes_and_no_checkpoints(written: Path, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "mirror")
    for message in stream(written):
        mirror.apply(message)
    copied = {p.relative_to(mirror.run_dir) for p in mirror.run_dir.rglob("*") if p.is_file()}
    assert {str(p) for p in copied} == {
        "events/driver.jsonl",
        "logs/engine-0.log",
        "heartbeat/driver.json",
        "summary.json",
    }
    assert all((mirror.run_dir / p).read_bytes() == (written / p).read_bytes() for p in copied)


def test_reading_a_log_again_from_its_beginning_changes_nothing(written: Path, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "mirror")
    first = stream(written)
    with (written / "events/driver.jsonl").open("ab") as file:
        file.write(b' line"}\n')
    for message in [*first, *first, *stream(written), *first]:
        mirror.apply(message)
    events = (mirror.run_dir / "events/driver.jsonl").read_bytes()
    assert events == (written / "events/driver.jsonl").read_bytes()


def test_a_resumed_job_sends_only_what_the_mirror_lacks(written: Path, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "mirror")
    for message in stream(written):
        mirror.apply(message)
    with (written / "events/driver.jsonl").open("ab") as file:
        file.write(b"x\n")
    again = [m for m in stream(written, mirror.holds()) if m["kind"] == "append"]
    assert [(m["path"], m["data"]) for m in again] == [("events/driver.jsonl", "x\n")]


def test_a_gap_in_the_log_is_refused(tmp_path: Path) -> None:
    message = {"kind": "append", "path": "events/driver.jsonl", "offset": 5, "data": "x"}
    with pytest.raises(RunError, match="gap"):
        Mirror(tmp_path).apply(message)


def test_a_job_cannot_write_outside_the_mirror(tmp_path: Path) -> None:
    message = {"kind": "replace", "path": "../../evil", "data": "x"}
    with pytest.raises(RunError, match="outside"):
        Mirror(tmp_path / "mirror").apply(message)
    assert not (tmp_path.parent / "evil").exists()


def test_only_one_process_writes_a_mirror(tmp_path: Path) -> None:
    with Mirror(tmp_path).exclusive() as first, Mirror(tmp_path).exclusive() as second:
        assert first and not second


def order(tmp_path: Path, share_files: bool = True, text: str = "") -> Path:
    """An order for the quickstart, in a stage directory."""
    from miles.config import parse_flags, resolve

    run_dir, stage = tmp_path / "runs" / "r1", tmp_path / "stage"
    run_dir.mkdir(parents=True)
    stage.mkdir()
    write_order(stage, resolve("quickstart", None, parse_flags(text.split()), ()), run_dir, share_files)
    return stage


def test_a_job_knows_by_a_token_whether_it_sees_the_launchers_files(tmp_path: Path) -> None:
    stage = order(tmp_path)
    read = JobOrder.read(stage / ORDER_FILE)
    assert read.shares_files() and read.resolved.profile == "quickstart"
    (Path(read.run_dir) / ".submission-token").write_text("another run of the same name")
    assert not read.shares_files()


def test_a_job_told_to_keep_to_itself_does(tmp_path: Path) -> None:
    assert not JobOrder.read(order(tmp_path, share_files=False) / ORDER_FILE).shares_files()


def test_small_files_named_relatively_go_with_the_job(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("def judge(args, sample): return 1")
    stage = order(tmp_path, text="--custom-rm-path judge.py:judge")
    assert (stage / "judge.py").read_text().startswith("def judge")


def test_an_order_of_another_version_is_refused(tmp_path: Path) -> None:
    path = order(tmp_path) / ORDER_FILE
    path.write_text(path.read_text().replace('"code_version": "', '"code_version": "9.'))
    with pytest.raises(Unavailable, match="submitted by 9"):
        JobOrder.read(path)


def test_a_lost_worker_crosses_processes() -> None:
    lost = pickle.loads(pickle.dumps(WorkerLost("engine-1", "killed")))
    assert (lost.worker, lost.reason, lost.what) == ("engine-1", "killed", "engine-1 was lost")
