"""Planned bytes against real ones: of converted checkpoints, of engines, and of a step at its peak."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles.arch import ArchSpec, load_spec, published_tensors
from miles.arch.precision import NumberFormat, precision_policy
from miles.arch.specs import shipped_spec
from miles.data.tasks import resolve_builtin
from miles.models.decoder import Decoder
from miles.planning.memory import estimate_memory
from miles.planning.model_shape import model_shape
from miles.planning.recompute import Recompute
from miles.planning.stored_bytes import stored_bytes
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.held_weights import HeldWeights
from miles.weights.hf import read_hf, write_hf
from miles_cli import memory_reference

FORMATS = {
    "fp8": NumberFormat("fp8"),
    "mxfp8": NumberFormat("mxfp8"),
    "int4": NumberFormat("int4"),
}


@pytest.fixture(scope="module")
def spec() -> ArchSpec:
    return load_spec(resolve_builtin("builtin:sort"))


@pytest.fixture(scope="module")
def wide(spec: ArchSpec) -> ArchSpec:
    """Rows and columns that end inside an FP8 block."""
    return replace(spec, hidden_size=320, dtype="bf16")


@pytest.fixture(scope="module")
def checkpoint(wide: ArchSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "bf16"
    shapes = published_tensors(wide).items()
    write_hf(directory, wide, ((name, torch.full(shape, 0.1).bfloat16()) for name, shape in shapes))
    return directory


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "int4"])
def test_a_converted_checkpoint_has_the_planned_bytes(
    name: str, wide: ArchSpec, checkpoint: Path, tmp_path: Path
) -> None:
    convert(plan_conversion(open_source(checkpoint), tmp_path / name, Wanted(FORMATS[name])), workers=1)
    written = sum(tensor.nbytes for _, tensor in read_hf(tmp_path / name))
    planned = stored_bytes(wide, precision_policy(wide, "bf16", FORMATS[name]))
    assert written == planned.total
    assert planned.quantised + planned.plain == wide.num_parameters()


@pytest.mark.parametrize("name", FORMATS)
def test_an_engine_holds_the_planned_bytes(name: str, wide: ArchSpec) -> None:
    policy = precision_policy(wide, "fp32", FORMATS[name])
    with torch.device("meta"):
        decoder = Decoder(wide)
    held = HeldWeights(policy, decoder, None, torch.float32, torch.device("cpu"))
    planned, plain = stored_bytes(wide, policy), sum(p.nbytes for p in decoder.parameters())
    quantised = [name for name in published_tensors(wide) if not policy.storage(name).is_plain]
    shapes = 16 * len(quantised) if name == "int4" else 0
    assert held.nbytes == planned.quantised_bytes - shapes, "INT4 stores the shape of a weight beside it"
    assert plain == planned.plain_bytes


@pytest.mark.parametrize("model", ["llama-3.3-70b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_the_quick_arithmetic_of_layouts_agrees_with_the_count_of_every_tensor(name: str, model: str) -> None:
    spec = shipped_spec(model)
    exact = stored_bytes(spec, precision_policy(spec, "bf16", FORMATS[name])).total
    assert model_shape(spec).stored_bytes(name) == pytest.approx(exact, rel=1e-3)  # type: ignore[arg-type]


def parts_of(spec: ArchSpec, **more: object) -> dict[str, int]:
    plan = estimate_memory(
        spec,
        "fp32",
        cached_tokens=100,
        micro_batch_tokens=200,
        reference=False,
        **more,  # type: ignore[arg-type]
    )
    return {part.name: part.bytes for part in plan.parts}


def test_recomputed_layers_keep_their_input_and_one_whole_layer(spec: ArchSpec) -> None:
    deep = replace(spec, layers=spec.layers * 4)
    whole = parts_of(deep)["activations"]
    block, full = (parts_of(deep, recompute=Recompute(layers=n))["activations"] for n in (4, 8))
    experts = parts_of(deep, recompute=Recompute(modules=("moe",)))["activations"]
    assert full < block < whole and experts < whole
    logits = 2 * 200 * spec.vocab_size * 4
    one = (whole - logits) // 8
    assert full - logits == one + 8 * 200 * spec.hidden_size * 4


def test_a_quantised_engine_has_its_stored_weights_and_the_numbers_it_multiplies(spec: ArchSpec) -> None:
    policy = precision_policy(spec, "fp32", FORMATS["int4"], FORMATS["int4"])
    stored = stored_bytes(spec, policy)
    parts = parts_of(spec, rollout_format="int4", stored=stored, rounds=True, packet=True, draft_numbers=8)
    assert parts["engine weights"] == parts["weight packet"] == stored.total < 4 * spec.num_parameters()
    assert parts["engine's products"] == parts["rounded weights"] == 4 * stored.quantised
    assert parts["draft cache"] == 100 * 8 * 4


def test_the_page_is_current_and_shows_four_bits_at_work() -> None:
    """Made by `python -m miles_cli.docs`."""
    written = Path(__file__).parents[3] / "docs" / "reference" / memory_reference.PAGE
    page = memory_reference.page()
    assert written.read_text(encoding="utf-8") == page
    assert "| llama-3.3-70b | int4 |" in page


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_the_estimate_is_near_the_real_peak_of_a_step(name: str) -> None:
    """A process with trainer and engine that samples and trains once; its peak less what it held before."""
    script = Path(__file__).with_name("peak_of_a_step.py")
    out = subprocess.run(
        [sys.executable, str(script), name], capture_output=True, text=True, check=True
    ).stdout.split()
    measured, estimated = map(int, out)
    assert 0.75 < measured / estimated < 1.25, (measured, estimated)
