"""Fused AdamW over a decoder's parameters, with fp32 master weights where the model itself is in bf16.

Gradients of micro-batches add up in fp32. Vectors (norms, biases) are not decayed. Parameters that require no
gradient (router biases) are never updated; their moments are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from miles.training.settings import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW on fp32 masters. A master *is* the model's parameter where that is fp32 already.

    `total_norm`: the 2-norm over tensors of the gradients' kind, which may be cut over ranks.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        total_norm: Callable[[Iterable[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
    ) -> None:
        self.parameters = parameters
        self._total_norm = total_norm
        self.clip_grad = settings.clip_grad
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()
        }
        trained = [m for name, m in self.masters.items() if parameters[name].requires_grad]
        matrices = [m for m in trained if m.ndim >= 2]
        vectors = [m for m in trained if m.ndim < 2]
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=True,
        )
        for master in self.masters.values():
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    def accumulate(self) -> None:
        """Add the model's low-precision gradients to the masters' and clear them. Once per micro-batch."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def fill_missing_gradients(self) -> None:
        """Give a zero gradient to every parameter that got none, so that its moments decay as they should."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated fp32 gradients under native names."""
        return {name: m.grad for name, m in self.masters.items() if m.grad is not None}

    def global_norm(self) -> Tensor:
        """The 2-norm over all gradients, a scalar tensor; not finite exactly when a gradient or the norm is
        not.
        """
        return self._total_norm(self.gradients().values())

    def apply(self, learning_rate: float, norm: float) -> None:
        """Clip to `clip_grad` given the global norm, update masters and model, clear the gradients."""
        if self.clip_grad > 0 and norm > self.clip_grad:
            trained = (master for group in self._adam.param_groups for master in group["params"])
            torch._foreach_mul_([m.grad for m in trained], self.clip_grad / (norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        with torch.no_grad():
            self._copy_masters()
        self.clear()

    def clear(self) -> None:
        """Drop all gradients."""
        for name, master in self.masters.items():
            master.grad = None
            self.parameters[name].grad = None

    def reset_masters(self) -> None:
        """Take the model's weights as the masters', after weights were loaded into the model."""
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    master.copy_(self.parameters[name])

    def moments(self, moment: str) -> dict[str, Tensor]:
        """One of `MOMENTS` for every parameter, under native names (live tensors)."""
        return {name: self._adam.state[m][moment] for name, m in self.masters.items()}

    @property
    def low_precision(self) -> bool:
        """Whether masters differ from the model's parameters."""
        return any(m is not self.parameters[name] for name, m in self.masters.items())

    @property
    def updates(self) -> int:
        """How many updates the moments have seen."""
        return int(max(self._adam.state[m]["step"].item() for m in self.masters.values()))

    def set_updates(self, updates: int) -> None:
        """Restore the count that bias correction reads."""
        for master in self.masters.values():
            self._adam.state[master]["step"].fill_(updates)

    def _copy_masters(self) -> None:
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)
