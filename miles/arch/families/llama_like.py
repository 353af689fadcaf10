"""What the families of plain decoders share: pre-norm grouped-query attention, SwiGLU MLPs, Llama's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles.arch.family import MtpNames, Shape
from miles.arch.hf_config import HF_DTYPE_NAMES, HfConfig, rope_scaling
from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MtpSpec

MTP_NAMES = MtpNames(
    layer="mtp.layers.{depth}",
    embedding_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    fc="mtp.fc.weight",
    final_norm="mtp.norm.weight",
)
"""As Qwen3-Next publishes its MTP layers: one projection for all of them."""


def read_attention(
    config: HfConfig,
    head_dim: int | None,
    *,
    qkv_bias: bool,
    output_bias: bool,
    qk_norm: bool,
    rotated: float = 1.0,
) -> AttentionSpec:
    """Heads, rotation and biases. `head_dim`, `rotated` (the part of a head that is rotated): where
    config.json names none; None: hidden_size / heads.
    """
    num_heads = config.count("num_attention_heads")
    num_kv_heads = config.count("num_key_value_heads", default=num_heads)
    head_dim = config.count("head_dim", default=head_dim or config.count("hidden_size") // num_heads)
    if num_heads % num_kv_heads:
        config.problem(
            f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    if head_dim % 2:
        config.problem(f"head_dim = {head_dim} is odd: rotary embedding rotates pairs")
    config.refuse("hidden_act", supported="silu", default="silu")
    config.refuse("use_sliding_window", supported=False, default=False)
    rope = config.rope(head_dim, rotated)
    return AttentionSpec(num_heads, num_kv_heads, head_dim, rope, qkv_bias, output_bias, qk_norm)


def make_spec(
    config: HfConfig,
    family: str,
    architecture: str,
    layers: tuple[LayerSpec, ...],
    shared_mtp_projection: bool = True,
    **more: Any,
) -> ArchSpec:
    """The fields around the layers, and `more` that a family sets. Raises what `config` collected."""
    bos = config.token_ids("bos_token_id")
    spec = ArchSpec(
        family=family,
        architecture=architecture,
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        layers=layers,
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        max_position_embeddings=config.count("max_position_embeddings", default=32768),
        eos_token_ids=config.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        dtype=config.dtype() or "fp32",
        initializer_range=config.number("initializer_range", default=0.02),
        mtp=_read_mtp(config, layers[-1], shared_mtp_projection),
        **more,
    )
    config.check()
    return spec


def _read_mtp(config: HfConfig, layer: LayerSpec, shared_projection: bool) -> MtpSpec | None:
    """MTP layers are shaped like the last decoder layer."""
    depth = config.mtp_num_layers()
    return MtpSpec((layer,) * depth, shared_projection) if depth else None


def common_hf_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json keys that these families share, in the form the published checkpoints use."""
    attention = spec.layers[0].attention
    eos = list(spec.eos_token_ids)
    return {
        "architectures": [spec.architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": attention.rope.theta,
        "rope_scaling": rope_scaling(attention.rope),
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": HF_DTYPE_NAMES[spec.dtype],
        "use_cache": True,
    }


def dense_layers(config: HfConfig, attention: AttentionSpec) -> tuple[LayerSpec, ...]:
    """As many equal layers with a SwiGLU MLP as config.json says."""
    mlp = DenseMlpSpec(config.count("intermediate_size"))
    return (LayerSpec(attention, mlp),) * config.count("num_hidden_layers")


def dense_hf_config(spec: ArchSpec) -> dict[str, Any]:
    """`common_hf_config` of a model of dense layers."""
    mlp = spec.layers[0].mlp
    assert isinstance(mlp, DenseMlpSpec)
    return common_hf_config(spec) | {"intermediate_size": mlp.intermediate_size}


def embedding_tensors(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    """Tensors outside the layers."""
    yield spec.embedding_name, (spec.vocab_size, spec.hidden_size)
    yield f"{spec.root}.norm.weight", (spec.hidden_size,)
    if not spec.tie_word_embeddings:
        yield spec.head_name, (spec.head_rows, spec.hidden_size)


def attention_tensors(prefix: str, attention: AttentionSpec, hidden_size: int) -> Iterator[tuple[str, Shape]]:
    """Norms and attention of one layer; `prefix` is `model.layers.<i>`."""
    yield f"{prefix}.input_layernorm.weight", (hidden_size,)
    widths = (("q", attention.query_width), ("k", attention.kv_width), ("v", attention.kv_width))
    for letter, width in widths if attention.keys_of is None else widths[:1]:
        yield f"{prefix}.self_attn.{letter}_proj.weight", (width, hidden_size)
        if attention.qkv_bias:
            yield f"{prefix}.self_attn.{letter}_proj.bias", (width,)
    if attention.qk_norm:
        yield f"{prefix}.self_attn.q_norm.weight", (attention.q_norm_width,)
        if attention.keys_of is None:
            yield f"{prefix}.self_attn.k_norm.weight", (attention.k_norm_width,)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden_size, attention.query_width)
    if attention.output_bias:
        yield f"{prefix}.self_attn.o_proj.bias", (hidden_size,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden_size,)


def swiglu_tensors(prefix: str, intermediate_size: int, hidden_size: int) -> Iterator[tuple[str, Shape]]:
    """One SwiGLU block; `prefix` ends before `gate_proj`."""
    yield f"{prefix}.gate_proj.weight", (intermediate_size, hidden_size)
    yield f"{prefix}.up_proj.weight", (intermediate_size, hidden_size)
    yield f"{prefix}.down_proj.weight", (hidden_size, intermediate_size)


def dense_layer_tensors(prefix: str, layer: LayerSpec, hidden_size: int) -> Iterator[tuple[str, Shape]]:
    """One layer with a dense MLP; `prefix` is `model.layers.<i>`."""
    assert isinstance(layer.mlp, DenseMlpSpec)
    yield from attention_tensors(prefix, layer.attention, hidden_size)
    yield from swiglu_tensors(f"{prefix}.mlp", layer.mlp.intermediate_size, hidden_size)


def dense_published_tensors(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    """Everything but MTP layers, of a model of dense layers."""
    yield from embedding_tensors(spec)
    for index, layer in enumerate(spec.layers):
        yield from dense_layer_tensors(f"{spec.root}.layers.{index}", layer, spec.hidden_size)
