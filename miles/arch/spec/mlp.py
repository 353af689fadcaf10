"""What stands behind attention: a dense gated block, or experts behind a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]
Activation = Literal["silu", "gelu_tanh"]
"""Of the gate: SwiGLU, or GeGLU with tanh in place of the error function."""


@dataclass(frozen=True)
class DenseMlpSpec:
    """A gated block: down(activation(gate(x)) * up(x)), no biases (https://arxiv.org/abs/2002.05202)."""

    intermediate_size: int
    activation: Activation = "silu"
    sparsity: float = 0.0
    """Share of the gate's elements that are cut to 0, taking them as normally distributed; 0: none. The rest
    is lowered by the cut."""

    def num_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.intermediate_size

    def num_active_parameters(self, hidden_size: int) -> int:
        return self.num_parameters(hidden_size)


@dataclass(frozen=True)
class MoeSpec:
    """SwiGLU experts behind a router: each token visits `top_k` of `num_experts`, and the shared experts.

    `norm_topk_prob`: the chosen scores are divided by their sum before they weigh the experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    scoring: Scoring = "softmax"
    """From router logits to scores: over all experts, or for each expert alone."""
    correction_bias: bool = False
    """A bias per expert that takes part in the choice, not in the weights, and gets no gradient
    (https://arxiv.org/abs/2408.15664)."""
    scales_inputs: bool = False
    """The weights of the experts multiply what goes into them, not what comes out."""
    stacked: bool = False
    """Published as one tensor of all experts, [experts, inputs, outputs]."""
    num_groups: int = 1
    """Consecutive experts form so many groups; a token chooses among the `top_groups` whose two best experts
    score highest together (https://arxiv.org/abs/2412.19437, section 2.1.2)."""
    top_groups: int = 1
    routed_scaling: float = 1.0
    """What the weights of the experts are multiplied by, after they were normalised."""
    shared_size: int = 0
    """Width of the SwiGLU that every token visits beside its experts: all shared experts as one; 0: none."""

    def num_parameters(self, hidden_size: int) -> int:
        return self._with_experts(self.num_experts, hidden_size)

    def num_active_parameters(self, hidden_size: int) -> int:
        """Parameters one token passes through: the router, `top_k` experts and the shared ones."""
        return self._with_experts(self.top_k, hidden_size)

    def router_parameters(self, hidden_size: int) -> int:
        return self.num_experts * (hidden_size + self.correction_bias)

    def shared_parameters(self, hidden_size: int) -> int:
        return 3 * hidden_size * self.shared_size

    def _with_experts(self, experts: int, hidden_size: int) -> int:
        routed = experts * 3 * hidden_size * self.intermediate_size
        return self.router_parameters(hidden_size) + routed + self.shared_parameters(hidden_size)
