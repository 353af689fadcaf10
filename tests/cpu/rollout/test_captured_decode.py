"""Decode steps on fixed buffers, as a CUDA graph captures them: the numbers of an eager step.

Here a step stands for its own graph; `tests/gpu/test_captured_decode.py` captures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.invariance import find_exact_numerics
from miles.models.numerics import FAST
from miles.rollout.native import captured
from miles.rollout.native.captured import CapturedDecode, key_ladder, row_ladder
from miles.rollout.native.runner import Runner
from tests.cpu.rollout.conftest import Policy, generate_all, make_decoder, make_spec, prompt_groups

SLOTS, CONTEXT, SPARE = 9, 48, 8
Step = Callable[[], None]


class Pools:
    """Where graphs would lie. A step runs when it is captured, as a warm-up does, and when asked."""

    def __init__(self) -> None:
        self.pools = self.captures = 0

    def __call__(self) -> Callable[[Step], Step]:
        self.pools += 1
        return self._capture

    def _capture(self, step: Step) -> Step:
        self.captures += 1
        step()
        return step


def make_runner(decoder: Decoder, pools: Pools | None = None, most: int = 8) -> Runner:
    runner = Runner(decoder.spec, SLOTS, CONTEXT, torch.float32, torch.device("cpu"), FAST)
    if pools is not None:
        runner.captured = CapturedDecode(decoder.spec, runner.cache, most, pools)
    runner.decoder = decoder
    return runner


def read_prompts(runner: Runner, count: int) -> torch.Tensor:
    """Prompts of several lengths in slots 0.. and the spare one; the lengths of the former."""
    prompts = [[(7 * i + j) % 37 for j in range(3 + 5 * i % 19)] for i in range(count)]
    runner.prefill([*prompts, list(range(20))], [*range(count), SPARE])
    return torch.tensor([len(prompt) for prompt in prompts])


def with_attention(**changes: object) -> ArchSpec:
    spec = make_spec()
    layers = [replace(layer, attention=replace(layer.attention, **changes)) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


SPECS = {
    "experts": make_spec(),
    "dense": make_spec(moe=False),
    "window": with_attention(window=4),
    "chunks": with_attention(chunk=8),
    "soft caps": with_attention(softcap=3.0),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("count", [1, 5, 8])
@torch.inference_mode()
def test_a_padded_step_gives_what_an_eager_one_does(name: str, count: int, monkeypatch) -> None:
    monkeypatch.setattr(captured, "FEWEST_KEYS", 8)
    decoder = make_decoder(SPECS[name])
    eager, static = make_runner(decoder), make_runner(decoder, Pools())
    lengths = read_prompts(eager, count)
    read_prompts(static, count)
    tokens = torch.arange(count) + 2
    for step in range(3):
        expected_logits, expected_routes = eager.decode(tokens, lengths + step)
        logits, routes = static.decode(tokens, lengths + step)
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
        if expected_routes is None:
            assert routes is None
        else:
            assert torch.equal(routes, expected_routes) and routes.dtype == expected_routes.dtype
        tokens = expected_logits.argmax(-1)
    for ours, theirs in ((static.cache.keys, eager.cache.keys), (static.cache.values, eager.cache.values)):
        torch.testing.assert_close(ours[:, :count], theirs[:, :count], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[:, SPARE], theirs[:, SPARE]), "the shared prompt's slot is nobody's padding"


@torch.inference_mode()
def test_a_step_with_more_rows_than_any_graph_is_eager() -> None:
    pools = Pools()
    runner = make_runner(make_decoder(make_spec()), pools, most=4)
    lengths = read_prompts(runner, 6)
    runner.decode(torch.arange(6), lengths)
    assert pools.captures == 0
    runner.decode(torch.arange(4), lengths[:4])
    assert pools.captures == 1
    whole = CapturedDecode(make_spec(), runner.cache, 64, pools)
    assert whole.row_ladder[-1] == SPARE, "padding reaches no further than the slots that decode"


@torch.inference_mode()
def test_graphs_are_captured_once_for_rows_and_width_and_the_oldest_go(monkeypatch) -> None:
    monkeypatch.setattr(captured, "FEWEST_KEYS", 16)
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    pools = Pools()
    runner = make_runner(make_decoder(make_spec()), pools)

    def step(count: int, position: int) -> int:
        runner.decode(torch.zeros(count, dtype=torch.int64), torch.full((count,), position))
        return pools.captures

    read_prompts(runner, 8)
    assert [step(5, 3), step(6, 15), step(5, 16), step(6, 31)] == [1, 1, 2, 2]
    assert [step(1, 3), step(5, 31), step(5, 3)] == [3, 3, 4], "the third took the place of the first"


@torch.inference_mode()
def test_weights_that_change_in_place_keep_the_graphs_and_those_that_move_do_not() -> None:
    pools, decoder = Pools(), make_decoder(make_spec())
    runner = make_runner(decoder, pools)
    lengths = read_prompts(runner, 3)

    def logits() -> torch.Tensor:
        return runner.decode(torch.arange(3), lengths)[0].clone()

    first = logits()
    decoder.embed.data.mul_(2)
    decoder.head_weight.data.mul_(3)
    runner.decoder = decoder
    assert not torch.allclose(first, logits()) and (pools.pools, pools.captures) == (1, 1)
    decoder.head_weight.data = decoder.head_weight.data.clone()
    runner.decoder = decoder
    logits()
    assert (pools.pools, pools.captures) == (2, 2), "graphs would read the old head"
    runner.decoder = make_decoder(make_spec(), seed=1)
    logits()
    assert (pools.pools, pools.captures) == (3, 3)


def test_what_no_graph_can_hold_is_named() -> None:
    spec = make_spec()
    exact = find_exact_numerics(spec, torch.float32, "cpu")
    decoder = make_decoder(spec)
    decoder.use_numerics(exact)
    runner = make_runner(decoder, pools := Pools())
    assert runner.captured is not None and "exact numerics" in (runner.captured.obstacle or "")
    with torch.inference_mode():
        lengths = read_prompts(runner, 2)
        runner.decode(torch.arange(2), lengths)
    assert pools.captures == 0
    stored = make_decoder(spec)
    stored.layers[1].mlp.operands["down"] = object()
    runner.decoder = stored
    assert "number format" in (runner.captured.obstacle or "")


def test_ladders_end_with_the_bound_and_waste_a_third_at_most() -> None:
    assert row_ladder(1) == (1,) and row_ladder(20) == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    ladder = row_ladder(256)
    assert ladder[-1] == 256
    for count in range(4, 257):
        rows = next(size for size in ladder if size >= count)
        assert (rows - count) / rows < 1 / 3
    assert key_ladder(100) == (100,) and key_ladder(1000) == (256, 512, 1000)


def test_an_engine_answers_alike_while_requests_come_and_go(policy: Policy) -> None:
    """Slots are closed up when a request leaves: what padding wrote there is never read."""
    calls = prompt_groups(5, 3, max_new_tokens=14, stop_token_ids=(3, 8, 21))
    expected = generate_all(policy.engine(max_running_requests=7), calls)
    engine, pools = policy.engine(max_running_requests=7), Pools()
    runner = engine._runner
    assert isinstance(runner, Runner)
    runner.captured = CapturedDecode(policy.spec, runner.cache, 7, pools)
    runner.decoder = policy.decoder
    for theirs, ours in zip(expected, generate_all(engine, calls), strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert a.output_ids == b.output_ids
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5, rtol=0)
            np.testing.assert_array_equal(a.routed_experts, b.routed_experts)
    assert pools.captures > 3
