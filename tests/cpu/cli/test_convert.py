"""`miles convert` at the command line: plan, result, mistakes, and the commands that preflight names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miles.arch import load_spec
from miles.data.tasks import resolve_builtin
from miles.errors import ConfigError
from miles.models.decoder import Decoder
from miles.planning.facts import collect_facts
from miles.planning.subject import Subject
from miles.weights.convert import open_source, plan_conversion
from miles.weights.hf import write_hf
from miles.weights.native_map import to_published
from miles_cli.config_source import load_config
from miles_cli.convert_options import Options, options_of_run, wanted_of
from miles_cli.main import run

Miles = Callable[..., "subprocess.CompletedProcess[str]"]
Convert = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = resolve_builtin("builtin:sort", tmp_path / "assets")
    decoder = Decoder(load_spec(source))
    decoder.init_weights(torch.Generator().manual_seed(0))
    write_hf(tmp_path / "base", decoder.spec, to_published(decoder), source_dir=source)
    return tmp_path / "base"


def test_preflight_names_a_command_that_mends_the_run(miles: Miles, checkpoint: Path) -> None:
    line = (
        *("train", "--profile", "quickstart", "--mtp-num-layers", "1", "--enable-mtp-training"),
        *("--hf-checkpoint", "base", "--dry-run"),
    )
    refused = miles(*line)
    assert refused.returncode == 3
    assert "MTP1" in refused.stderr
    command = "miles convert base base-mtp --mtp-num-layers 1"
    assert command in " ".join(refused.stderr.split())
    converted = miles(*command.split()[1:])
    assert converted.returncode == 0, converted.stderr
    assert "MTP projection" not in converted.stdout and "random" in converted.stdout
    mended = miles(*(word if word != "base" else "base-mtp" for word in line))
    assert mended.returncode == 0, mended.stderr


@pytest.fixture
def convert(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Convert:
    """`miles convert WORDS` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = run(["convert", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_a_dry_run_shows_the_plan_and_writes_nothing(convert: Convert, tmp_path: Path) -> None:
    words = ("base", "target", "--to", "fp8", "--num-layers-at-end-in-bf16", "1", "--dry-run")
    text = convert(*words)[1]
    for told in ("in     883.2 KiB, 68 tensors in 1 file", "expert is quantised", "in the last 1 layers"):
        assert told in text, text
    answer = json.loads(convert(*words, "--json")[1])
    assert answer["written"] is False
    assert answer["bytes_out"] < answer["bytes_in"]
    assert sum(row["count"] for row in answer["weights"]) == answer["tensors_in"]
    assert {"count": 24, "from": "fp32", "to": "fp8 (128x128, fp32 scales)", "how": "quantised",
            "why": "expert is quantised"} in answer["weights"]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == []


def test_a_conversion_says_where_it_is_and_how_exact(convert: Convert, tmp_path: Path) -> None:
    code, out, err = convert("base", "target", "--to", "int4", "--group-size", "16", "--check-logits")
    assert code == 0, err
    assert "written: target" in out
    assert "verified: largest error" in out and "the same best token" in out
    assert "\x1b" not in out + err
    back = json.loads(convert("target", "back", "--to", "bf16", "--json")[1])
    assert back["written"] and back["worst"]["relative_error"] < 0.005
    assert load_spec(tmp_path / "back").num_parameters() == load_spec(tmp_path / "base").num_parameters()


def test_the_format_and_the_exceptions_of_a_run_are_its_policy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is written in the format that the run's engine holds it in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        'extends = ["quickstart"]\nmodel.hf_checkpoint = "base"\n[precision]\nrollout_format = "fp8"\n'
        'fp8_block_scale = "pow2"\nnum_layers_at_end_in_bf16 = 1\n'
        'extra_high_precision_layers_hf = ["k_proj"]\n'
    )
    config = load_config("run.toml")
    policy = Subject(config, collect_facts(config.config)).precision
    assert policy is not None
    wanted = wanted_of(options_of_run("run.toml", Options()))
    plan = plan_conversion(open_source(checkpoint), tmp_path / "target", wanted)
    for one in plan.moves:
        held = policy.storage(one.name)
        assert one.target == held or (held.is_plain and one.target == one.weight.format), one.name
    assert {str(one.target) for one in plan.moves} == {"fp32", "fp8 (128x128, pow2 scales)"}
    with pytest.raises(ConfigError, match="the run's"):
        options_of_run("run.toml", Options(group_size=4))
    with pytest.raises(ConfigError, match="quickstart sets no precision"):
        options_of_run("quickstart", Options())


def test_preflight_names_the_way_back_from_a_quantised_checkpoint(
    convert: Convert, capfd: pytest.CaptureFixture[str]
) -> None:
    convert("base", "base-fp8", "--to", "fp8")
    line = ["train", "--profile", "quickstart", "--dry-run", "--hf-checkpoint"]
    assert run([*line, "base-fp8"]) == 3
    command = "miles convert base-fp8 base-fp8-bf16 --to bf16"
    assert command in " ".join(capfd.readouterr().err.split())
    assert convert(*command.split()[2:])[0] == 0
    assert run([*line, "base-fp8-bf16"]) == 0


def test_mistakes_are_one_message(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    cases: tuple[tuple[str, int, str], ...] = (
        ("base there --to fp8", 1, "there: already exists"),
        ("nowhere target --to fp8", 1, "nowhere: no such directory"),
        ("base target", 2, "neither a format nor MTP layers"),
        ("base target --to fp9", 2, "did you mean fp8?"),
        ("base target --to torch_dist --dtype bf16", 2, "torch_dist checkpoint are copied as they are"),
        ("base target --to fp8 --group-size 64", 2, "--group-size: has no effect without --to int4"),
        ("base target --to bf16 --dtype fp32", 2, "--dtype: has no effect"),
        ("base target --to bf16 --num-layers-at-end-in-bf16 1", 2, "has no effect without a quantised"),
        ("base target --to fp8 --fp8-block-scale ue8m0", 2, "neither fp32 nor pow2"),
        ("base target --to int8 --max-shard-size many", 2, "'many' is no size"),
        ("base target --to int4 --group-size 7", 1, "groups of 7"),
        ("base target --mtp-num-layers 0", 2, "mtp-num-layers"),
    )
    for words, code, message in cases:
        found, _, err = convert(*words.split())
        assert found == code, (words, err)
        assert message in err and "Traceback" not in err, (words, err)
    assert not (tmp_path / "target").exists()
