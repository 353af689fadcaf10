"""Fused AdamW over a decoder's parameters, with fp32 master weights where the model itself is in bf16.

Gradients of micro-batches add up in fp32. Vectors (norms, biases) are not decayed. Parameters that require no
gradient (router biases) are never updated; their moments are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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
        self._moments = {m: {n: torch.zeros_like(x) for n, x in self.masters.items()} for m in MOMENTS}
        self._updates = {n: torch.zeros((), device=x.device) for n, x in self.masters.items()}
        self._betas, self._eps = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        matrices = [name for name in trained if parameters[name].ndim >= 2]
        vectors = [name for name in trained if parameters[name].ndim < 2]
        self._decays = ((matrices, settings.weight_decay), (vectors, 0.0))

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
            trained = (self.masters[name] for names, _ in self._decays for name in names)
            torch._foreach_mul_([m.grad for m in trained], self.clip_grad / (norm + 1e-6))
        with torch.no_grad():
            for names, weight_decay in self._decays:
                self._update(names, learning_rate, weight_decay)
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
        return self._moments[moment]

    @property
    def low_precision(self) -> bool:
        """Whether masters differ from the model's parameters."""
        return any(m is not self.parameters[name] for name, m in self.masters.items())

    @property
    def updates(self) -> int:
        """How many updates the moments have seen."""
        return int(max(count.item() for count in self._updates.values()))

    def set_updates(self, updates: int) -> None:
        """Restore the count that bias correction reads."""
        for count in self._updates.values():
            count.fill_(updates)

    def _update(self, names: list[str], learning_rate: float, weight_decay: float) -> None:
        """Move masters, moments and counts.

        Not by the class `torch.optim.AdamW`: it imports torch's compiler, 1.7 s at the start of every run.
        """
        trained = [name for name in names if self.masters[name].grad is not None]
        adamw(
            [self.masters[name] for name in trained],
            [self.masters[name].grad for name in trained],
            *([self._moments[moment][name] for name in trained] for moment in MOMENTS),
            max_exp_avg_sqs=[],
            state_steps=[self._updates[name] for name in trained],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self._eps,
            maximize=False,
        )

    def _copy_masters(self) -> None:
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)
