"""`miles profiles explain NAME --precision`: how every tensor of the model is stored and computed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_cli.main import run

Output = pytest.CaptureFixture[str]
EXPLAIN = ["profiles", "explain", "qwen3-moe-fp8", "--precision"]


def test_alike_tensors_share_a_line(capsys: Output) -> None:
    assert run(EXPLAIN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stored in the engine and by weight sync: fp8 (128x128, fp32 scales)"
    experts = next(line for line in lines if ".up_proj.weight" in line)
    fp8 = "fp8 (128x128, fp32 scales)"
    name = "model.layers.0-47.mlp.experts.0-127.up_proj.weight"
    assert experts.split() == f"{name} 6144 {fp8} {fp8} expert is quantised".split()
    router = next(line for line in lines if "mlp.gate.weight" in line)
    assert router.split()[1:] == ["48", "bf16", "bf16", "router", "is", "kept"]
    assert len(lines) < 25


def test_a_part_of_a_name_picks_tensors_and_json_names_each(capsys: Output) -> None:
    assert run([*EXPLAIN, "layers.47.self_attn", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rollout"], told["plain"]) == ("fp8 (128x128, fp32 scales)", "bf16")
    tensors = {tensor["name"]: tensor for tensor in told["tensors"]}
    assert len(tensors) == 6
    assert tensors["model.layers.47.self_attn.q_proj.weight"]["storage"] == "fp8 (128x128, fp32 scales)"
    assert tensors["model.layers.47.self_attn.q_norm.weight"]["reason"] == "norm is kept"


def test_exceptions_of_a_run_file_are_shown_with_their_reason(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'extends = ["quickstart"]\n[precision]\nrollout_format = "fp8"\nnum_layers_at_start_in_bf16 = 1\n'
        'extra_high_precision_layers_hf = ["experts.3."]\n'
    )
    assert run(["profiles", "explain", str(path), "up_proj", "--precision"]) == 0
    out = capsys.readouterr().out
    assert "in the first 1 layers" in out and "name has experts.3." in out and "expert is quantised" in out
    assert "experts.{0,1,2,4,5,6,7}.up_proj.weight" in out


def test_without_a_model_or_a_tensor_the_mistake_is_named(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[precision]\n")
    assert run(["profiles", "explain", str(path), "--precision"]) == 2
    assert "set model.hf_checkpoint or model.model_name" in capsys.readouterr().err
    assert run([*EXPLAIN, "no_such"]) == 2
    assert "no tensor of Qwen3MoeForCausalLM has 'no_such' in its name" in capsys.readouterr().err
