"""Routes are decided, recorded and replayed; replay steers dispatch and leaves the router its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miles.arch.spec import MoeSpec
from miles.models.decoder import Decoder
from miles.models.routing import Router, expert_load

LENGTHS = (6, 13, 1, 8)


@pytest.fixture
def decoder(make_decoder: Callable) -> Decoder:
    return make_decoder()


@pytest.fixture
def other_routes(make_decoder: Callable, make_batch: Callable) -> Tensor:
    """Routes that `decoder` would not choose: those of a model with other weights."""
    router = Router.record()
    make_batch(*LENGTHS).run(make_decoder(seed=9), router)
    return router.recorded()


def test_recorded_routes_have_one_column_per_moe_layer(decoder: Decoder, make_batch: Callable) -> None:
    router = Router.record()
    make_batch(*LENGTHS).run(decoder, router)
    routes = router.recorded()
    assert routes.dtype == torch.int16
    assert routes.shape == (sum(LENGTHS), len(decoder.spec.moe_layers), decoder.spec.top_k) == (28, 3, 2)
    assert routes.min() >= 0 and routes.max() < decoder.spec.num_experts
    assert (routes[..., 0] != routes[..., 1]).all()


def test_replay_dispatches_exactly_the_given_experts(
    decoder: Decoder, make_batch: Callable, other_routes: Tensor
) -> None:
    batch = make_batch(*LENGTHS)
    decided, replayed = Router.record(), Router.replay(other_routes)
    free, steered = batch.run(decoder, decided), batch.run(decoder, replayed)
    assert torch.equal(replayed.recorded(), other_routes)
    assert not torch.equal(decided.recorded(), other_routes)
    assert (free - steered).abs().max() > 1e-2


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "layers"])
def test_routes_shifted_by_one_row_or_layer_change_dispatch_and_output(
    dim: int, decoder: Decoder, make_batch: Callable
) -> None:
    batch, recorded = make_batch(*LENGTHS), Router.record()
    expected = batch.run(decoder, recorded)
    shifted = Router.replay(recorded.recorded().roll(1, dim))
    output = batch.run(decoder, shifted)
    assert not torch.equal(shifted.recorded(), recorded.recorded())
    assert (output - expected).abs().max() > 1e-2


def test_replaying_ones_own_routes_changes_nothing(decoder: Decoder, make_batch: Callable) -> None:
    batch, recorded = make_batch(*LENGTHS), Router.record()
    expected = batch.run(decoder, recorded)
    assert torch.equal(batch.run(decoder, Router.replay(recorded.recorded())), expected)


def test_rows_of_minus_one_decide(decoder: Decoder, make_batch: Callable, other_routes: Tensor) -> None:
    batch = make_batch(*LENGTHS)
    routes = other_routes.clone()
    routes[6:19] = -1
    mixed, alone = Router.replay(routes), Router.record()
    batch.run(decoder, mixed)
    batch.run(decoder, alone)
    assert torch.equal(mixed.recorded()[6:19], alone.recorded()[6:19])
    assert torch.equal(mixed.recorded()[:6], other_routes[:6])
    assert torch.equal(mixed.recorded()[19:], other_routes[19:])


def test_replay_keeps_the_routers_gradient(
    decoder: Decoder, make_batch: Callable, other_routes: Tensor
) -> None:
    batch = make_batch(*LENGTHS)
    weighting = torch.randn(28, 24, generator=torch.Generator().manual_seed(3))

    def loss() -> Tensor:
        return (batch.run(decoder, Router.replay(other_routes)) * weighting).sum()

    loss().backward()
    router = decoder.layers[3].mlp.router
    direction = router.grad / router.grad.norm()
    step = 1e-2
    with torch.no_grad():
        router.add_(direction, alpha=step)
        up = loss()
        router.sub_(direction, alpha=2 * step)
        down = loss()
    assert router.grad.norm() > 0.1
    torch.testing.assert_close((up - down) / (2 * step), router.grad.norm(), rtol=2e-2, atol=0)


def test_recompute_in_backward_uses_the_same_experts_and_gives_the_same_gradients(
    decoder: Decoder, make_batch: Callable, other_routes: Tensor
) -> None:
    batch = make_batch(*LENGTHS)

    def gradients(recompute: int, router: Router) -> tuple[list[Tensor], Tensor]:
        decoder.zero_grad()
        decoder.recompute_num_layers = recompute
        loss = batch.run(decoder, router).square().sum() + router.load_balancing_loss()
        loss.backward()
        return [parameter.grad for parameter in decoder.parameters()], router.recorded()

    plain, plain_ids = gradients(0, Router.replay(other_routes, measure_agreement=True, load_balancing=True))
    router = Router.replay(other_routes, measure_agreement=True, load_balancing=True)
    recomputed, ids = gradients(decoder.spec.num_layers, router)
    assert torch.equal(plain_ids, ids)
    assert router.agreement().rows == 28 and len(router.agreement().flips_per_layer) == 3
    for first, second in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_recompute_of_a_deciding_router_asks_it_once_per_layer() -> None:
    router = Router.decide()
    spec = MoeSpec(2, top_k=1, intermediate_size=1, norm_topk_prob=False)
    first, _ = router.select(0, torch.tensor([[0.6, 0.4]]), spec)
    again, weights = router.select(0, torch.tensor([[0.4, 0.6]]), spec)
    assert first.tolist() == again.tolist() == [[0]]
    assert float(weights) == pytest.approx(0.4)


def test_agreement_counts_rows_whose_expert_set_differs(
    decoder: Decoder, make_batch: Callable, other_routes: Tensor
) -> None:
    batch = make_batch(*LENGTHS)
    routes = other_routes.clone()
    routes[:6] = -1
    router = Router.replay(routes, measure_agreement=True)
    batch.run(decoder, router)
    agreement = router.agreement()
    # What each layer would have decided under the replayed earlier layers.
    free = Router.record()
    first_layer = [set(row.tolist()) for row in (batch.run(decoder, free), free.recorded())[1][:, 0]]
    flips = [row >= 6 and first_layer[row] != set(routes[row, 0].tolist()) for row in range(28)]
    assert agreement.rows == 22
    assert agreement.flips_per_layer[0] == sum(flips) > 0
    assert agreement.any_flip == int(router.flipped_rows().sum()) >= max(agreement.flips_per_layer)
    assert 0 < agreement.zero_overlap_fraction < max(agreement.flip_rates) <= agreement.any_flip_fraction <= 1
    assert (agreement + agreement).flip_rates == agreement.flip_rates


def test_order_within_a_route_is_no_flip(decoder: Decoder, make_batch: Callable) -> None:
    batch, recorded = make_batch(*LENGTHS), Router.record()
    batch.run(decoder, recorded)
    router = Router.decide(compared_with=recorded.recorded().flip(-1))
    batch.run(decoder, router)
    assert router.agreement().flips_per_layer == (0, 0, 0)
    assert router.agreement().zero_overlap == 0


def test_expert_load_counts_dispatched_tokens() -> None:
    dispatched = {1: torch.tensor([[0, 3], [3, 1]]), 0: torch.tensor([[2, 2], [2, 0]])}
    assert expert_load(dispatched, 4).tolist() == [[1, 0, 3, 0], [1, 1, 0, 2]]


def test_load_balancing_loss_is_top_k_when_balanced_and_grows_with_imbalance() -> None:
    spec = MoeSpec(4, top_k=2, intermediate_size=1, norm_topk_prob=True)
    balanced = Router.decide(load_balancing=True)
    eye = torch.eye(4) + torch.eye(4).roll(1, 0)
    balanced.select(0, (eye + 1e-3) / (eye + 1e-3).sum(-1, keepdim=True), spec)
    assert float(balanced.load_balancing_loss()) == pytest.approx(2.0)
    skewed = Router.decide(load_balancing=True)
    probs = torch.tensor([[0.5, 0.4, 0.06, 0.04]]).repeat(8, 1).requires_grad_()
    skewed.select(0, probs, spec)
    loss = skewed.load_balancing_loss()
    assert loss.item() == pytest.approx(4 * (0.5 + 0.4))
    loss.backward()
    assert probs.grad[0, 0] > probs.grad[0, 2] == 0
