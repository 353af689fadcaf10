"""The runner whose prefill and decode are the kernel's: the same calls as `runner.Runner`, and `advance`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.hidden_states import Stages, stage_names
from miles.models.mtp import MtpDraft
from miles.models.numerics import FAST, Numerics
from miles.rollout.native.fused.cache import BlockCache
from miles.rollout.native.fused.kernel import Kernel, Library
from miles.rollout.native.runner import PromptEnd
from miles.rollout.native.slots import Slots

MOST_STEPS = 16
MOST_SECONDS = 0.05
"""A call of the kernel ends after either, so that the engine's callers are not kept waiting."""


class FusedRunner:
    """A decoder in the kernel, fp32 on the CPU. Setting `decoder` packs its matrices: do it whenever they
    changed. A `draft` is kept for the owner; nothing is guessed with it. `numerics`: of what is
    drawn in torch."""

    def __init__(
        self, library: Path, spec: ArchSpec, num_slots: int, context_length: int, numerics: Numerics = FAST
    ) -> None:
        loaded = Library(library)
        self.spec, self.device, self.numerics = spec, torch.device("cpu"), numerics
        self.cache = BlockCache(loaded, spec, num_slots, context_length)
        self.kernel = Kernel(loaded, spec, self.cache.keys, self.cache.values)
        self.pack_seconds = 0.0
        self.draft: MtpDraft | None = None
        self._slots = torch.arange(num_slots)
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder | None:
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        started = time.perf_counter()
        self.kernel.load(decoder)
        self.pack_seconds += time.perf_counter() - started
        self._decoder = decoder

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> list[PromptEnd]:
        """Read each prompt into its slot."""
        lengths = [len(prompt) for prompt in prompts]
        ends = torch.tensor(list(accumulate(lengths))) - 1
        positions = torch.cat([torch.arange(length) for length in lengths])
        wanted = torch.full_like(positions, -1).index_copy_(0, ends, torch.arange(len(prompts)))
        of_prompt = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        tokens = torch.tensor(list(chain.from_iterable(prompts)))
        logits, routes = self.kernel.read(tokens, of_prompt, positions, wanted)
        split_routes = [None] * len(prompts) if routes is None else routes.split(lengths)
        hidden = [_no_hidden(length) for length in lengths]
        return [PromptEnd(*end) for end in zip(logits.split(1), split_routes, hidden, strict=True)]

    def prefill_chunk(self, tokens: Sequence[int], slot: int, start: int) -> PromptEnd:
        """Read the next tokens of a prompt that has `start` tokens in the slot."""
        count = len(tokens)
        wanted = torch.full((count,), -1)
        wanted[-1] = 0
        positions = torch.arange(start, start + count)
        logits, routes = self.kernel.read(torch.tensor(tokens), torch.full((count,), slot), positions, wanted)
        return PromptEnd(logits, routes, _no_hidden(count))

    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `Runner.decode`."""
        slots = self._slots[: len(tokens)]
        return self.kernel.read(tokens, slots, positions, slots)

    def trace(self, tokens: torch.Tensor, positions: torch.Tensor) -> Stages:
        """Read the next tokens (int64 [T]) of slot 0; what was computed on the way."""
        states = self.kernel.trace(tokens, torch.zeros_like(tokens), positions)
        return dict(zip(stage_names(self.spec.num_layers), states.unbind(1), strict=True))

    def advance(
        self, slots: Slots, running: int, most_steps: int = MOST_STEPS, to_the_end: bool = False
    ) -> tuple[int, torch.Tensor]:
        """Decode and draw for slots 0..running-1 without top-k or top-p; see `Kernel.decode`."""
        return self.kernel.decode(slots, running, most_steps, MOST_SECONDS, to_the_end)


def _no_hidden(length: int) -> torch.Tensor:
    """Hidden states stay in the kernel: they are for drafts, which it does not have."""
    return torch.empty(length, 0)
