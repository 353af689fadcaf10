"""The words that name a cluster, and the GPUs that a driver names."""

from __future__ import annotations

import pytest

from miles.errors import ConfigError
from miles.planning.hardware import CPU, GIB, detect_kind, find_kind, gpu_kinds, parse_hardware


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "kind"),
    [
        ("16xH100", 2, 8, "H100"),
        ("2x8xB200", 2, 8, "B200"),
        ("8xA100-80GB", 1, 8, "A100"),
        ("4xa100-40gb", 1, 4, "A100-40GB"),
        ("1xL40S", 1, 1, "L40S"),
        ("16x4xGB200", 16, 4, "GB200"),
    ],
)
def test_grammar(text: str, nodes: int, per_node: int, kind: str) -> None:
    hardware = parse_hardware(text)
    assert (hardware.nodes, hardware.gpus_per_node) == (nodes, per_node)
    assert hardware.kind is not None and hardware.kind.name == kind
    assert hardware.num_gpus == nodes * per_node


def test_no_gpu_has_a_name_too() -> None:
    assert parse_hardware("cpu") == CPU
    assert (CPU.num_gpus, CPU.generation) == (0, "cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", "16xH100"),
        ("0xH100", "16xH100"),
        ("8xH101", "did you mean H100"),
        ("12xH100", "no whole nodes of 8"),
        ("8xA100-24GB", "unknown GPU"),
    ],
)
def test_other_words_are_refused_with_the_next_step(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hardware(text)
    assert said in str(caught.value)
    assert "--assume-hardware" in str(caught.value)


def test_generations_follow_the_compute_capability() -> None:
    generations = {name: kind.generation for name, kind in gpu_kinds().items()}
    assert generations["A100"] == generations["L40S"] == "sm80"
    assert generations["H200"] == "sm90"
    assert generations["B300"] == "sm100"


def test_peaks_are_of_formats_that_the_generation_has() -> None:
    for kind in gpu_kinds().values():
        assert (kind.fp8_tflops is not None) == (kind.sm >= 89), kind.name
        assert (kind.fp4_tflops is not None) == (kind.sm >= 100), kind.name


def test_a_drivers_name_finds_its_kind_and_keeps_its_memory() -> None:
    kind = detect_kind("NVIDIA H100 80GB HBM3", 79 * GIB, None)
    assert (kind.name, kind.sm, kind.memory_bytes) == ("H100", 90, 79 * GIB)
    assert detect_kind("NVIDIA GH200 480GB", 95 * GIB, None).name == "GH200"
    assert find_kind("h100") == gpu_kinds()["H100"]


def test_an_unknown_gpu_is_judged_by_its_compute_capability() -> None:
    kind = detect_kind("NVIDIA X1", 10 * GIB, 120)
    assert (kind.name, kind.generation, kind.bf16_tflops) == ("NVIDIA X1", "sm100", None)
