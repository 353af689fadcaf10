"""Watches a run that promises the engine's bits: the first token whose log-prob differs is traced to a layer.

The sequence goes through both paths once more, before any weight changes, and the hidden states are compared
stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from miles.data.batch import TrainBatch
from miles.models.decoder import Decoder
from miles.models.hidden_states import Stages, first_difference, hidden_states, joined
from miles.training.native.forward import ForwardOutput, forward, make_router
from miles.training.native.micro_batches import MicroBatch

ALIGNMENT_BROKEN = "alignment_broken"
"""Kind of the event."""

Rescore = Callable[[Sequence[int], int], Stages]
"""(input tokens, prompt length) -> the engine's stages, read as the engine reads a prompt and a response."""


class GapWatch:
    """Sees the measured micro-batches of a step; `take_event` tells what was found since the last one.

    Args:
        rescore: the engine's path; None where the engine lives in another process: then the event names the
            token and no layer.
        replay: whether the trainer replays routes.
    """

    def __init__(self, rescore: Rescore | None, replay: bool, temperature: float) -> None:
        self._rescore, self._replay, self._temperature = rescore, replay, temperature
        self._event: dict[str, Any] | None = None

    def see(
        self, decoder: Decoder, micro_batch: MicroBatch, batch: TrainBatch, output: ForwardOutput
    ) -> None:
        """Compare one forward's log-probs with the engine's, while the weights are those it sampled with."""
        rollout_R = micro_batch.trained_values(batch.rollout_log_probs)
        assert rollout_R is not None, "a batch has a column for the engine's log-probs"
        train_R = output.log_probs_R.detach()
        differs_R = (train_R != rollout_R) & ~torch.isnan(rollout_R)
        count = int(differs_R.sum())
        if count == 0:
            return
        if self._event is None:
            self._event = {"kind": ALIGNMENT_BROKEN, "tokens": 0}
            self._event |= self._trace(decoder, micro_batch, batch, int(differs_R.nonzero()[0]))
        self._event["tokens"] += count

    def take_event(self) -> dict[str, Any] | None:
        """The event of a step: where the first difference was, and `tokens`, how many there were."""
        event, self._event = self._event, None
        return event

    @torch.no_grad()
    def _trace(
        self, decoder: Decoder, micro_batch: MicroBatch, batch: TrainBatch, trained: int
    ) -> dict[str, Any]:
        """Where trained row number `trained` of the micro-batch lies, and the first stage that differs."""
        row = int(micro_batch.trained_rows[trained])
        sequence = int((batch.cu_seqlens <= row).sum()) - 1
        start, stop = (int(end) for end in batch.cu_seqlens[sequence : sequence + 2])
        found: dict[str, Any] = {"sample": int(batch.sample_index[sequence]), "position": row - start + 1}
        if self._rescore is None:
            return found | {"stage": None, "why": "the engine is in another process"}
        prompt = int((batch.loss_mask[start:stop] > 0).argmax()) + 1
        ours = self._stages(decoder, micro_batch, start, stop - start)
        difference = first_difference(ours, self._rescore(batch.tokens[start:stop].tolist(), prompt))
        if difference is None:
            why = "read again alone, the sequence is equal: the engine's other requests made the difference"
            return found | {"stage": None, "why": why}
        return found | asdict(difference)

    def _stages(self, decoder: Decoder, micro_batch: MicroBatch, start: int, length: int) -> Stages:
        """The trainer's stages of the rows from `start` on, computed in the micro-batch they came in."""
        first = int((torch.from_numpy(micro_batch.packed_rows) == start).nonzero()[0])
        with hidden_states(decoder) as seen:
            router = make_router(micro_batch, replay=self._replay)
            forward(decoder, micro_batch, router, self._temperature, with_entropy=False)
        stages = {stage: micro_batch.unshared(rows) for stage, rows in joined(seen).items()}
        return {stage: rows[first : first + length] for stage, rows in stages.items()}
