"""A finished sequence read again the way the engine reads it: the prompt at once, then token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miles.models.decoder import Decoder
from miles.models.hidden_states import Stages, hidden_states, joined
from miles.models.numerics import Numerics
from miles.rollout.native.runner import Runner


@torch.inference_mode()
def rescore(decoder: Decoder, numerics: Numerics, tokens: Sequence[int], prompt_length: int) -> Stages:
    """The decoder's stages [len(tokens), D], alone in a batch, at the decoder's present weights."""
    runner = Runner(decoder.spec, 1, len(tokens), decoder.embed.dtype, decoder.embed.device, numerics)
    runner.decoder = decoder
    with hidden_states(decoder) as seen:
        runner.prefill([tokens[:prompt_length]], [0])
        for position in range(prompt_length, len(tokens)):
            at = torch.tensor([position], device=runner.device)
            runner.decode(torch.tensor([tokens[position]], device=runner.device), at)
    return joined(seen)
