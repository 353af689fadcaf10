"""A finished sequence read again the way the engine reads it: the prompt at once, then token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from miles.models.decoder import Decoder
from miles.models.hidden_states import Stages, hidden_states, joined
from miles.models.numerics import Numerics
from miles.rollout.native.fused.kernel import MOST_TRACED
from miles.rollout.native.fused.runner import FusedRunner
from miles.rollout.native.runner import Runner


@torch.inference_mode()
def rescore(
    decoder: Decoder,
    numerics: Numerics,
    tokens: Sequence[int],
    prompt_length: int,
    decode_library: Path | None = None,
) -> Stages:
    """The decoder's stages [len(tokens), D], alone in a batch, at the decoder's present weights; by the
    decode kernel where there is one."""
    if decode_library is not None:
        return _by_kernel(decode_library, decoder, tokens, prompt_length)
    runner = Runner(decoder.spec, 1, len(tokens), decoder.embed.dtype, decoder.embed.device, numerics)
    runner.decoder = decoder
    with hidden_states(decoder) as seen:
        runner.prefill([tokens[:prompt_length]], [0])
        for position in range(prompt_length, len(tokens)):
            at = torch.tensor([position], device=runner.device)
            runner.decode(torch.tensor([tokens[position]], device=runner.device), at)
    # A step may have been computed in more rows than the one of its token.
    return joined({stage: [first, *(step[:1] for step in steps)] for stage, (first, *steps) in seen.items()})


def _by_kernel(library: Path, decoder: Decoder, tokens: Sequence[int], prompt_length: int) -> Stages:
    runner = FusedRunner(library, decoder.spec, 1, len(tokens))
    runner.decoder = decoder
    flat, positions = torch.tensor(tokens), torch.arange(len(tokens))
    ends = [*range(0, prompt_length, MOST_TRACED), *range(prompt_length, len(tokens) + 1)]
    seen: dict[str, list[torch.Tensor]] = {}
    for start, stop in pairwise(ends):
        for stage, states in runner.trace(flat[start:stop], positions[start:stop]).items():
            seen.setdefault(stage, []).append(states)
    return joined(seen)
