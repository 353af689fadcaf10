"""Which experts a token visits: decided, recorded, or replayed (rollout routing replay, R3).

Replay dispatches to recorded experts and weighs them with the *current* router's probabilities, so the router
keeps its gradient (https://arxiv.org/abs/2510.11370). Shapes: T tokens, E experts, k experts per
token, Lm MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.arch.spec import MoeSpec
from miles.models.routing_stats import RoutingAgreement, compare_routes


class Router:
    """The routing of one forward pass; the decoder calls `select` once per MoE layer.

    A second call for the same layer is activation recompute in backward and returns the same experts.
    `dispatched[i]` are the expert ids [T, k] that MoE layer i really used.
    """

    def __init__(
        self,
        replayed: Tensor | None = None,
        compared_with: Tensor | None = None,
        keep_ids: bool = True,
        load_balancing: bool = False,
    ) -> None:
        self._replayed = None if replayed is None else replayed.long()
        self._compared_with = None if compared_with is None else compared_with.long()
        self._has_gaps = self._replayed is not None and bool((self._replayed < 0).any())
        self._keep_ids = keep_ids
        self._load_balancing = load_balancing
        self._balance_terms: dict[int, Tensor] = {}
        self.dispatched: dict[int, Tensor] = {}
        self._flipped: list[Tensor] = []
        self._disjoint: list[Tensor] = []

    @classmethod
    def decide(cls, compared_with: Tensor | None = None, load_balancing: bool = False) -> Router:
        """Tokens go to the experts that score highest. `compared_with`: routes [T, Lm, k] to measure by."""
        return cls(
            compared_with=compared_with, keep_ids=torch.is_grad_enabled(), load_balancing=load_balancing
        )

    @classmethod
    def record(cls) -> Router:
        """Decide, and keep the ids for `recorded()`."""
        return cls()

    @classmethod
    def replay(cls, routes: Tensor, measure_agreement: bool = False, load_balancing: bool = False) -> Router:
        """Use `routes` (int16 [T, Lm, k]); a row of -1 was not recorded and is decided.

        `measure_agreement` also decides every row and counts where that differs, see `agreement()`.
        """
        compared = routes if measure_agreement else None
        return cls(replayed=routes, compared_with=compared, load_balancing=load_balancing)

    def select(
        self,
        moe_layer: int,
        scores: Tensor,
        spec: MoeSpec,
        bias: Tensor | None = None,
        gating: Gating | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Experts and their weights for all tokens of one layer.

        Args:
            moe_layer: position among the MoE layers, 0 .. Lm - 1.
            scores: of the router, fp32 [T, E].
            bias: fp32 [E], added to the scores for the choice alone.
            gating: what is computed; by default `GATING`.

        Returns:
            ids int64 [T, k] and weights fp32 [T, k], with the gradient of `scores`.
        """
        gating = gating or GATING
        ids = self.dispatched.get(moe_layer)
        if ids is None:
            ids = self._choose(moe_layer, scores.detach(), spec, bias, gating)
            if self._keep_ids:
                self.dispatched[moe_layer] = ids
        if self._load_balancing:
            # Computed in recompute as well, which must repeat every operation of the first pass.
            self._balance_terms.setdefault(moe_layer, _balance(scores, ids, spec))
        return ids, gating.weigh(scores, ids, spec)

    def recorded(self) -> Tensor:
        """The routes really used, int16 [T, Lm, k]."""
        assert self._keep_ids, "this router keeps no ids: use Router.record()"
        return torch.stack([self.dispatched[i] for i in sorted(self.dispatched)], 1).to(torch.int16)

    @property
    def measures(self) -> bool:
        """Whether this pass was compared with recorded routes."""
        return self._compared_with is not None

    def agreement(self, copies: Tensor | None = None) -> RoutingAgreement:
        """How often deciding, and what was really done, differ from the routes compared with, summed over
        this pass.

        `copies` (int64 [T]): how many rows each token stands for; by default one.
        """
        assert self._compared_with is not None, "nothing to compare with"

        def count(rows: Tensor) -> int:
            return int((rows if copies is None else rows * copies).sum())

        return RoutingAgreement(
            dispatched_flips=sum(count(self._misdispatched(layer)) for layer in range(len(self._flipped))),
            rows=count(self._compared_with[:, 0, 0] >= 0),
            flips_per_layer=tuple(count(flipped) for flipped in self._flipped),
            any_flip=count(self.flipped_rows()),
            zero_overlap=sum(count(disjoint) for disjoint in self._disjoint),
        )

    def flipped_rows(self) -> Tensor:
        """bool [T]: rows that would be routed otherwise in at least one layer."""
        return torch.stack(self._flipped).any(0)

    def _misdispatched(self, layer: int) -> Tensor:
        """bool [T]: rows that went to other experts than the routes compared with say."""
        assert self._compared_with is not None
        return compare_routes(self.dispatched[layer], self._compared_with[:, layer])[0]

    def load_balancing_loss(self) -> Tensor:
        """Mean over the layers of E · Σ_e f_e · P_e, a scalar with the gradient of the router; at least k.

        f_e: tokens sent to expert e per token, P_e: its mean probability. Equation 4 of
        https://arxiv.org/abs/2101.03961, with k experts per token as transformers counts them.
        """
        assert self._load_balancing, "ask for it with load_balancing=True"
        return torch.stack(list(self._balance_terms.values())).mean()

    def _choose(
        self, moe_layer: int, scores: Tensor, spec: MoeSpec, bias: Tensor | None, gating: Gating
    ) -> Tensor:
        replayed = None if self._replayed is None else self._replayed[:, moe_layer]
        if replayed is not None and not self._has_gaps and self._compared_with is None:
            return replayed
        decided = gating.decide(scores, spec, bias)
        if self._compared_with is not None:
            flipped, disjoint = compare_routes(decided, self._compared_with[:, moe_layer])
            self._flipped.append(flipped)
            self._disjoint.append(disjoint)
        if replayed is None:
            return decided
        return torch.where(replayed[:, :1] < 0, decided, replayed)


