"""What a published tensor is for, by its name: the part of a model that number formats choose by."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

Role = Literal[
    "embedding",
    "head",
    "norm",
    "bias",
    "router",
    "expert",
    "shared expert",
    "attention",
    "mlp",
    "MTP projection",
    "stream",
    "other",
]

_PATTERNS: tuple[tuple[Role, str], ...] = (
    ("bias", r"(\.bias|\.e_score_correction_bias|_bias)$"),
    ("embedding", r"(^|\.)embed_tokens(_per_layer)?\.weight$"),
    ("head", r"(^|\.)(lm_head|shared_head\.head)\.weight$"),
    ("norm", r"norm[^.]*\.weight$"),
    ("router", r"\.(gate|router|shared_expert_gate|indexer\.weights_proj)\.weight$"),
    ("expert", r"\.experts\."),
    ("shared expert", r"\.shared_experts?\."),
    ("stream", r"\.(altup|laurel|per_layer)[^.]*\."),
    ("stream", r"\.altup\.\w+$"),
    ("MTP projection", r"(\.eh_proj|(^|\.)mtp\.fc)\.weight$"),
    ("attention", r"\.self_attn\.(\w*proj\w*|indexer\.w[qk]\w*)\.weight$"),
    ("mlp", r"\.(mlp|feed_forward|block_sparse_moe)\.\w+_proj\.weight$"),
)
"""The first that fits decides; `hnorm` and `pre_fc_norm_embedding` are norms, `gate_proj` is not a router."""

FP32_BUFFERS = "e_score_correction_bias"
"""Router biases stay fp32 beside weights of any format: they are compared, not multiplied."""

_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _PATTERNS)
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp\.")


@lru_cache(maxsize=1 << 17)
def role_of(name: str) -> Role:
    """The part of the model that a published tensor belongs to."""
    return next((role for role, pattern in _COMPILED if pattern.search(name)), "other")


def is_fp32_buffer(name: str) -> bool:
    """Whether a published tensor is fp32 whatever the format of the weights, and gets no gradient."""
    return name.endswith(FP32_BUFFERS)


def decoder_layer(name: str) -> int | None:
    """Index of the layer a tensor lies in; None outside layers and in MTP layers with a name of their own."""
    found = _DECODER_LAYER.search(name)
    return int(found[1]) if found and not _MTP.search(name) else None
