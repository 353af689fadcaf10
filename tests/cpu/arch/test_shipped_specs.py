"""Shipped architectures are those of the published checkpoints, to the last parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from typing import Any

import pytest

from miles.arch import ArchSpec, published_tensors, to_hf_config
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.arch.specs import DIRECTORY, shipped_names, shipped_spec
from miles.arch.stored_forms import stored_forms

PUBLISHED = {
    # name: (parameters of the model card, parameters stored in the published safetensors files)
    "qwen3-0.6b": (0.6e9, 751_632_384),
    "qwen3-1.7b": (1.7e9, 2_031_739_904),
    "qwen3-4b": (4.0e9, 4_022_468_096),
    "qwen3-8b": (8.2e9, 8_190_735_360),
    "qwen3-14b": (14.8e9, 14_768_307_200),
    "qwen3-30b-a3b": (30.5e9, 30_532_122_624),
    "qwen3-32b": (32.8e9, 32_762_123_264),
    "qwen3-235b-a22b": (235e9, 235_093_634_560),
    "qwen2-0.5b": (0.49e9, 494_032_768),
    "qwen2-1.5b": (1.54e9, 1_543_714_304),
    # The card counts 7.07e9: embedding and head once.
    "qwen2-7b": (7.62e9, 7_615_616_512),
    "qwen2-72b": (72.71e9, 72_706_203_648),
    "qwen2.5-0.5b": (0.49e9, 494_032_768),
    "qwen2.5-1.5b": (1.54e9, 1_543_714_304),
    "qwen2.5-3b": (3.09e9, 3_085_938_688),
    "qwen2.5-7b": (7.61e9, 7_615_616_512),
    "qwen2.5-14b": (14.7e9, 14_770_033_664),
    "qwen2.5-32b": (32.5e9, 32_763_876_352),
    "qwen2.5-72b": (72.7e9, 72_706_203_648),
    "llama-3-8b": (8.03e9, 8_030_261_248),
    "llama-3-70b": (70.6e9, 70_553_706_496),
    "llama-3.1-8b": (8.03e9, 8_030_261_248),
    "llama-3.1-70b": (70.6e9, 70_553_706_496),
    "llama-3.1-405b": (405e9, 405_853_388_800),
    "llama-3.2-1b": (1.23e9, 1_235_814_400),
    "llama-3.2-3b": (3.21e9, 3_212_749_824),
    "llama-3.3-70b": (70.6e9, 70_553_706_496),
    "llama-4-scout-17b-16e": (109e9, 108_641_793_536),
    "llama-4-maverick-17b-128e": (400e9, 401_583_781_376),
    "gemma-2-2b": (2.6e9, 2_614_341_888),
    "gemma-2-9b": (9.24e9, 9_241_705_984),
    "gemma-2-27b": (27.2e9, 27_227_128_320),
    "gemma-3n-e2b": (5.44e9, 5_439_438_272),
    "gemma-3n-e4b": (7.85e9, 7_849_978_192),
    "gemma-3-1b": (1.0e9, 999_885_952),
    "gemma-3-4b": (4.3e9, 4_300_079_472),
    "gemma-3-12b": (12.2e9, 12_187_325_040),
    "gemma-3-27b": (27.4e9, 27_432_406_640),
}
STORES_TIED_HEAD = ("qwen3-0.6b", "qwen3-1.7b")
"""Published with the head a second time, though it is tied to the embedding."""

SIGLIP, SIGLIP_WIDTH = 416_866_032, 1152
"""Parameters of the vision tower of Gemma 3, which three sizes share, and its width."""
GEMMA3N_TOWERS = 983_281_504
"""Parameters of the towers for pictures and sound, which both sizes of Gemma 3n share. Keys and values of
layers that use those of others are published as well."""
LLAMA4_VISION = 871_932_416
"""Parameters beside the language model of Llama 4, which both sizes share."""

ACTIVE = {
    "llama-4-scout-17b-16e": 17.2e9,
    "llama-4-maverick-17b-128e": 17.2e9,
    "qwen3-30b-a3b": 3.3e9,
    "qwen3-235b-a22b": 22e9,
}
"""Parameters per token, by the model card."""

IN_BILLIONS = {
    # name: (total of the model card, active of the model card, tables repeated beside the MTP layers,
    #        numbers in the published files as the hub rounds them, whether they are block FP8)
    "glm-4.5": (355, 32, 2, 358, False),
    "glm-4.5-air": (106, 12, 2, 110, False),
    "glm-4.6": (355, 32, 0, 357, False),
    "glm-4.7": (355, 32, 2, 358, False),
    "minimax-m2": (230, 10, 0, 229, True),
    "minimax-m2.1": (230, 10, 0, 229, True),
    "deepseek-v3": (671, 37, 2, 685, True),
    "deepseek-r1": (671, 37, 2, 685, True),
    "deepseek-v3.2": (671, 37, 2, 685, True),
}
"""Mixtures of experts whose cards leave out MTP layers, and some of them embedding and head."""


def test_every_shipped_model_is_checked() -> None:
    assert PUBLISHED.keys() | IN_BILLIONS.keys() == set(shipped_names())


@pytest.mark.parametrize("name", IN_BILLIONS)
def test_parameter_counts_with_mtp_layers(name: str) -> None:
    spec = shipped_spec(name)
    total, active, copies, stored, fp8 = IN_BILLIONS[name]
    table = spec.vocab_size * spec.hidden_size
    assert spec.num_parameters() / 1e9 == pytest.approx(total, rel=0.01)
    most, least = spec.num_active_parameters() / 1e9, (spec.num_active_parameters() - 2 * table) / 1e9
    assert round(least) <= active <= round(most)
    policy = PrecisionPolicy(NumberFormat("fp8" if fp8 else "bf16"), plain="bf16")
    numbers = sum(
        prod(held)
        for name, shape in published_tensors(spec).items()
        for _, held in stored_forms(policy.storage(name), name, shape).values()
    )
    assert round((numbers + copies * table) / 1e9) == stored


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str) -> None:
    spec = shipped_spec(name)
    card, stored = PUBLISHED[name]
    head_twice = spec.vocab_size * spec.hidden_size if name in STORES_TIED_HEAD else 0
    whole = spec.num_parameters() + (_other_parts(spec) if spec.other_parts else 0)
    assert whole + head_twice == stored
    assert whole == pytest.approx(card, rel=0.015)


def _other_parts(spec: ArchSpec) -> int:
    """Parameters beside the language model: the vision tower and the projection behind it."""
    if spec.family == "gemma3n":
        unused = [x.attention for x in spec.layers if x.attention.keys_of is not None]
        return GEMMA3N_TOWERS + sum(2 * x.kv_width * spec.hidden_size + x.head_dim for x in unused)
    if spec.family == "llama4":
        return LLAMA4_VISION
    return SIGLIP + (SIGLIP_WIDTH * spec.hidden_size + SIGLIP_WIDTH)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameter_counts(name: str) -> None:
    assert shipped_spec(name).num_active_parameters() == pytest.approx(ACTIVE[name], rel=0.02)


def test_published_tensors_hold_every_parameter() -> None:
    spec = shipped_spec("qwen3-0.6b")
    assert sum(map(prod, published_tensors(spec).values())) == spec.num_parameters()


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_config_is_what_the_family_writes(name: str) -> None:
    shipped = json.loads((DIRECTORY / f"{name}.json").read_text())
    written = to_hf_config(shipped_spec(name))
    assert _shared(shipped, written) == _shared(written, shipped)


def _shared(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What a config says of the keys that the other has as well, tables inside included."""
    shared = {key: value for key, value in config.items() if key in other}
    return {
        key: _shared(value, other[key]) if isinstance(value, dict) and isinstance(other[key], dict) else value
        for key, value in shared.items()
    }


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        shipped_spec("qwen3-9b")


def test_shipped_specs_need_no_torch() -> None:
    source = (
        "import sys; from miles.arch.specs import shipped_spec; shipped_spec('qwen3-4b'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
