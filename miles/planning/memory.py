"""How much memory a run needs in one process, by plain arithmetic over the ArchSpec.

The estimate names each part and its formula, so that a reader can check it; it is not a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miles.arch import ArchSpec, MoeSpec
from miles.planning.recompute import Recompute
from miles.planning.stored_bytes import StoredBytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one stored number."""

ADAM_BYTES = 8
"""First and second moments in fp32, per parameter."""

MASTER_BYTES = 4
"""The fp32 copy that AdamW updates when the weights themselves are stored in 16 bits, per parameter."""

LOGIT_CHUNK_TOKENS = 1024
"""Log-probs are computed over this many tokens at a time, so logits exist only for one chunk."""


KEEP_ALL = Recompute()


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
    recompute: Recompute = KEEP_ALL,
    stored: StoredBytes | None = None,
    rounds: bool = False,
    draft_numbers: int = 0,
    route_bytes: int = 0,
    packet: bool = False,
    apart: bool = False,
    critic: bool = False,
) -> MemoryPlan:
    """Memory of policy, reference, optimizer, KV cache and one micro-batch in one process, in bytes.

    `cached_tokens`: see `EngineLimits.cached_tokens`; `micro_batch_tokens`: tokens of one backward pass;
    `rollout_format`: that of the engine's weights, where it is not `dtype`. `stored`: those of a quantised
    format, which the engine multiplies as plain numbers that it keeps beside them. `rounds`: the trainer's
    forward rounds the same weights. `packed`: the decode kernel keeps its own copy. `mtp_parameters`: those
    of the MTP layers in use. `servers`: SGLang servers beside the process. `draft_numbers`: what the cache of
    a draft holds of a token. `route_bytes`: of the routes of one rollout. `packet`: weights travel between
    processes in a copy of their own. `apart`: the engine keeps weights of its own. `critic`: one is
    trained, whose micro-batches take turns with the policy's.
    """
    parameters, width = spec.num_parameters(), BYTES[dtype]
    copied = apart or (rollout_format is not None and rollout_format != dtype)
    engine_width = BYTES.get(rollout_format, width) if rollout_format is not None else width
    shared = "" if copied or servers else ", trainer and engine share"
    parts = [
        *_server_parts(servers, parameters, engine_width),
        MemoryPart("weights", parameters * width, f"{parameters:,} parameters × {width} B{shared}"),
        *(_engine_weights(parameters, width, engine_width, stored) if copied and not servers else ()),
        *([_packet(parameters, engine_width if copied else width, stored)] if packet else []),
        *([_packed_weights(parameters)] if packed else []),
        *([_reference(parameters, width)] if reference else []),
        *([_rounded_weights(stored.quantised, width)] if rounds and stored else []),
        MemoryPart("gradients", parameters * width, f"{parameters:,} × {width} B"),
        _optimizer(parameters, width),
        *([_critic(spec.critic.num_parameters(), width)] if critic else []),
        *([_mtp_layers(mtp_parameters, width, train_mtp)] if mtp_parameters else []),
        *([_engine_mtp_layers(mtp_parameters, engine_width)] if mtp_parameters and copied else []),
        _kv_cache(spec, engine_width, cached_tokens),
        *([_draft_cache(draft_numbers, engine_width, cached_tokens)] if draft_numbers else []),
        _activations(spec, width, micro_batch_tokens, recompute),
        *([MemoryPart("routes", route_bytes, "of one rollout, 2 B an expert id")] if route_bytes else []),
    ]
    return MemoryPlan(tuple(parts))


def _packed_weights(parameters: int) -> MemoryPart:
    width = BYTES["fp32"]
    return MemoryPart("decode kernel", parameters * width, f"{parameters:,} parameters × {width} B, packed")


def _engine_weights(
    parameters: int, width: int, engine_width: int, stored: StoredBytes | None
) -> Iterator[MemoryPart]:
    if stored is None:
        told = f"{parameters:,} parameters × {engine_width} B"
        yield MemoryPart("engine weights", parameters * engine_width, told)
        return
    told = f"{stored.quantised:,} quantised in {stored.quantised_bytes:,} B + {stored.plain:,} plain"
    yield MemoryPart("engine weights", stored.total, told)
    told = f"{stored.quantised:,} quantised weights × {width} B, as they are multiplied"
    yield MemoryPart("engine's products", stored.quantised * width, told)


def _packet(parameters: int, width: int, stored: StoredBytes | None) -> MemoryPart:
    size = parameters * width if stored is None else stored.total
    return MemoryPart("weight packet", size, "the engine's weights on their way between processes")


def _rounded_weights(quantised: int, width: int) -> MemoryPart:
    told = f"{quantised:,} fake-quantised weights × {width} B, kept for backward"
    return MemoryPart("rounded weights", quantised * width, told)


def _draft_cache(numbers: int, width: int, tokens: int) -> MemoryPart:
    told = f"{tokens:,} tokens × {numbers:,} numbers × {width} B"
    return MemoryPart("draft cache", tokens * numbers * width, told)


def _reference(parameters: int, width: int) -> MemoryPart:
    return MemoryPart("reference", parameters * width, f"{parameters:,} parameters × {width} B")


def _optimizer(parameters: int, width: int) -> MemoryPart:
    per_parameter = ADAM_BYTES + (MASTER_BYTES if width < 4 else 0)
    master = " (moments and fp32 master)" if width < 4 else " (two fp32 moments)"
    return MemoryPart("optimizer", parameters * per_parameter, f"{parameters:,} × {per_parameter} B{master}")


def _critic(parameters: int, width: int) -> MemoryPart:
    each = 2 * width + ADAM_BYTES + (MASTER_BYTES if width < 4 else 0)
    told = f"{parameters:,} parameters × {each} B (weights, gradients, optimizer)"
    return MemoryPart("critic", parameters * each, told)


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


def _activations(spec: ArchSpec, width: int, tokens: int, recompute: Recompute) -> MemoryPart:
    """What backward keeps of one micro-batch, and one chunk of fp32 logits with its gradient.

    A recomputed layer keeps its input, and one of them is whole again at a time.
    """
    kept = [_kept_per_token(spec, index, recompute.modules) for index in range(spec.num_layers)]
    again = kept[: recompute.layers]
    per_token = len(again) * spec.hidden_size + max(again, default=0) + sum(kept[len(again) :])
    logits = 2 * min(tokens, LOGIT_CHUNK_TOKENS) * spec.vocab_size * 4
    return MemoryPart(
        "activations",
        tokens * per_token * width + logits,
        f"{tokens} tokens × {per_token:,} numbers × {width} B + logits of "
        f"{min(tokens, LOGIT_CHUNK_TOKENS)} tokens × {spec.vocab_size:,} × 8 B",
    )


def _kept_per_token(spec: ArchSpec, index: int, recomputed: tuple[str, ...]) -> int:
    """Numbers that one layer keeps per token: norms, residuals, q, k, v, attention output, MLP."""
    layer = spec.layers[index]
    attention = layer.attention.kept_width
    if ("moe" if isinstance(layer.mlp, MoeSpec) else "mlp") in recomputed:
        return 3 * spec.hidden_size + attention
    if isinstance(layer.mlp, MoeSpec):
        mlp = layer.mlp.top_k * (3 * layer.mlp.intermediate_size + 2 * spec.hidden_size)
        mlp += 3 * layer.mlp.shared_size
    else:
        mlp = 3 * layer.mlp.intermediate_size
    return 4 * spec.hidden_size + attention + mlp
