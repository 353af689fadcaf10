"""Runs of other systems, read from what they leave: event files, JSON metrics, printed steps."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from miles.diagnosis.foreign.console import STEP_LINES, printed_metrics
from miles.diagnosis.foreign.history import understand
from miles.diagnosis.foreign.names import recognise, systems
from miles.diagnosis.foreign.source import diagnose_path, find_metrics
from miles.diagnosis.foreign.tfevents import Scalar, masked_crc, read_scalars
from miles.diagnosis.logs import scan_logs
from miles.errors import RunError
from miles.record.metrics import find_metric

Steps = list[dict[str, float]]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def chunk(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def event(time: float, step: int, values: dict[str, float], tensor: bool = False) -> bytes:
    """A TFRecord with an Event as TensorBoard's writers make it (simple_value, or a float tensor)."""
    summary = b""
    for tag, value in values.items():
        number = struct.pack("<f", value)
        body = chunk(8, b"\x08\x01" + chunk(4, number)) if tensor else b"\x15" + number
        summary += chunk(1, chunk(1, tag.encode()) + body)
    payload = b"\x09" + struct.pack("<d", time) + b"\x10" + varint(step) + chunk(5, summary)
    head = struct.pack("<Q", len(payload))
    crcs = (struct.pack("<I", masked_crc(head)), struct.pack("<I", masked_crc(payload)))
    return head + crcs[0] + payload + crcs[1]


def write_events(path: Path, steps: Iterable[dict[str, float]], start: int = 1, time: float = 1e9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(event(time + i, start + i, step) for i, step in enumerate(steps)))
    return path


VERL = {
    "rollout/raw_reward": "critic/score/mean",
    "train/entropy": "actor/entropy",
    "train/grad_norm": "actor/grad_norm",
    "train/pg_clipfrac": "actor/pg_clipfrac",
    "rollout/response_len/mean": "response_length/mean",
    "rollout/truncated_ratio": "response_length/clip_ratio",
    "perf/step_time": "timing_s/step",
}
TRL = {
    "rollout/raw_reward": "train/reward",
    "train/entropy": "train/entropy",
    "train/grad_norm": "train/grad_norm",
    "train/loss": "train/loss",
    "rollout/truncated_ratio": "train/completions/clipped_ratio",
    "rollout/zero_std/fraction": "train/frac_reward_zero_std",
    "train/train_rollout_logprob_abs_diff": "train/sampling/sampling_logp_difference/mean",
}
NEMO = {
    "rollout/raw_reward": "train/reward",
    "train/entropy": "train/approx_entropy",
    "train/grad_norm": "train/grad_norm",
    "rollout/response_len/mean": "train/mean_gen_tokens_per_sample",
    "perf/step_time": "timing/train/total_step_time",
}
MILES = {
    name: name
    for name in (
        "rollout/raw_reward",
        "train/grad_norm",
        "train/pg_clipfrac",
        "rollout/zero_std/all_zero_percentage",
        "rollout/zero_std/fraction",
        "train/train_rollout_logprob_abs_diff",
    )
} | {"train/entropy": "train/entropy_loss"}
SYSTEMS = {"verl": VERL, "TRL": TRL, "NeMo-RL": NEMO, "miles / slime": MILES}


