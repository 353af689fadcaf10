"""Routing replay (R3) through megatron-core's own hook: every router asks its `RouterReplay` for experts.

One `RouteBook` serves one model chunk: before a micro-batch's forward it is told what to replay, afterwards
it knows what was dispatched and what the routers would have chosen, for this rank's rows and layers.

Legend: T rows of a micro-batch, t those of this rank (sequence parallelism), L MoE layers, k experts per
token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from miles.models.routing_stats import RoutingAgreement, compare_routes

ComputeTopk = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class ForwardRoutes:
    """The routes of one forward: `replayed`, `dispatched` and `decided`, by layer of this chunk."""

    replayed: list[Tensor] | None
    measure: bool
    dispatched: dict[int, Tensor] = field(default_factory=dict)
    decided: dict[int, Tensor] = field(default_factory=dict)


class LayerReplay(RouterReplay):
    """The routing of one layer. -1 rows fall through to deciding.

    Activation recompute runs the router again in backward, with gradients on, and must get the same experts:
    what a forward without gradients chose waits in `_again`, in the order of the forwards, which is that of
    the backwards.
    """

    def __init__(self, layer: int, recomputes: bool) -> None:
        super().__init__()
        self._layer, self._recomputes = layer, recomputes
        self._again: deque[Tensor] = deque()
        self.routes: ForwardRoutes | None = None
        self.trains = False

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopk | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [t, E] -> scores and ids [t, k] of the chosen experts, with the gradient of `scores`."""
        assert default_compute_topk is not None and self.routes is not None, "no forward was announced"
        if self._recomputes and self.trains and torch.is_grad_enabled():
            ids = self._again.popleft()
            return scores.gather(1, ids), ids
        ids = self._choose(scores, lambda: default_compute_topk(scores, topk, num_groups, group_topk)[1])
        if self._recomputes and self.trains:
            self._again.append(ids)
        self.routes.dispatched[self._layer] = ids
        return scores.gather(1, ids), ids

    def _choose(self, scores: Tensor, decide: Callable[[], Tensor]) -> Tensor:
        assert self.routes is not None
        replayed = None if self.routes.replayed is None else self.routes.replayed[self._layer]
        gaps = replayed is not None and bool((replayed < 0).any())
        decided = decide() if replayed is None or gaps or self.routes.measure else None
        if decided is not None and self.routes.measure:
            self.routes.decided[self._layer] = decided
        if replayed is None or decided is None:
            return decided if replayed is None else replayed
        return torch.where(replayed[:, :1] < 0, decided, replayed)


class RouteBook:
    """The routers of one model chunk, in layer order."""

    def __init__(self, decoder: Any, recomputes: bool) -> None:
        self.layers = [layer for layer in decoder.layers if hasattr(layer.mlp, "router")]
        self._replays = []
        for index, layer in enumerate(self.layers):
            replay = LayerReplay(index, recomputes)
            layer.mlp.router.router_replay = replay
            self._replays.append(replay)
        # megatron-core keeps all instances of a process in one list; policy and reference must not mix.
        RouterReplay.clear_global_router_replay_instances()

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Of the whole model, from 0."""
        return tuple(layer.layer_number - 1 for layer in self.layers)

    def announce(self, replayed: list[Tensor] | None, measure: bool, trains: bool) -> ForwardRoutes:
        """The next forward's routes: int64 [t, k] for each of `layers`, or None to decide."""
        routes = ForwardRoutes(replayed, measure)
        for replay in self._replays:
            replay.routes, replay.trains = routes, trains
        return routes


class SeenRoutes:
    """What one pass over a micro-batch routed, compared with what the engine recorded.

    Args:
        dispatched: int64 [T, L, k]; None for a dense model.
        decided: the routers' own choice; None where it was not measured.
        recorded: int64 [T, L, k], -1 where nothing was recorded; None without routes.
    """

    def __init__(self, dispatched: Tensor | None, decided: Tensor | None, recorded: Tensor | None) -> None:
        self.dispatched = {} if dispatched is None else dict(enumerate(dispatched.unbind(1)))
        self._flips: list[Tensor] = []
        self._disjoint: list[Tensor] = []
        self._wrong: list[Tensor] = []
        self._recorded = recorded
        if decided is None or recorded is None:
            return
        for layer, own in enumerate(decided.unbind(1)):
            flipped, disjoint = compare_routes(own, recorded[:, layer])
            self._flips.append(flipped)
            self._disjoint.append(disjoint)
            self._wrong.append(compare_routes(self.dispatched[layer], recorded[:, layer])[0])

    @property
    def measures(self) -> bool:
        """Whether this pass was compared with recorded routes."""
        return bool(self._flips)

    def flipped_rows(self) -> Tensor:
        """bool [T]: rows that would be routed otherwise in at least one layer."""
        return torch.stack(self._flips).any(0)

    def agreement(self, copies: Tensor | None = None) -> RoutingAgreement:
        """As `models.routing.Router.agreement`."""
        assert self._recorded is not None and self.measures, "nothing to compare with"

        def count(rows: Tensor) -> int:
            return int((rows if copies is None else rows * copies).sum())

        return RoutingAgreement(
            rows=count(self._recorded[:, 0, 0] >= 0),
            flips_per_layer=tuple(count(flips) for flips in self._flips),
            any_flip=count(self.flipped_rows()),
            zero_overlap=sum(count(rows) for rows in self._disjoint),
            dispatched_flips=sum(count(rows) for rows in self._wrong),
        )
