"""How much memory a run needs in one process, by plain arithmetic over the ArchSpec.

The estimate names each part and its formula, so that a reader can check it; it is not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.arch import ArchSpec, MoeSpec

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one stored number."""

ADAM_BYTES = 8
"""First and second moments in fp32, per parameter."""

MASTER_BYTES = 4
"""The fp32 copy that AdamW updates when the weights themselves are stored in 16 bits, per parameter."""

LOGIT_CHUNK_TOKENS = 1024
"""Log-probs are computed over this many tokens at a time, so logits exist only for one chunk."""


@dataclass(frozen=True)
class MemoryPart:
    """One line of the estimate."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class MemoryPlan:
    """The estimate of one process that trains and samples."""

    parts: tuple[MemoryPart, ...]

    @property
    def total_bytes(self) -> int:
        """The sum of all parts; nothing is assumed to be freed between phases."""
        return sum(part.bytes for part in self.parts)


SERVER_BYTES = 2_100 * 1024**2
"""Resident memory of one SGLang server without its model: three processes of some 700 MiB, as measured."""


def _server_parts(servers: int, parameters: int, width: int) -> list[MemoryPart]:
    """Programs and weights of the servers, each a process group of its own."""
    if servers == 0:
        return []
    formula = f"{servers} × (2,100 MiB of program + {parameters:,} parameters × {width} B)"
    return [MemoryPart("SGLang servers", servers * (SERVER_BYTES + parameters * width), formula)]


def estimate_memory(
    spec: ArchSpec,
    dtype: str,
    *,
    cached_tokens: int,
    micro_batch_tokens: int,
    reference: bool,
    rollout_format: str | None = None,
    packed: bool = False,
    mtp_parameters: int = 0,
    train_mtp: bool = False,
    servers: int = 0,
) -> MemoryPlan:
    """Memory of policy, reference, optimizer, KV cache and one micro-batch in one process, in bytes.

    `cached_tokens`: see `EngineLimits.cached_tokens`; `micro_batch_tokens`: tokens of one backward pass;
    `rollout_format`: that of the engine's weights, where it is not `dtype`. The engine computes on plain
    numbers: a quantised format takes the room of `dtype`. `packed`: the decode kernel keeps its own copy.
    `mtp_parameters`: those of the MTP layers in use. `servers`: SGLang servers beside the process.
    """
    parameters, width = spec.num_parameters(), BYTES[dtype]
    copied = rollout_format is not None and rollout_format != dtype
    engine_width = BYTES.get(rollout_format, width) if rollout_format is not None else width
    shared = "" if copied or servers else ", trainer and engine share"
    parts = [
        *_server_parts(servers, parameters, engine_width),
        MemoryPart("weights", parameters * width, f"{parameters:,} parameters × {width} B{shared}"),
        *([_engine_weights(parameters, engine_width)] if copied and not servers else []),
        *([_packed_weights(parameters)] if packed else []),
        *([_reference(parameters, width)] if reference else []),
        MemoryPart("gradients", parameters * width, f"{parameters:,} × {width} B"),
        _optimizer(parameters, width),
        *([_mtp_layers(mtp_parameters, width, train_mtp)] if mtp_parameters else []),
        *([_engine_mtp_layers(mtp_parameters, engine_width)] if mtp_parameters and copied else []),
        _kv_cache(spec, engine_width, cached_tokens),
        _activations(spec, width, micro_batch_tokens),
    ]
    return MemoryPlan(tuple(parts))


def _packed_weights(parameters: int) -> MemoryPart:
    width = BYTES["fp32"]
    return MemoryPart("decode kernel", parameters * width, f"{parameters:,} parameters × {width} B, packed")


def _engine_weights(parameters: int, width: int) -> MemoryPart:
    return MemoryPart("engine weights", parameters * width, f"{parameters:,} parameters × {width} B")


def _reference(parameters: int, width: int) -> MemoryPart:
    return MemoryPart("reference", parameters * width, f"{parameters:,} parameters × {width} B")


def _optimizer(parameters: int, width: int) -> MemoryPart:
    per_parameter = ADAM_BYTES + (MASTER_BYTES if width < 4 else 0)
    master = " (moments and fp32 master)" if width < 4 else " (two fp32 moments)"
    return MemoryPart("optimizer", parameters * per_parameter, f"{parameters:,} × {per_parameter} B{master}")


def _mtp_layers(parameters: int, width: int, trained: bool) -> MemoryPart:
    """Weights, and where they are trained gradients, moments and masters."""
    training = width + ADAM_BYTES + (MASTER_BYTES if width < 4 else 0) if trained else 0
    kind = "weights, gradients, optimizer" if trained else "weights"
    each = width + training
    return MemoryPart("MTP layers", parameters * each, f"{parameters:,} parameters × {each} B ({kind})")


def _engine_mtp_layers(parameters: int, width: int) -> MemoryPart:
    return MemoryPart("engine MTP layers", parameters * width, f"{parameters:,} parameters × {width} B")


def _kv_cache(spec: ArchSpec, width: int, tokens: int) -> MemoryPart:
    row = sum(layer.attention.cache_width for layer in spec.layers)
    return MemoryPart(
        "KV cache",
        tokens * row * width,
        f"{tokens:,} tokens × {row:,} numbers × {width} B",
    )


def _activations(spec: ArchSpec, width: int, tokens: int) -> MemoryPart:
    """What backward keeps of one micro-batch, and one chunk of fp32 logits with its gradient."""
    per_token = sum(_kept_per_token(spec, index) for index in range(spec.num_layers))
    logits = 2 * min(tokens, LOGIT_CHUNK_TOKENS) * spec.vocab_size * 4
    return MemoryPart(
        "activations",
        tokens * per_token * width + logits,
        f"{tokens} tokens × {per_token:,} numbers × {width} B + logits of "
        f"{min(tokens, LOGIT_CHUNK_TOKENS)} tokens × {spec.vocab_size:,} × 8 B",
    )


def _kept_per_token(spec: ArchSpec, index: int) -> int:
    """Numbers that one layer keeps per token: norms, residuals, q, k, v, attention output, MLP."""
    layer = spec.layers[index]
    attention = layer.attention.kept_width
    if isinstance(layer.mlp, MoeSpec):
        mlp = layer.mlp.top_k * (3 * layer.mlp.intermediate_size + 2 * spec.hidden_size)
        mlp += 3 * layer.mlp.shared_size
    else:
        mlp = 3 * layer.mlp.intermediate_size
    return 4 * spec.hidden_size + attention + mlp