def renamed(steps: Steps, names: dict[str, str]) -> Steps:
    return [{theirs: step[ours] for ours, theirs in names.items()} for step in steps]


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_healthy_run_of_another_system_is_read_and_left_alone(
    system: str, healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    for seed in range(3):
        names = SYSTEMS[system]
        write_events(tmp_path / str(seed) / "events.out.tfevents.1.host", renamed(healthy(seed), names))
        report = diagnose_path(tmp_path / str(seed))
        assert report.source == f"TensorBoard files of {system}"
        assert report.findings == () and report.step == 80
        assert report.notes == (f"{len(names)} of {len(names)} metrics are ones that rules can read",)
        assert "MM11" in report.without_data and "OP2" not in report.without_data


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_collapse_in_another_system_is_named(
    system: str, slow_death: Callable[..., Steps], tmp_path: Path
) -> None:
    write_events(tmp_path / "events.out.tfevents.1.host", renamed(slow_death(), SYSTEMS[system]))
    report = diagnose_path(tmp_path)
    (finding,) = [f for f in report.findings if f.rule == "OP8"]
    assert report.exit_code == 5 and finding.severity == "critical"
    assert all(fix.patch == () for fix in finding.fixes), "we do not know their settings"


def test_a_gap_between_trl_and_its_engine_is_measured(
    healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    steps = renamed(healthy(0), TRL)
    for step in steps:
        step["train/sampling/sampling_logp_difference/mean"] = 0.2
    write_events(tmp_path / "events.out.tfevents.1.host", steps)
    assert [f.rule for f in diagnose_path(tmp_path).findings] == ["MM5"]


def test_nan_survives_and_is_found(healthy: Callable[[int], Steps], tmp_path: Path) -> None:
    steps = renamed(healthy(0), VERL)
    steps[30]["actor/grad_norm"] = math.nan
    write_events(tmp_path / "events.out.tfevents.1.host", steps)
    (finding,) = diagnose_path(tmp_path).findings
    assert finding.rule == "NF1" and finding.step == 31


def test_the_checksum_is_crc32c() -> None:
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc(b"123456789") != zlib.crc32(b"123456789")


def test_both_kinds_of_scalars_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.host"
    path.write_bytes(event(5.0, 3, {"a": 0.5}) + event(6.0, 300, {"b": -2.0}, tensor=True))
    assert list(read_scalars(path)) == [Scalar(5.0, 3, "a", 0.5), Scalar(6.0, 300, "b", -2.0)]


def test_reading_stops_at_a_torn_or_damaged_record(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.host"
    good, bad = event(1.0, 1, {"a": 1.0}), event(2.0, 2, {"a": 2.0})
    for tail in (bad[:-3], bad[:20], bad[:16] + b"\xff" + bad[17:], b"\x00" * 12):
        path.write_bytes(good + tail)
        assert [point.step for point in read_scalars(path)] == [1]


def test_tensorboards_own_writer_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    rng = random.Random(0)
    values = {step: rng.gauss(0, 100) for step in range(200)}
    for step, value in values.items():
        writer.add_scalar("train/loss", value, step)
        writer.add_scalar("new", value, step, new_style=True)
    writer.add_text("note", "not a number")
    writer.add_histogram("weights", np.ones(3), 1)
    writer.close()
    (file,) = find_metrics(tmp_path)[0].files
    points = list(read_scalars(file))
    for tag in ("train/loss", "new"):
        read = {p.step: p.value for p in points if p.tag == tag}
        assert read == pytest.approx(values, rel=1e-6)
    assert {p.tag for p in points} == {"train/loss", "new"}


def test_a_restart_from_an_earlier_step_voids_what_was_said_after_it(tmp_path: Path) -> None:
    write_events(tmp_path / "events.out.tfevents.1.a", [{"train/grad_norm": 1.0}] * 10, time=1e9)
    write_events(tmp_path / "events.out.tfevents.2.b", [{"train/grad_norm": 2.0}] * 2, start=6, time=2e9)
    points = [p for file in find_metrics(tmp_path)[0].files for p in read_scalars(file)]
    series = understand(points).history.series["train/grad_norm"]
    assert list(series) == [(s, 1.0) for s in range(1, 6)] + [(6, 2.0), (7, 2.0)]


def test_an_entropy_that_was_never_computed_is_absent(
    healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    steps = renamed(healthy(0), MILES)
    for step in steps:
        step["train/entropy_loss"] = 0.0
        step["rollout/raw_reward"] = 0.3
    write_events(tmp_path / "events.out.tfevents.1.host", steps)
    assert "OP6" not in {f.rule for f in diagnose_path(tmp_path).findings}


def test_of_several_runs_the_one_written_last_is_diagnosed_and_the_others_are_named(
    healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    import os

    for age, name in enumerate(("old", "new")):
        file = write_events(tmp_path / name / "events.out.tfevents.1.h", renamed(healthy(0), VERL))
        os.utime(file, (1e9 + age, 1e9 + age))
    note = diagnose_path(tmp_path).notes[1]
    assert "2 runs lie here" in note and str(tmp_path / "new") in note and "old" in note


def test_json_metrics_of_verl_and_of_transformers_trainers_are_read(
    healthy: Callable[[int], Steps], tmp_path: Path
) -> None:
    verl = tmp_path / "verl" / "log.jsonl"
    verl.parent.mkdir()
    steps = renamed(healthy(0), VERL)
    verl.write_text("".join(json.dumps({"step": i, "data": s}) + "\n" for i, s in enumerate(steps, start=1)))
    report = diagnose_path(verl)
    assert report.source == "JSON files of verl" and report.step == 80 and report.findings == ()

    history = [
        {name.removeprefix("train/"): value for name, value in step.items()} | {"step": i, "epoch": 0.1}
        for i, step in enumerate(renamed(healthy(0), TRL), start=1)
    ]
    history[40]["loss"] = math.nan
    state = tmp_path / "trl" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"log_history": history}))
    report = diagnose_path(state.parent)
    assert report.source == "JSON files of TRL" and [f.rule for f in report.findings] == ["NF1"]


def test_steps_that_were_only_printed_are_read(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "\x1b[36m(TaskRunner pid=4)\x1b[0m step:1 - actor/pg_loss:0.018 "
        "- actor/grad_norm:np.float64(1.5e-01) - critic/score/mean:0.25 - val-core/gsm8k/reward/mean@1:0.4\n"
        "(TaskRunner pid=4) step:2 - actor/pg_loss:nan - actor/grad_norm:2.0\n"
        "2026-11-24 10:00:00 INFO rollout 3: {'rollout/raw_reward': 0.5, 'rollout/response_len/mean': 77}\n"
        "step 4 of 9: nothing\n"
    )
    points = list(printed_metrics(scan_logs([log], STEP_LINES).telling))
    told = {(p.step, p.tag): p.value for p in points}
    assert told[1, "actor/grad_norm"] == 0.15 and told[1, "val-core/gsm8k/reward/mean@1"] == 0.4
    assert math.isnan(told[2, "actor/pg_loss"]) and told[3, "rollout/response_len/mean"] == 77
    assert len(told) == 8
    report = diagnose_path(log)
    assert report.source == "logs of verl" and [f.rule for f in report.findings] == ["NF1"]


def test_a_directory_with_nothing_to_read_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(RunError, match="nothing here to diagnose") as caught:
        diagnose_path(tmp_path)
    assert "TensorBoard" in caught.value.why


def test_the_map_leads_to_names_that_rules_read() -> None:
    from miles.diagnosis.foreign.names import is_known

    for system in systems().values():
        for row in system.names:
            assert is_known(row.ours.replace("*", "x")), row
    assert find_metric("train/mis_x") is None and is_known("train/mis_catastrophic_seq_fraction")


def test_a_system_is_recognised_by_what_only_it_writes() -> None:
    assert recognise(["loss", "accuracy"]) is None
    for title, names in SYSTEMS.items():
        found = recognise(names.values())
        assert found is not None and found.title == title


def test_names_with_a_free_part_and_a_transform_are_mapped() -> None:
    verl, nemo = systems()["verl"], systems()["nemo_rl"]
    found = verl.ours("val-core/openai_gsm8k/reward/mean@1")
    assert found is not None and found[0] == "eval/openai_gsm8k"
    assert verl.ours("val-core/a/b/reward/mean@1") is None
    mapped = nemo.ours("train/token_mult_prob_error")
    assert mapped is not None and mapped[1] is not None
    assert mapped[1](1.05) == pytest.approx(math.log(1.05))
