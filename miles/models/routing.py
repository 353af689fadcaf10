"""Which experts a token visits: decided, recorded, or replayed (rollout routing replay, R3).

Replay dispatches to recorded experts and weighs them with the *current* router's probabilities, so the router
keeps its gradient (https://arxiv.org/abs/2510.11370). Shapes: T tokens, E experts, k experts per
token, Lm MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        """Tokens go to their most probable experts. `compared_with`: routes [T, Lm, k] to measure against."""
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

    def select(self, moe_layer: int, probs: Tensor, spec: MoeSpec) -> tuple[Tensor, Tensor]:
        """Experts and their weights for all tokens of one layer.

        Args:
            moe_layer: position among the MoE layers, 0 .. Lm - 1.
            probs: router probabilities, fp32 [T, E].

        Returns:
            ids int64 [T, k] and weights fp32 [T, k], with the gradient of `probs`.
        """
        ids = self.dispatched.get(moe_layer)
        if ids is None:
            ids = self._choose(moe_layer, probs.detach(), spec.top_k)
            if self._keep_ids:
                self.dispatched[moe_layer] = ids
        if self._load_balancing:
            # Computed in recompute as well, which must repeat every operation of the first pass.
            self._balance_terms.setdefault(moe_layer, _balance(probs, ids))
        weights = probs.gather(1, ids)
        if spec.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights

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

    def _choose(self, moe_layer: int, probs: Tensor, top_k: int) -> Tensor:
        replayed = None if self._replayed is None else self._replayed[:, moe_layer]
        if replayed is not None and not self._has_gaps and self._compared_with is None:
            return replayed
        decided = torch.topk(probs, top_k, dim=-1).indices
        if self._compared_with is not None:
            flipped, disjoint = compare_routes(decided, self._compared_with[:, moe_layer])
            self._flipped.append(flipped)
            self._disjoint.append(disjoint)
        if replayed is None:
            return decided
        return torch.where(replayed[:, :1] < 0, decided, replayed)


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


def _balance(probs: Tensor, ids: Tensor) -> Tensor:
    num_tokens, num_experts = probs.shape
    share = torch.bincount(ids.flatten(), minlength=num_experts) / num_tokens
    return num_experts * (share * probs.mean(0)).sum()
