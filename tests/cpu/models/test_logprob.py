"""Token log-probabilities: values, gradients, and independence from chunking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles.models.logprob import scaled_log_softmax, token_log_probs

T, D, V = 23, 7, 31


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).requires_grad_()
    head = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, head, torch.randint(V, (T,), generator=generator)


@pytest.mark.parametrize("chunk", [None, 1, 5, 23, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_formula(
    inputs: tuple[Tensor, Tensor, Tensor], chunk: int | None, temperature: float
) -> None:
    hidden, head, targets = inputs
    log_p = torch.log_softmax(hidden @ head.t() / temperature, -1)
    expected = log_p[torch.arange(T), targets]
    expected_entropy = -(log_p.exp() * log_p).sum(-1)
    log_probs, entropy = token_log_probs(hidden, head, targets, temperature, chunk, with_entropy=True)
    assert entropy is not None
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)

    weighting, entropy_weighting = torch.randn(2, T, generator=torch.Generator().manual_seed(1))
    for with_entropy in (0.0, 1.0):
        objective = (log_probs * weighting + with_entropy * entropy * entropy_weighting).sum()
        reference = (expected * weighting + with_entropy * expected_entropy * entropy_weighting).sum()
        got = torch.autograd.grad(objective, (hidden, head), retain_graph=True)
        wanted = torch.autograd.grad(reference, (hidden, head), retain_graph=True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_chunks_do_not_change_a_bit_of_the_result(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, targets = inputs
    whole, _ = token_log_probs(hidden, head, targets)
    chunked, _ = token_log_probs(hidden, head, targets, chunk_tokens=8)
    assert torch.equal(whole, chunked)


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operation makes, in forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in out] if isinstance(out, tuple | list) else [out.numel()]
        self.numel = max(self.numel, *made)
        return out


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_of_all_tokens_by_vocabulary_ever_exists(with_entropy: bool) -> None:
    tokens, width, vocabulary, chunk = 64, 8, 500, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)
    with LargestTensor() as largest:
        log_probs, entropy = token_log_probs(hidden, head, targets, 0.7, chunk, with_entropy)
        (log_probs.sum() if entropy is None else (log_probs + entropy).sum()).backward()
    assert largest.numel == chunk * vocabulary


def test_no_tensor_of_all_tokens_by_vocabulary_is_kept_for_backward() -> None:
    hidden = torch.randn(64, 8, requires_grad=True)
    head = torch.randn(50, 8, requires_grad=True)
    log_probs, _ = token_log_probs(hidden, head, torch.zeros(64, dtype=torch.long), chunk_tokens=16)
    saved = [tensor for tensor in log_probs.grad_fn.saved_tensors if tensor is not None]
    assert max(tensor.numel() for tensor in saved) < 64 * 50


def test_entropy_is_absent_unless_asked_for(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    assert token_log_probs(*inputs)[1] is None


def test_the_engine_and_the_trainer_see_one_number(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, targets = inputs
    per_row = torch.full((T, 1), 0.7)
    engine = scaled_log_softmax(hidden @ head.t(), per_row).gather(1, targets[:, None])[:, 0]
    trainer, _ = token_log_probs(hidden, head, targets, temperature=0.7)
    assert torch.equal(engine, trainer)
