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

YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0} | {
    "original_max_position_embeddings": 16
}
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


@pytest.fixture
def engine_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", EngineNorm, raising=False)
    monkeypatch.setattr(provider, "TERowParallelLinear", EngineRows)


def test_gemma_in_transformer_engines_layers(engine_specs: None) -> None:
    spec = family_spec("gemma3_text")
    open_groups(MegatronLayout(), spec.num_layers)
    from megatron.core.transformer.utils import is_layer_window_attention

    from miles.training.megatron.attention import PackedDotProductAttention, RotatedAttention
    from miles.training.megatron.layer_specs import layer_specs
    from miles.training.megatron.transformer_config import transformer_config

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


def test_an_indexer_in_transformer_engines_layers(engine_specs: None) -> None:
    """Its attention is ours, and rows have their own angles: both take packed sequences as they are."""
    spec = family_spec("deepseek_v32", rope_scaling=YARN)
    open_groups(MegatronLayout(), spec.num_layers)
    from miles.models.attention import PackedAttention
    from miles.training.megatron.attention import packed_rows
    from miles.training.megatron.layer_specs import layer_specs
    from miles.training.megatron.sparse_attention import ChosenAttention, SparseLatentAttention
    from miles.training.megatron.transformer_config import transformer_config

    with engine_of_the_image():
        config = transformer_config(spec, ENGINE, settings_of(spec), torch.bfloat16)
        block = layer_specs(spec, ENGINE, config, None)
    assert not config.apply_rope_fusion
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        assert attention.module is SparseLatentAttention
        assert attention.submodules.core_attention.module is ChosenAttention
    positions = torch.tensor([0, 1, 0, 1, 2])
    rows = packed_rows(positions, positions, torch.tensor([0, 2, 5]), ENGINE, spec)
    assert rows.angles_at is positions and isinstance(rows.attention, PackedAttention)


def test_an_indexer_reads_latents_normed_where_the_projection_norms_them() -> None:
    """As Transformer Engine fuses them; megatron-core's indexer is handed those before the norm."""
    spec = family_spec("deepseek_v32", num_nextn_predict_layers=0)
    layout = MegatronLayout()
    open_groups(layout, spec.num_layers)
    from miles.training.megatron.attention import packed_rows
    from miles.training.megatron.model import build_chunks
    from miles.training.megatron.tensors import MegatronTensors
    from miles.training.megatron.transformer_config import transformer_config
    from miles.weights.native_map import to_published
    from tests.cpu.training.megatron.test_model import random_decoder

    config = transformer_config(spec, layout, settings_of(spec), torch.float32)
    (model,) = build_chunks(spec, layout, config, torch.device("cpu"))
    MegatronTensors(spec, [model], torch.device("cpu")).load(to_published(random_decoder(spec)), where="here")
    tokens = torch.randint(spec.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    rows = packed_rows(tokens, torch.arange(40), torch.tensor([0, 40]), layout, spec)

    def hidden() -> torch.Tensor:
        model.routes.announce(None, measure=False, trains=False)
        return model(rows)

    expected = hidden()
    for layer in model.decoder.layers:
        attention = layer.self_attention
        norm, up = attention.q_layernorm, attention.linear_q_up_proj
        up.layer_norm_weight, plain = norm.weight, up.forward
        up.forward = lambda x, norm=norm, plain=plain: plain(norm(x))
        attention.q_layernorm = nn.Identity()
    torch.testing.assert_close(hidden(), expected)
