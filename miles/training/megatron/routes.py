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
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from miles.arch.spec import MoeSpec
from miles.models.routing import decide
from miles.models.routing_stats import RoutingAgreement, compare_routes

ComputeTopk = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class ForwardRoutes:
    """The routes of one forward: `replayed`, `dispatched` and `decided`, by layer of this chunk."""

    replayed: list[Tensor] | None
    measure: bool
    dispatched: dict[int, Tensor] = field(default_factory=dict)
    decided: dict[int, Tensor] = field(default_factory=dict)


class Deciding(RouterReplay):
    """A router that always decides, as `models.routing` does: Megatron's own choice scores a group by
    another number of its experts.
    """

    def __init__(self, moe: MoeSpec) -> None:
        super().__init__()
        self._moe = moe

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopk | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [t, E], a router's bias included -> scores and ids [t, k] of the chosen experts, with the
        gradient of `scores`.
        """
        ids = self._ids(scores)
        return scores.gather(1, ids), ids

    def _ids(self, scores: Tensor) -> Tensor:
        return decide(scores.detach(), self._moe)


class LayerReplay(Deciding):
    """The routing of one layer. -1 rows fall through to deciding.

    Activation recompute runs the router again in backward, with gradients on, and must get the same experts:
    what a forward without gradients chose waits in `_again`, in the order of the forwards, which is that of
    the backwards.
    """

    def __init__(self, layer: int, moe: MoeSpec, recomputes: bool) -> None:
        super().__init__(moe)
        self._layer, self._recomputes = layer, recomputes
        self._again: deque[Tensor] = deque()
        self.routes: ForwardRoutes | None = None
        self.trains = False

    def _ids(self, scores: Tensor) -> Tensor:
        assert self.routes is not None, "no forward was announced"
        if self._recomputes and self.trains and torch.is_grad_enabled():
            return self._again.popleft()
        ids = self._choose(scores)
        if self._recomputes and self.trains:
            self._again.append(ids)
        self.routes.dispatched[self._layer] = ids
        return ids

    def _choose(self, scores: Tensor) -> Tensor:
        assert self.routes is not None
        replayed = None if self.routes.replayed is None else self.routes.replayed[self._layer]
        gaps = replayed is not None and bool((replayed < 0).any())
        decided = super()._ids(scores) if replayed is None or gaps or self.routes.measure else None
        if decided is not None and self.routes.measure:
            self.routes.decided[self._layer] = decided
        if replayed is None or decided is None:
            return decided if replayed is None else replayed
        return torch.where(replayed[:, :1] < 0, decided, replayed)


class RouteBook:
    """The routers of one model chunk, in layer order."""

    def __init__(self, decoder: Any, moe: MoeSpec | None) -> None:
        places = [place for place, layer in enumerate(decoder.layers) if hasattr(layer.mlp, "router")]
        self.layers = [decoder.layers[place] for place in places]
        self._replays = []
        for index, (place, layer) in enumerate(zip(places, self.layers, strict=True)):
            assert moe is not None
            replay = LayerReplay(index, moe, _runs_again(decoder.config, place))
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


def _runs_again(config: TransformerConfig, place: int) -> bool:
    """Whether activation recompute runs the router of a chunk's layer again."""
    if config.recompute_granularity == "selective":
        return "moe" in config.recompute_modules
    first_layers = config.recompute_method == "block"
    return config.recompute_granularity == "full" and (
        not first_layers or place < config.recompute_num_layers
    )


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
