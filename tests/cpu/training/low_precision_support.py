"""A MoE of width 320, whose FP8 blocks are whole and partial, sampled by one side and read by the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from miles.arch import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, RopeSpec
from miles.arch.precision import NumberFormat, PrecisionPolicy, precision_policy
from miles.arch.spec import IndexerSpec, LatentSpec
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.models.numerics import FAST, Numerics
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.low_precision import as_stored

GAP = "train/train_rollout_logprob_abs_diff"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def wide_spec() -> ArchSpec:
    """Rows and columns of 320 and 448 end in half a block; experts of 96 rows are lower than one."""
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
        dtype="fp32",
        initializer_range=0.02,
    )


def latent_spec() -> ArchSpec:
    """The same with latent attention under an indexer, and experts beside a shared one."""
    spec = wide_spec()
    attention = AttentionSpec(
        num_heads=5,
        num_kv_heads=1,
        head_dim=96,
        rope=RopeSpec(1e4, width=32, interleaved=True),
        qkv_bias=False,
        output_bias=False,
        qk_norm=False,
        latent=LatentSpec(query_rank=160, kv_rank=64, plain_dim=32, rotated_dim=32, value_dim=64),
        indexer=IndexerSpec(num_heads=6, head_dim=64, top_k=12),
    )
    moe = MoeSpec(4, 2, 96, True, "sigmoid", True, shared_size=96)
    dense, experts = LayerSpec(attention, DenseMlpSpec(448)), LayerSpec(attention, moe)
    return replace(
        spec,
        family="deepseek_v32",
        architecture="DeepseekV32ForCausalLM",
        layers=(dense, experts, experts),
    )


def stacked_spec() -> ArchSpec:
    """The same as Llama 4 publishes it: experts stacked, inputs first, scaled at their inputs."""
    spec = wide_spec()
    attention = replace(spec.layers[0].attention, qk_norm=False, qk_unit=True)
    moe = MoeSpec(4, 1, 96, False, "sigmoid", scales_inputs=True, stacked=True, shared_size=96)
    dense, experts = LayerSpec(attention, DenseMlpSpec(448)), LayerSpec(attention, moe)
    return replace(
        spec, family="llama4_text", architecture="Llama4ForCausalLM", layers=(dense, experts, experts)
    )


class Pair:
    """A trainer and the engine that holds its weights, each under the policy it was told."""

    def __init__(
        self,
        training: NumberFormat,
        rollout: NumberFormat,
        dtype: torch.dtype = torch.float32,
        numerics: Numerics = FAST,
        spec: ArchSpec | None = None,
        make: Callable[..., Any] | None = None,
    ) -> None:
        """`make`: another trainer than the native one."""
        spec, plain = spec or wide_spec(), NAMES[dtype]
        self.policy: PrecisionPolicy = precision_policy(spec, plain, rollout, training)
        told = None if training.is_plain else self.policy
        settings = TrainerSettings(probe_tokens=0, precision=told)
        self.trainer: Any = (
            NativeTrainer(spec, settings, dtype=dtype, numerics=numerics)
            if make is None
            else make(spec, settings, dtype=dtype)
        )
        self.trainer.init_weights(0)
        self.engine = NativeEngine(
            spec,
            EngineSettings(
                max_context_len=64,
                seed=3,
                max_running_requests=8,
                dtype=dtype,
                numerics=numerics,
                precision=self.policy,
                keep_expanded=True,
            ),
        )
        weights = as_stored(self.trainer.named_weights(), self.policy)
        asyncio.run(self.engine.receive_weights(weights, 1))

    def gap(self, samples: int = 8, tokens: int = 24) -> float:
        """Mean absolute difference of the two sides' log-probs over what the engine samples, in nats."""
        return self.trainer.log_probs(self._rollout(samples, tokens)).metrics[GAP]

    def _rollout(self, samples: int, tokens: int) -> TrainBatch:
        prompts = [[3 + i // 2, 7, 11 + i // 2, 5][: 2 + i // 2 % 3] for i in range(samples)]
        sampling = SamplingParams(max_new_tokens=tokens)
        requests = [
            GenerateRequest(input_ids=prompt, sampling=sampling, sample_key=i, group=i // 2)
            for i, prompt in enumerate(prompts)
        ]
        outputs = asyncio.run(self.engine.generate(requests))
        return pack(
            [
                Sample(
                    prompt="",
                    tokens=[*prompt, *output.output_ids],
                    response_length=len(output.output_ids),
                    status=SampleStatus.TRUNCATED,
                    reward=float(i % 2),
                    rollout_log_probs=output.log_probs,
                    rollout_routed_experts=output.routed_experts,
                    group_index=i // 2,
                    index=i,
                    rollout_id=i,
                )
                for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
            ]
        )
