"""Micro-batches through Megatron's schedules: one rank, a pipeline, or an interleaved one.

`run` gives every process the log-probs of its data-parallel rank's micro-batches and what they routed, though
only the last stage computes the former and every stage routes its own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from miles.arch.spec import ArchSpec
from miles.training.megatron.attention import PackedRows, micro_batch_rows
from miles.training.megatron.context_parallel import ContextSplit
from miles.training.megatron.groups import from_last_stage
from miles.training.megatron.head import trained_log_probs
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import PolicyModel
from miles.training.megatron.rounded_weights import RoundedLayers
from miles.training.megatron.routes import ForwardRoutes, SeenRoutes
from miles.training.native.forward import ForwardOutput
from miles.training.native.micro_batches import MicroBatch

Loss = Callable[[int, Tensor, Tensor | None], Tensor]
"""(place of the micro-batch, its log-probs [R], entropies [R] or None) -> the loss to differentiate."""

OnHidden = Callable[[int, Tensor], None]
"""(place of the micro-batch, its final hidden states [t, 1, D]), on the last stage."""

Indexed = Iterator[tuple[int, MicroBatch]]


@dataclass(frozen=True)
class PassSettings:
    """What one pass over micro-batches does. `measure`: also compare the routers' own choice with the batch's
    routes.
    """

    replay: bool
    measure: bool
    temperature: float
    with_entropy: bool
    chunk_tokens: int | None


@dataclass(frozen=True)
class Chunks:
    """This process's part of one model, as it is trained: each chunk may be wrapped.

    rounded: what its forward rounds, by decoder layer.
    """

    spec: ArchSpec
    layout: MegatronLayout
    wrapped: Sequence[nn.Module]
    bare: Sequence[PolicyModel]
    rounded: RoundedLayers


class Pass:
    """One pass over micro-batches. With a loss it leaves gradients, else it runs without."""

    def __init__(
        self, chunks: Chunks, settings: PassSettings, loss: Loss | None, on_hidden: OnHidden | None = None
    ) -> None:
        self._chunks, self._settings, self._loss, self._on_hidden = chunks, settings, loss, on_hidden
        self._bare = {id(wrapped): i for i, wrapped in enumerate(chunks.wrapped)}
        self._routes: dict[int, list[ForwardRoutes]] = {}
        self._ends: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._splits: dict[int, ContextSplit | None] = {}

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[ForwardOutput]:
        """The outcome for each micro-batch, on every process."""
        if not micro_batches:
            return []
        self._go_through(micro_batches)
        log_probs, entropies = self._at_end(micro_batches)
        parts = zip(log_probs, entropies, self._seen(micro_batches), strict=True)
        return [ForwardOutput(*part) for part in parts]

    def _go_through(self, micro_batches: Sequence[MicroBatch]) -> None:
        chunks, trains = self._chunks, self._loss is not None
        for chunk in chunks.bare:
            chunk.train(trains)
        iterators = [iter(enumerate(micro_batches)) for _ in chunks.wrapped]
        with torch.set_grad_enabled(trains):
            get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=list(chunks.wrapped) if len(iterators) > 1 else chunks.wrapped[0],
                num_microbatches=len(micro_batches),
                seq_length=max(len(micro_batch.tokens_T) for micro_batch in micro_batches),
                micro_batch_size=1,
                forward_only=not trains,
            )

    def _forward_step(self, batches: Indexed, wrapped: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index, micro_batch = next(batches)
        chunk = self._chunks.bare[self._bare[id(wrapped)]]
        rows = micro_batch_rows(micro_batch, self._chunks.layout, self._chunks.spec)
        routes = chunk.routes.announce(
            self._replayed(chunk, micro_batch, rows), self._settings.measure, trains=self._loss is not None
        )
        self._routes.setdefault(index, []).append(routes)
        self._splits[index] = rows.split
        hidden = wrapped(rows)

        def end(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss = self._end(chunk, hidden, rows, index, micro_batch)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}

        return hidden, end

    def _end(
        self, chunk: PolicyModel, hidden: Tensor, rows: PackedRows, index: int, micro_batch: MicroBatch
    ) -> Tensor:
        if self._on_hidden is not None:
            self._on_hidden(index, hidden)
        log_probs, entropy = self._read(chunk, hidden, rows, micro_batch)
        self._ends[index] = (log_probs.detach(), None if entropy is None else entropy.detach())
        if self._loss is None:
            return torch.zeros((), device=hidden.device)
        return self._loss(index, log_probs, entropy)

    def _read(
        self, chunk: PolicyModel, hidden: Tensor, rows: PackedRows, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """What the head says of the trained rows."""
        settings = self._settings
        return trained_log_probs(
            chunk,
            self._chunks.layout,
            hidden,
            rows,
            micro_batch,
            settings.temperature,
            settings.with_entropy,
            settings.chunk_tokens,
        )

    def _replayed(self, chunk: PolicyModel, micro_batch: MicroBatch, rows: PackedRows) -> list[Tensor] | None:
        """The batch's routes of this chunk's layers and this rank's rows; padding rows decide."""
        routes_TLK = micro_batch.routes_TLK
        if routes_TLK is None or not self._settings.replay:
            return None
        if rows.split is not None:
            routes_TLK = rows.split.own(routes_TLK, padding=-1)
        if rows.padding:
            blank = routes_TLK.new_full((rows.padding, *routes_TLK.shape[1:]), -1)
            routes_TLK = torch.cat([routes_TLK, blank])
        if self._chunks.layout.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            routes_TLK = routes_TLK.chunk(self._chunks.layout.tp)[rank]
        columns = [self._chunks.spec.moe_layers.index(layer) for layer in chunk.routes.layer_indices]
        return [routes_TLK[:, column].long() for column in columns]

    def _at_end(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor | None]]:
        """What `_read` gave for each micro-batch, on every process."""
        ends = [self._ends.get(index) for index in range(len(micro_batches))]
        sizes = [micro_batch.num_trained for micro_batch in micro_batches]
        at_end = ends[0] is not None
        read = from_last_stage(torch.cat([end[0] for end in ends if end]) if at_end else None)
        entropies: list[Tensor | None] = [None] * len(ends)
        if self._settings.with_entropy:
            own = torch.cat([end[1] for end in ends if end and end[1] is not None]) if at_end else None
            entropies = list(from_last_stage(own).split(sizes))
        return list(read.split(sizes)), entropies

    def _seen(self, micro_batches: Sequence[MicroBatch]) -> list[SeenRoutes]:
        dispatched = self._joined(
            [[r.dispatched for r in self._routes[i]] for i in range(len(micro_batches))]
        )
        decided = self._joined([[r.decided for r in self._routes[i]] for i in range(len(micro_batches))])
        result = []
        for micro_batch, ids, own in zip(micro_batches, dispatched, decided, strict=True):
            # Sequence parallelism pads the rows.
            num_rows = len(micro_batch.tokens_T)
            ids, own = (None if x is None else x[:num_rows] for x in (ids, own))
            recorded = None if micro_batch.routes_TLK is None else micro_batch.routes_TLK.long()
            result.append(SeenRoutes(ids, own, recorded))
        return result

    def _joined(self, by_batch: list[list[dict[int, Tensor]]]) -> list[Tensor | None]:
        """Ids [T, L, k] per micro-batch, of all stages and tensor-parallel ranks; None without any."""
        own = [
            {
                self._chunks.spec.moe_layers.index(layer): ids[number].to(torch.int16)
                for chunk, ids in zip(self._chunks.bare, by_chunk, strict=True)
                for number, layer in enumerate(chunk.routes.layer_indices)
                if number in ids
            }
            for by_chunk in by_batch
        ]
        parts: list[list[dict[int, Tensor]]] = [own]
        layout = self._chunks.layout
        if layout.tp * layout.pp > 1:
            group = parallel_state.get_model_parallel_group()
            parts = [own] * dist.get_world_size(group)
            dist.all_gather_object(parts, own, group=group)
        own_rows = [self._one([part[index] for part in parts]) for index in range(len(own))]
        return own_rows if layout.cp == 1 else self._over_context(own_rows)

    def _over_context(self, own_rows: list[Tensor | None]) -> list[Tensor | None]:
        """Ids of this rank's rows, padding included, -> of all rows of each micro-batch."""
        parts: list[list[Tensor | None]] = [own_rows] * self._chunks.layout.cp
        dist.all_gather_object(parts, own_rows, group=parallel_state.get_context_parallel_group())
        found: list[Tensor | None] = []
        for index, by_rank in enumerate(zip(*parts, strict=True)):
            split, ids = self._splits[index], [part for part in by_rank if part is not None]
            assert split is not None
            found.append(split.whole(ids) if ids else None)
        return found

    def _one(self, parts: list[dict[int, Tensor]]) -> Tensor | None:
        layers: dict[int, list[Tensor]] = {}
        for part in parts:
            for layer, ids in part.items():
                layers.setdefault(layer, []).append(ids)
        if not layers:
            return None
        whole = [torch.cat(layers[layer]) for layer in sorted(layers)]
        return torch.stack(whole, 1).long()
