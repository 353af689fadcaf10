"""What Transformer Engine's layers are made of, as far as it can be said without Transformer Engine: its
classes are stood in for, megatron-core's specs and its provider of them are real.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from miles.training.megatron.groups import open_groups
from miles.training.megatron.layout import MegatronLayout
from tests.cpu.training.megatron.launch_arguments import engine_of_the_image
from tests.cpu.training.megatron.test_families import family_spec, settings_of

ENGINE = MegatronLayout(implementation="transformer_engine")


class EngineNorm(nn.Module):
    def __init__(self, config, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.arguments = config.layernorm_zero_centered_gamma, hidden_size, eps


class EngineRows(nn.Module):
    """As megatron-core calls TERowParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config, init_method, bias: bool) -> None:
        super().__init__()

    def forward(self, x):
        return x, None


def test_gemma_in_transformer_engines_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = family_spec("gemma3_text")
    open_groups(MegatronLayout(), spec.num_layers)
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.utils import is_layer_window_attention

    from miles.training.megatron.attention import PackedDotProductAttention, RotatedAttention
    from miles.training.megatron.layer_specs import layer_specs
    from miles.training.megatron.transformer_config import transformer_config

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", EngineNorm, raising=False)
    monkeypatch.setattr(provider, "TERowParallelLinear", EngineRows)
    with engine_of_the_image():
        config = transformer_config(spec, ENGINE, settings_of(spec), torch.bfloat16)
        block = layer_specs(spec, ENGINE, config, None)

    windowed = [config.window_size, config.window_attn_skip_freq]
    assert [is_layer_window_attention(*windowed, number) for number in (1, 2)] == [True, False]
    assert config.window_size == (3, 0), "a token and the three before it"
    assert config.softmax_scale == pytest.approx(11**-0.5)
    assert block.layer_norm is EngineNorm
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        assert attention.module is RotatedAttention
        assert attention.submodules.core_attention is not PackedDotProductAttention
        for projection in (attention.submodules.linear_proj, layer.submodules.mlp.submodules.linear_fc2):
            assert issubclass(projection, EngineRows)
            made = projection(8, spec.hidden_size, config=config, init_method=None, bias=False)
            assert made.post_layernorm.arguments == (True, spec.hidden_size, spec.rms_norm_eps)