def decide(scores: Tensor, spec: MoeSpec, bias: Tensor | None = None) -> Tensor:
    """The experts int64 [T, k] that scores [T, E] choose, best first; see `MoeSpec` for bias and groups."""
    if bias is not None:
        scores = scores + bias
    if spec.num_groups > 1:
        grouped = scores.unflatten(1, (spec.num_groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.topk(group_scores, spec.top_groups, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    return torch.topk(scores, spec.top_k, dim=-1).indices


def expert_weights(scores: Tensor, ids: Tensor, spec: MoeSpec) -> Tensor:
    """What the experts `ids` [T, k] are weighed with, [T, k], given scores [T, E]."""
    weights = scores.gather(1, ids)
    if spec.norm_topk_prob:
        total = weights.sum(-1, keepdim=True)
        # Sigmoids may all vanish; the published models keep their sum off 0 like this.
        weights = weights / (total if spec.scoring == "softmax" else total + 1e-20)
    return weights if spec.routed_scaling == 1.0 else weights * spec.routed_scaling


@dataclass(frozen=True)
class Gating:
    """How experts are chosen and weighed: `decide`, `expert_weights`, or another computation of the same."""

    decide: Callable[[Tensor, MoeSpec, Tensor | None], Tensor]
    weigh: Callable[[Tensor, Tensor, MoeSpec], Tensor]


GATING = Gating(decide, expert_weights)


def expert_load(dispatched: Mapping[int, Tensor], num_experts: int, copies: Tensor | None = None) -> Tensor:
    """Tokens that each expert received, int64 [Lm, E], from `Router.dispatched`.

    `copies`: see `Router.agreement`.
    """
    layers = [dispatched[i] for i in sorted(dispatched)]
    if copies is None:
        return torch.stack([torch.bincount(ids.flatten(), minlength=num_experts) for ids in layers])
    weights = copies.double().repeat_interleave(layers[0].shape[1])
    loads = [torch.bincount(ids.flatten(), weights, minlength=num_experts) for ids in layers]
    return torch.stack(loads).long()


def _balance(scores: Tensor, ids: Tensor, spec: MoeSpec) -> Tensor:
    num_tokens, num_experts = scores.shape
    probs = scores if spec.scoring == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
    share = torch.bincount(ids.flatten(), minlength=num_experts) / num_tokens
    return num_experts * (share * probs.mean(0)).sum()
