"""The decode kernel against the torch path: the same tokens, routes and log-probs up to rounding."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec, RopeSpec
from miles.errors import RunError
from miles.models.compiled import build as compiling
from miles.models.compiled.build import BuildFailed
from miles.planning.decode_kernel import FAMILIES
from miles.planning.facts.compiler import read_compiler
from miles.rollout.engine import GenerateOutput, GenerateRequest
from miles.rollout.native.fused import build, kernel, runner
from miles.rollout.native.slots import Slots
from tests.cpu.rollout.conftest import Policy, make_decoder, make_spec, now, prompt_groups, request, run

COMPILER = read_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
TOLERANCE = 1e-5
"""Absolute and relative: these random models have log-probs of large logits."""


@pytest.fixture(scope="session")
def library() -> Path:
    assert COMPILER is not None
    return build.library(COMPILER.path)


def shaped(spec: ArchSpec, heads: int, key_heads: int, head_dim: int, **more: Any) -> ArchSpec:
    """The spec with another attention in every layer."""
    plain: dict[str, Any] = {"qkv_bias": False, "output_bias": False}
    attention = AttentionSpec(heads, key_heads, head_dim, RopeSpec(1e4), **(plain | more))
    return replace(spec, layers=tuple(LayerSpec(attention, x.mlp) for x in spec.layers))


def both(policy: Policy, library: Path, requests: list[GenerateRequest], **settings: Any) -> Iterator[Any]:
    """What torch and the kernel answer, request by request."""
    torch_side = run(policy.engine(**settings).generate(requests))
    kernel_side = run(policy.engine(decode_library=library, **settings).generate(requests))
    return zip(torch_side, kernel_side, strict=True)


def assert_same(one: GenerateOutput, other: GenerateOutput) -> None:
    assert one.output_ids == other.output_ids
    assert one.finish_reason == other.finish_reason
    assert one.cached_tokens == other.cached_tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=TOLERANCE, atol=TOLERANCE)
    if one.routed_experts is None:
        assert other.routed_experts is None
    else:
        np.testing.assert_array_equal(one.routed_experts, other.routed_experts)


MIXED_SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.5, "min_new_tokens": 3},
    {"temperature": 1.7, "min_new_tokens": 8, "stop_token_ids": (2, 5, 7, 11)},
]


def mixed_requests() -> list[GenerateRequest]:
    """Groups that share prompts, more than fit at once, each member sampled in another way."""
    groups = prompt_groups(6, 4, max_new_tokens=20, stop_token_ids=(2,))
    return [
        request(r.input_ids, key=r.sample_key, group=r.group, **{"max_new_tokens": 20, **MIXED_SAMPLING[i]})
        for group in groups
        for i, r in enumerate(group)
    ]


SHAPES = {
    "odd": make_spec(),
    "dense": make_spec(moe=False),
    "tied": replace(make_spec(), tie_word_embeddings=True),
    "biases": shaped(make_spec(), 4, 2, 8, qkv_bias=True, output_bias=True),
    "no head norms": shaped(make_spec(), 4, 2, 16, qkv_bias=True, qk_norm=False),
    "one key head": shaped(make_spec(), 7, 1, 16),
    "one query per key": shaped(make_spec(), 3, 3, 32),
    "wide heads": shaped(make_spec(), 2, 1, 64),
    "narrow heads": shaped(make_spec(), 4, 2, 6),
    "unnormalised gates": replace(
        make_spec(),
        layers=tuple(
            replace(x, mlp=replace(x.mlp, norm_topk_prob=False)) if hasattr(x.mlp, "top_k") else x
            for x in make_spec().layers
        ),
    ),
}


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_draws_what_torch_draws(shape: str, library: Path) -> None:
    spec = SHAPES[shape]
    decoder = make_decoder(spec)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "norm")):
            parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()))
    for one, other in both(Policy(spec, decoder), library, mixed_requests(), max_running_requests=7):
        assert_same(one, other)


@needs_compiler
def test_log_probs_and_routes_are_those_of_a_plain_forward(policy: Policy, library: Path) -> None:
    requests = [r for group in prompt_groups(5, 3, max_new_tokens=12) for r in group]
    outputs = run(policy.engine(decode_library=library).generate(requests))
    sequences = [[*r.input_ids, *out.output_ids] for r, out in zip(requests, outputs, strict=True)]
    log_probs, routes = policy.packed(sequences)
    for sequence, out, plain, route in zip(sequences, outputs, log_probs, routes, strict=True):
        start = len(sequence) - len(out.output_ids)
        rows = torch.arange(start - 1, len(sequence) - 1)
        expected = plain[rows, torch.tensor(out.output_ids)].numpy()
        np.testing.assert_allclose(out.log_probs, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert out.routed_experts is not None
        np.testing.assert_array_equal(out.routed_experts, route)


@needs_compiler
def test_an_answer_does_not_depend_on_the_batch(policy: Policy, library: Path) -> None:
    requests = mixed_requests()
    together = run(policy.engine(decode_library=library).generate(requests))
    alone = policy.engine(decode_library=library, max_running_requests=1)
    for lone, other in zip(requests, together, strict=True):
        (answer,) = run(alone.generate([lone]))
        assert answer.output_ids == other.output_ids
        np.testing.assert_array_equal(answer.log_probs[1:], other.log_probs[1:])


@needs_compiler
def test_top_k_and_top_p_are_drawn_from_the_kernel_s_logits(policy: Policy, library: Path) -> None:
    requests = [request([3, 4, 5], key=i, max_new_tokens=10, top_k=3, top_p=0.8) for i in range(6)]
    for one, other in both(policy, library, requests):
        assert_same(one, other)


@needs_compiler
def test_more_rows_than_the_kernel_reads_at_once(policy: Policy, library: Path) -> None:
    requests = [request([7, i % 30, 3, 9], key=i, max_new_tokens=3) for i in range(300)]
    for one, other in both(policy, library, requests, max_running_requests=300):
        assert_same(one, other)


@needs_compiler
def test_where_nobody_waits_the_kernel_draws_until_all_are_done(
    policy: Policy, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MOST_SECONDS", 60.0)
    calls: list[int] = []
    advance = runner.FusedRunner.advance

    def counted(self: runner.FusedRunner, slots: Slots, running: int, *how: Any) -> tuple[int, torch.Tensor]:
        calls.append(running)
        return advance(self, slots, running, *how)

    monkeypatch.setattr(runner.FusedRunner, "advance", counted)
    requests = [request([7, i, 3], key=i, max_new_tokens=2 + i) for i in range(6)]
    engine = policy.engine(decode_library=library)
    answers = run(engine.generate(requests))
    assert calls == [6]
    assert [len(answer.output_ids) for answer in answers] == [2, 3, 4, 5, 6, 7]
    assert engine.metrics()["generated_tokens"] == 27
    assert engine.metrics()["steps"] == 7 - 1
    crowded = policy.engine(decode_library=library, max_running_requests=3)
    for one, other in zip(answers, run(crowded.generate(requests)), strict=True):
        assert_same(one, other)
    assert len(calls) > 3, "a request that waits takes the first free slot"


@needs_compiler
def test_changed_weights_are_served_after_the_next_sync(library: Path) -> None:
    spec = make_spec()
    decoder = make_decoder(spec)
    engine = Policy(spec, decoder).engine(decode_library=library)
    asked = [request([1, 2, 3], key=4)]
    run(engine.generate(asked))
    decoder.load_state_dict(make_decoder(spec, seed=9).state_dict())
    now(engine.share_weights(decoder, version=1))
    (changed,) = run(engine.generate(asked))
    (expected,) = run(Policy(spec, make_decoder(spec, seed=9)).engine().generate(asked))
    assert changed.output_ids == expected.output_ids
    assert changed.weight_versions == [(1, 0)]


@needs_compiler
def test_a_weight_that_is_not_a_number_stops_the_engine(library: Path) -> None:
    spec = make_spec()
    decoder = make_decoder(spec)
    decoder.layers[2].mlp.down.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        run(Policy(spec, decoder).engine(decode_library=library).generate([request([1, 2])]))


@needs_compiler
def test_a_second_build_takes_what_the_first_left(library: Path) -> None:
    assert COMPILER is not None
    before = library.stat().st_mtime_ns
    assert build.library(COMPILER.path) == library
    assert library.stat().st_mtime_ns == before
    assert not list(library.parent.glob(".building-*"))


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path / "cache"))
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: out of luck" >&2\nexit 1\n')
    broken.chmod(0o755)
    with pytest.raises(BuildFailed, match="out of luck"):
        build.library(str(broken))
    assert not list((tmp_path / "cache" / "kernels").iterdir())
    with pytest.raises(BuildFailed, match="did not run"):
        build.library(str(tmp_path / "nowhere"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ decides the flags of this test")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_give_the_same(
    narrower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What AVX2 and 128-bit machines compile, on a machine that has more."""
    if "x86" not in platform.machine():
        pytest.skip("x86 flags")
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, narrower))
    monkeypatch.setattr(compiling, "_native", lambda: "-march=native")
    spec = make_spec()
    for one, other in both(Policy(spec, make_decoder(spec)), build.library("g++"), mixed_requests()):
        assert_same(one, other)


def test_the_plan_knows_the_families_of_the_kernel() -> None:
    assert kernel.FAMILIES == FAMILIES
