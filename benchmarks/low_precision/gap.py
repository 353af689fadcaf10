"""The log-prob gap between trainer and engine, in few bits on one side, on both, and under two conventions.

An untrained MoE of width 320, whose FP8 blocks are whole and partial; the engine samples, the trainer reads
the same tokens with the same weights, replaying the routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from miles.arch import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, RopeSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.models.invariance import find_exact_numerics
from miles.models.numerics import FAST, Numerics
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.hf import read_hf
from miles.weights.low_precision import as_stored

GAP = "train/train_rollout_logprob_abs_diff"
FP8, POW2, INT4 = NumberFormat("fp8"), NumberFormat("fp8", "pow2"), NumberFormat("int4")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """What both sides multiply; None: the plain type."""

    told: str
    training: NumberFormat | None
    rollout: NumberFormat | None


CASES = (
    Case("plain on both sides", None, None),
    Case("FP8 rollout, plain training", None, FP8),
    Case("FP8 on both sides", FP8, FP8),
    Case("FP8 on both sides, scales in powers of two", POW2, POW2),
    Case("FP8 on both sides, the engine's scales in powers of two (a fault)", FP8, POW2),
    Case("INT4 rollout, plain training", None, INT4),
    Case("INT4 on both sides", INT4, INT4),
)


def model() -> ArchSpec:
    attention = AttentionSpec(5, 5, 64, RopeSpec(1e4), qkv_bias=False, output_bias=False)
    dense = LayerSpec(attention, DenseMlpSpec(448))
    experts = LayerSpec(attention, MoeSpec(4, 2, 96, norm_topk_prob=True))
    return ArchSpec(
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        vocab_size=256,
        hidden_size=320,
        layers=(dense, experts, experts),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        eos_token_ids=(1,),
        bos_token_id=None,
        dtype="bf16",
        initializer_range=0.02,
    )


def gap(
    spec: ArchSpec,
    case: Case,
    dtype: str,
    numerics: Numerics,
    prompts: list[list[int]],
    tokens: int,
    weights: Path | None = None,
) -> float:
    """Mean absolute difference in nats over everything that the engine sampled. `weights`: a checkpoint.
    None: an untrained model.
    """
    plain = NumberFormat(dtype)  # type: ignore[arg-type]
    policy = precision_policy(spec, dtype, case.rollout or plain, case.training)  # type: ignore[arg-type]
    told = None if case.training is None else policy
    settings = TrainerSettings(probe_tokens=0, precision=told)
    trainer = NativeTrainer(spec, settings, dtype=DTYPES[dtype], numerics=numerics)
    if weights is None:
        trainer.init_weights(0)
    else:
        trainer.load_weights(read_hf(weights))
    engine = NativeEngine(
        spec,
        EngineSettings(
            max_context_len=64,
            seed=3,
            max_running_requests=8,
            dtype=DTYPES[dtype],
            numerics=numerics,
            precision=policy,
            keep_expanded=True,
        ),
    )
    asyncio.run(engine.receive_weights(as_stored(trainer.named_weights(), policy), 1))
    return trainer.log_probs(rollout(engine, prompts, tokens)).metrics[GAP]


def rollout(engine: NativeEngine, prompts: list[list[int]], tokens: int) -> TrainBatch:
    requests = [
        GenerateRequest(
            input_ids=prompt, sampling=SamplingParams(max_new_tokens=tokens), sample_key=i, group=i
        )
        for i, prompt in enumerate(prompts)
    ]
    outputs = asyncio.run(engine.generate(requests))
    return pack(
        [
            Sample(
                prompt="",
                tokens=[*prompt, *output.output_ids],
                response_length=len(output.output_ids),
                status=SampleStatus.TRUNCATED,
                reward=0.0,
                rollout_log_probs=output.log_probs,
                rollout_routed_experts=output.routed_experts,
                group_index=i,
                index=i,
                rollout_id=i,
            )
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
    )


def ways(spec: ArchSpec) -> Iterator[tuple[str, str, Numerics]]:
    """(title, dtype, numerics)."""
    yield "fp32, fast", "fp32", FAST
    yield "bf16, fast", "bf16", FAST
    yield "bf16, exact numerics", "bf16", find_exact_numerics(spec, torch.bfloat16)


def measure(samples: int = 8, tokens: int = 48) -> dict[str, dict[str, float]]:
    """Gap by case and way."""
    torch.set_num_threads(1)
    spec = model()
    prompts = [[3 + i, 7, 11 + i, 5][: 2 + i % 3] for i in range(samples)]
    rows: dict[str, dict[str, float]] = {case.told: {} for case in CASES}
    for title, dtype, numerics in ways(spec):
        for case in CASES:
            rows[case.told][title] = gap(spec, case, dtype, numerics, prompts, tokens)
    return rows


def markdown(rows: dict[str, dict[str, float]]) -> str:
    titles = list(next(iter(rows.values())))
    lines = [
        "Mean |trainer log-prob - engine log-prob| in nats; in brackets against FP8 rollout with plain "
        "training.",
        "",
        f"| engine and trainer | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
    ]
    mixed = rows["FP8 rollout, plain training"]
    for told, cells in rows.items():
        shown = [
            f"{cells[t]:.1e} ({cells[t] / mixed[t]:.1%})" if "FP8 on" in told else f"{cells[t]:.1e}"
            for t in titles
        ]
        lines.append(f"| {told} | {' | '.join(shown)} |")
    both = rows["FP8 on both sides"]
    fault = next(cells for told, cells in rows.items() if "fault" in told)
    for title in titles:
        verdict = "met" if both[title] <= mixed[title] / 10 and fault[title] >= 10 * both[title] else "missed"
        lines += ["", f"Bar (a tenth; the fault at least ten times worse), {title}: {verdict}."]
    return "\n".join(lines)
