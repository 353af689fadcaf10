"""Gated blocks: one for every token (dense), or chosen experts per token (MoE)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from miles.arch.spec import DenseMlpSpec, MoeSpec
from miles.models.experts import routed_experts, scaled_inputs
from miles.models.geglu import geglu
from miles.models.projections import Projections
from miles.models.routing import Router


class DenseMlp(Projections):
    """gate_up [2I, D] holds gate then up; down [D, I]."""

    def __init__(self, spec: DenseMlpSpec, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up = nn.Parameter(torch.empty(2 * spec.intermediate_size, hidden_size, dtype=dtype))
        self.down = nn.Parameter(torch.empty(hidden_size, spec.intermediate_size, dtype=dtype))

    def forward(self, x: Tensor, router: Router) -> Tensor:
        """x [T, D] -> [T, D]; the router is for MoE layers."""
        gate_up = self.project("gate_up", x)
        if self.spec.activation == "silu":
            return self.project("down", self.numerics.swiglu(gate_up))
        return self.project("down", geglu(gate_up, self.spec.sparsity, self.numerics.gelu))


class MoeMlp(Projections):
    """router [E, D], correction_bias fp32 [E] where the model has one; stacked experts gate_up [E, 2I, D] and
    down [E, D, I], each transposed where they are published so; shared, a SwiGLU beside them, where the model
    has one.
    """

    def __init__(self, spec: MoeSpec, hidden_size: int, moe_layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.moe_layer = spec, moe_layer
        experts, width = spec.num_experts, spec.intermediate_size
        self.router = nn.Parameter(torch.empty(experts, hidden_size, dtype=dtype))
        self.correction_bias = (
            nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)
            if spec.correction_bias
            else None
        )
        gate_up, down = (2 * width, hidden_size), (hidden_size, width)
        if spec.stacked:
            gate_up, down = gate_up[::-1], down[::-1]
        self.gate_up = nn.Parameter(torch.empty(experts, *gate_up, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, *down, dtype=dtype))
        self.shared = (
            DenseMlp(DenseMlpSpec(spec.shared_size), hidden_size, dtype) if spec.shared_size else None
        )

    def matrix(self, name: str) -> Tensor:
        """The matrices of all experts [E, outputs, inputs], however they are published."""
        own, operands = self._parameters[name], self.operands.get(name)
        if own is not None and self.spec.stacked:
            own = own.transpose(1, 2)
        if operands is not None:
            return operands.weight(own)
        assert own is not None, f"{name} has no weights"
        return own

    def forward(self, x: Tensor, router: Router) -> Tensor:
        """x [T, D] -> [T, D]."""
        scores = self.numerics.router_scores(x, self.router, self.spec.scoring)
        ids, weights = router.select(
            self.moe_layer, scores, self.spec, self.correction_bias, self.numerics.gating
        )
        gate_up, down = self.matrix("gate_up"), self.matrix("down")
        kernels = self.numerics.expert_kernels(gate_up, down)
        if "down" in self.operands:
            kernels = replace(kernels, rounded=self.operands["down"].activations)
        rows = self.rounded("gate_up", x)
        run = scaled_inputs if self.spec.scales_inputs else routed_experts
        out = run(rows, ids, weights.to(x.dtype), gate_up, down, kernels)
        return out if self.shared is None else out + self.shared(x, router)
