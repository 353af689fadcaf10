"""`python peak_of_a_step.py FORMAT`: peak memory of one step in bytes, as measured and as estimated."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch

from miles.arch import ArchSpec, AttentionSpec, LayerSpec, MoeSpec, RopeSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import pack
from miles.data.sample import Sample, SampleStatus
from miles.planning.memory import estimate_memory
from miles.planning.stored_bytes import stored_bytes
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.low_precision import as_stored

CONTEXT, REQUESTS, RESPONSE = 256, 16, 120


def model() -> ArchSpec:
    attention = AttentionSpec(8, 2, 64, RopeSpec(1e4), qkv_bias=False, output_bias=False)
    layer = LayerSpec(attention, MoeSpec(8, 2, 512, norm_topk_prob=True))
    return ArchSpec(
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        vocab_size=2048,
        hidden_size=512,
        layers=(layer,) * 4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=CONTEXT,
        eos_token_ids=(1,),
        bos_token_id=None,
        dtype="fp32",
        initializer_range=0.02,
    )


def status(line: str) -> int:
    found = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(line))
    return int(found.split()[1]) * 1024


def main(name: str) -> None:
    torch.set_num_threads(1)
    spec, quantised = model(), name != "fp32"
    chosen = NumberFormat(name)  # type: ignore[arg-type]
    policy = precision_policy(spec, "fp32", chosen, chosen)
    # Whatever the first calls of torch load belongs to no part of the estimate.
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], fused=True)
    torch.nn.functional.linear(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).sum().backward()
    before = status("VmRSS")
    settings = TrainerSettings(probe_tokens=0, precision=policy if quantised else None)
    trainer = NativeTrainer(spec, settings)
    trainer.decoder.init_weights(torch.Generator().manual_seed(0))
    engine = NativeEngine(
        spec,
        EngineSettings(
            max_context_len=CONTEXT,
            seed=1,
            max_running_requests=REQUESTS,
            precision=policy,
            keep_expanded=True,
        ),
    )
    rows = asyncio.run(step(trainer, engine, quantised))
    stored = stored_bytes(spec, policy) if quantised else None
    plan = estimate_memory(
        spec,
        "fp32",
        cached_tokens=(REQUESTS + 1) * CONTEXT,
        micro_batch_tokens=rows,
        reference=False,
        rollout_format=name,
        stored=stored,
        rounds=quantised,
    )
    print(status("VmHWM") - before, plan.total_bytes)


async def step(trainer: NativeTrainer, engine: NativeEngine, quantised: bool) -> int:
    """Sample, train, hand the weights over; returns the tokens of the micro-batch."""
    if quantised:
        await engine.receive_weights(as_stored(trainer.named_weights(), engine.settings.precision), 0)  # type: ignore[arg-type]
    else:
        await engine.share_weights(trainer.decoder, 0)
    sampling = SamplingParams(max_new_tokens=RESPONSE)
    prompts = [[3 + i, 7, 5] for i in range(REQUESTS)]
    outputs = await engine.generate(
        [GenerateRequest(input_ids=p, sampling=sampling, sample_key=i) for i, p in enumerate(prompts)]
    )
    batch = pack(
        [
            Sample(
                prompt="",
                tokens=[*prompt, *output.output_ids],
                response_length=len(output.output_ids),
                status=SampleStatus.TRUNCATED,
                reward=float(i % 2),
                rollout_log_probs=output.log_probs,
                rollout_routed_experts=output.routed_experts,
                group_index=0,
                index=i,
                rollout_id=i,
            )
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
    )
    trainer.train_step(batch)
    return batch.num_tokens


if __name__ == "__main__":
    main(sys.argv[1])
