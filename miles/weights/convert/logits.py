"""Both models run on the same random tokens: how far a conversion moves what the model predicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from miles.errors import CheckpointError, MilesError
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.weights.convert.plan import Conversion
from miles.weights.convert.run import Check
from miles.weights.convert.source import Source, open_source
from miles.weights.convert.stored import as_numbers
from miles.weights.native_map import load_published, without_spare_mtp

SEQUENCES, LENGTH = 4, 64
"""Tokens that are predicted: enough to see a wrong layout, few enough for a laptop."""
_BYTES = 4


def check_of_logits(plan: Conversion) -> Check:
    """A check for `convert`. Raises CheckpointError now where memory does not hold the model in fp32."""
    needed, free = _BYTES * plan.spec.num_parameters(), psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"the model takes {needed:,} bytes in fp32, {free:,} are free",
            where=str(plan.source.directory),
            fix="leave --check-logits out: every weight is compared anyway",
        )

    def check(files: Path) -> dict[str, Any]:
        decoder = Decoder(plan.spec.policy, torch.float32)
        before = _log_probs(decoder, plan.source)
        after = _log_probs(decoder, open_source(files))
        return {"logits": compared(before, after)}

    return check


def compared(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Mean KL(before || after) in nats, the largest difference of a log-prob, and how often the best token is
    the same. Log-probs [T, V]. Raises MilesError where those after are not finite.
    """
    if not bool(after.isfinite().all()):
        raise MilesError(
            "the converted model predicts NaN or infinities",
            why="its weights are finite, so it is the format that breaks this model",
            fix="keep the first and last layers in bf16, or choose another format",
        )
    return {
        "tokens": len(before),
        "kl": float((before.exp() * (before - after)).sum(-1).mean()),
        "max_difference": float((before - after).abs().max()),
        "same_best": float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    }


@torch.no_grad()
def _log_probs(decoder: Decoder, source: Source) -> Tensor:
    """[T, V] of random tokens, with the weights of a checkpoint."""
    spec = decoder.spec
    load_published(decoder, without_spare_mtp(source.spec, spec, _numbers(source)), str(source.directory))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(spec.vocab_size, (SEQUENCES * LENGTH,), generator=generator)
    positions = torch.arange(LENGTH).repeat(SEQUENCES)
    attention = PackedAttention(torch.arange(SEQUENCES + 1, dtype=torch.int32) * LENGTH)
    hidden = decoder(tokens, positions, attention, Router.decide())
    # fp64: a divergence of two nearly equal distributions is smaller than fp32's rounding of their sums.
    return torch.log_softmax(decoder.logits(hidden).double(), -1)


def _numbers(source: Source) -> Iterator[tuple[str, Tensor]]:
    try:
        for name, weight in source.weights.items():
            parts = {part: source.reader.read(entry) for part, entry in weight.parts.items()}
            yield name, as_numbers(weight, parts, torch.float32)
    finally:
        source.reader.close()
