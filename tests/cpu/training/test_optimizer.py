"""AdamW as published, clipping by the global norm, decay of matrices only, fp32 masters for bf16 models."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from miles.training.native.optimizer import MasterAdamW
from miles.training.settings import OptimizerSettings


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)),
        "norm": nn.Parameter(torch.ones(4, dtype=dtype)),
    }


def take_step(optimizer: MasterAdamW, gradients: dict[str, torch.Tensor], lr: float) -> float:
    for name, gradient in gradients.items():
        optimizer.parameters[name].grad = gradient.clone().to(optimizer.parameters[name].dtype)
    optimizer.accumulate()
    norm = optimizer.global_norm().item()
    optimizer.apply(lr, norm)
    return norm


def test_two_updates_follow_the_definition() -> None:
    settings = OptimizerSettings(
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6, clip_grad=0.5
    )
    params = parameters()
    expected = {name: p.detach().clone() for name, p in params.items()}
    optimizer = MasterAdamW(params, settings)
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for t, lr in ((1, 0.1), (2, 0.03)):
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in expected.items()}
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values())).item()
        assert take_step(optimizer, gradients, lr) == pytest.approx(norm, rel=1e-6)
        for name, p in expected.items():
            g = gradients[name] * 0.5 / (norm + 1e-6)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            p *= 1 - lr * (0.1 if name == "matrix" else 0.0)
            p -= lr * (m[name] / (1 - 0.8**t)) / (torch.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
            torch.testing.assert_close(params[name].detach(), p, atol=1e-6, rtol=1e-5)


def test_a_norm_below_the_bound_is_left_alone() -> None:
    optimizer = MasterAdamW(parameters(), OptimizerSettings(clip_grad=100.0, adam_beta1=0.75))
    optimizer.parameters["norm"].grad = torch.full((4,), 2.0)
    optimizer.apply(0.1, optimizer.global_norm().item())
    assert optimizer.moments("exp_avg")["norm"].tolist() == [0.25 * 2.0] * 4
    assert not optimizer.moments("exp_avg")["matrix"].any(), "without a gradient nothing moves"


def test_an_update_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes longer than the rest of a small run's start."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    gradients = {"norm": torch.ones(4), "matrix": torch.ones(3, 4)}
    take_step(MasterAdamW(parameters(), OptimizerSettings()), gradients, lr=0.1)


def test_bf16_models_do_not_lose_small_updates() -> None:
    optimizer = MasterAdamW(parameters(torch.bfloat16), OptimizerSettings(clip_grad=0.0))
    assert optimizer.low_precision
    before = optimizer.parameters["norm"].detach().clone()
    for _ in range(50):
        take_step(optimizer, {"norm": torch.ones(4), "matrix": torch.ones(3, 4)}, lr=1e-4)
    assert optimizer.parameters["norm"].dtype == torch.bfloat16
    torch.testing.assert_close(
        optimizer.masters["norm"].detach(), torch.full((4,), 1 - 5e-3), atol=1e-5, rtol=0
    )
    assert (optimizer.parameters["norm"] < before).all()


def test_bf16_gradients_of_micro_batches_add_up_in_fp32() -> None:
    optimizer = MasterAdamW(parameters(torch.bfloat16), OptimizerSettings())
    for value in (256.0, 1.0, 1.0):
        optimizer.parameters["norm"].grad = torch.full((4,), value, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert optimizer.gradients()["norm"].tolist() == [258.0] * 4
