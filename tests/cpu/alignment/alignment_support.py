"""Engine and trainer of one model, each with weights of its own, and the log-probs of both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from miles.arch.spec import (
    ArchSpec,
    AttentionSpec,
    DenseMlpSpec,
    IndexerSpec,
    LatentSpec,
    LayerSpec,
    LinearScaling,
    MoeSpec,
    QueryTemperature,
    RopeSpec,
    StreamsSpec,
    YarnScaling,
)
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.models.numerics import ExactNumerics, Numerics
from miles.models.row_blocks import RowBlocks
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings

TEMPERATURE = 0.8


def make_spec(
    hidden: int, heads: tuple[int, int, int], mlp: MoeSpec | DenseMlpSpec, vocab: int, layers: int = 2
) -> ArchSpec:
    num_heads, num_kv_heads, head_dim = heads
    attention = AttentionSpec(
        num_heads, num_kv_heads, head_dim, RopeSpec(1e4), qkv_bias=False, output_bias=False
    )
    moe = isinstance(mlp, MoeSpec)
    return ArchSpec(
        family="qwen3_moe" if moe else "qwen3",
        architecture="Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(LayerSpec(attention, mlp),) * layers,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        eos_token_ids=(2,),
        bos_token_id=1,
        dtype="fp32",
        initializer_range=0.25,
    )


def _glm4_moe() -> ArchSpec:
    """Half of each head rotated; groups of experts, a correction bias, a shared expert, a dense layer."""
    moe = MoeSpec(8, 2, 24, True, "sigmoid", True, num_groups=4, top_groups=2, routed_scaling=2.5)
    spec = make_spec(40, (6, 2, 8), replace(moe, shared_size=24), 37)
    attention = replace(spec.layers[0].attention, rope=RopeSpec(1e4, width=4), qkv_bias=True)
    layers = (LayerSpec(attention, DenseMlpSpec(48)), *(LayerSpec(attention, one.mlp) for one in spec.layers))
    return replace(spec, family="glm4_moe", architecture="Glm4MoeForCausalLM", layers=layers)


def _minimax_m2() -> ArchSpec:
    """Norms over the whole width of queries and of keys."""
    spec = make_spec(48, (4, 2, 12), MoeSpec(6, 2, 16, True, "sigmoid", True), 41)
    attention = replace(spec.layers[0].attention, rope=RopeSpec(1e4, width=8), qk_norm_over="width")
    layers = tuple(replace(layer, attention=attention) for layer in spec.layers)
    return replace(spec, family="minimax_m2", architecture="MiniMaxM2ForCausalLM", layers=layers)


def _deepseek_v3() -> ArchSpec:
    """Latent attention: one key head whose values are its keys."""
    spec = make_spec(40, (3, 1, 24), MoeSpec(6, 2, 16, True, "sigmoid", True, shared_size=16), 41, layers=1)
    latent = LatentSpec(query_rank=24, kv_rank=16, plain_dim=16, rotated_dim=8, value_dim=16)
    rope = RopeSpec(1e4, YarnScaling(4.0, 64, mscale=1.0, mscale_all_dim=0.5), width=8, interleaved=True)
    attention = replace(spec.layers[0].attention, rope=rope, qk_norm=False, scale=0.3, latent=latent)
    layers = tuple(replace(layer, attention=attention) for layer in spec.layers)
    return replace(spec, family="deepseek_v3", architecture="DeepseekV3ForCausalLM", layers=layers)


def _gemma3() -> ArchSpec:
    """Windows in all layers but one, which rotates otherwise; norms around blocks, GELU, one head of keys."""
    spec = make_spec(40, (4, 1, 12), DenseMlpSpec(36, "gelu_tanh"), 43)
    full = replace(spec.layers[0].attention, rope=RopeSpec(1e4, LinearScaling(8.0)), scale=0.25)
    windowed = replace(full, rope=RopeSpec(100.0), window=21)
    kinds = (windowed, full, windowed)
    layers = tuple(LayerSpec(kind, spec.layers[0].mlp, output_norms=True) for kind in kinds)
    plus = {"norm_plus_one": True, "embedding_scale": 40**0.5, "tie_word_embeddings": True}
    return replace(spec, family="gemma3_text", architecture="Gemma3ForCausalLM", layers=layers, **plus)


def _gemma2() -> ArchSpec:
    """Capped scores in windows and without, and capped logits."""
    spec = _gemma3()
    full = replace(spec.layers[1].attention, num_kv_heads=2, qk_norm=False, softcap=4.0)
    windowed = replace(full, window=18)
    layers = tuple(replace(spec.layers[0], attention=kind) for kind in (windowed, full))
    return replace(spec, family="gemma2", architecture="Gemma2ForCausalLM", layers=layers, logit_softcap=6.0)


def _llama4() -> ArchSpec:
    """Chunks in layers that rotate, all that is before where positions only sharpen; experts stored by
    column, scaled at their input."""
    spec = make_spec(40, (6, 2, 8), DenseMlpSpec(56), 39)
    moe = MoeSpec(5, 1, 24, False, "sigmoid", scales_inputs=True, stacked=True, shared_size=24)
    attention = replace(spec.layers[0].attention, qk_norm=False)
    rope = RopeSpec(300.0, interleaved=True)
    chunked = replace(attention, rope=rope, chunk=19, qk_unit=True)
    unrotated = replace(attention, rotates=False, temperature=QueryTemperature(0.3, 6))
    layers = (LayerSpec(chunked, moe), LayerSpec(unrotated, DenseMlpSpec(56)), LayerSpec(chunked, moe))
    return replace(spec, family="llama4_text", architecture="Llama4ForCausalLM", layers=layers)


def _deepseek_v32() -> ArchSpec:
    """The best 20 keys of an indexer, whose heads often all say nothing of a key."""
    spec = _deepseek_v3()
    attention = replace(spec.layers[0].attention, indexer=IndexerSpec(num_heads=3, head_dim=12, top_k=20))
    layers = tuple(replace(layer, attention=attention) for layer in spec.layers * 2)
    return replace(spec, family="deepseek_v32", architecture="DeepseekV32ForCausalLM", layers=layers)


def _gemma3n() -> ArchSpec:
    """Several residual streams, sparse gates, and last layers that attend to the keys of earlier ones."""
    spec = _gemma3()
    windowed, full, _ = (replace(layer.attention, v_unit=True, scale=1.0) for layer in spec.layers)
    kinds = (windowed, full, replace(windowed, keys_of=0), replace(full, keys_of=1))
    layers = tuple(
        LayerSpec(kind, DenseMlpSpec(36 - 4 * index, "gelu_tanh", sparsity), output_norms=True)
        for index, (kind, sparsity) in enumerate(zip(kinds, (0.7, 0.0, 0.0, 0.0), strict=True))
    )
    streams = StreamsSpec(count=3, laurel_rank=5, layer_width=6, layer_vocab=40)
    named = {"family": "gemma3n_text", "architecture": "Gemma3nForCausalLM", "norm_plus_one": False}
    return replace(spec, layers=layers, streams=streams, logit_softcap=6.0, **named)


SPECS = {
    "the quickstart's experts": make_spec(64, (4, 2, 16), MoeSpec(8, 2, 64, norm_topk_prob=True), 55),
    "odd widths": make_spec(40, (6, 2, 8), MoeSpec(6, 3, 20, norm_topk_prob=True), 37, layers=3),
    "one expert per token": make_spec(32, (4, 4, 8), MoeSpec(4, 1, 24, norm_topk_prob=False), 41),
    "dense": make_spec(64, (4, 1, 16), DenseMlpSpec(96), 55),
    "glm4_moe": _glm4_moe(),
    "minimax_m2": _minimax_m2(),
    "deepseek_v3": _deepseek_v3(),
    "deepseek_v32": _deepseek_v32(),
    "gemma2": _gemma2(),
    "gemma3": _gemma3(),
    "gemma3n": _gemma3n(),
    "llama4": _llama4(),
}
QUICKSTART = SPECS["the quickstart's experts"]


def needs_blocks(found: ExactNumerics) -> bool:
    """Whether this machine gives a row other bits in another number of rows."""
    return any(blocks.sizes[0] > 1 for blocks in found.blocks.values())


def without_blocks(found: ExactNumerics) -> ExactNumerics:
    """The same numerics, but every product has the rows that are asked for."""
    bare = {key: RowBlocks(tuple(range(1, 5000)), key[1]) for key in found.blocks}
    return replace(found, blocks=bare, min_queries=1)


@dataclass(frozen=True)
class Traffic:
    """What the engine is asked, and how its samples reach the trainer."""

    prompts: Sequence[int] = (1, 3, 7, 17, 30, 5)
    """Prompt lengths; each prompt is one group."""
    responses: Sequence[int] = (40, 12, 25, 3, 31, 1)
    group: int = 1
    slots: int = 4
    max_prefill_tokens: int = 64
    order_seed: int = 0
    micro_batch: int = 4
    temperature: float = TEMPERATURE
    top_p: float = 1.0

    def requests(self, vocab: int) -> list[list[GenerateRequest]]:
        rng = np.random.default_rng(7)
        return [
            [
                GenerateRequest(
                    input_ids=prompt,
                    sampling=SamplingParams(
                        max_new_tokens=response, temperature=self.temperature, top_p=self.top_p
                    ),
                    sample_key=1000 * group + member,
                    group=group,
                )
                for member in range(self.group)
            ]
            for group, (prompt, response) in enumerate(
                zip((rng.integers(0, vocab, n).tolist() for n in self.prompts), self.responses, strict=True)
            )
        ]


@dataclass
class Sides:
    """One model on both sides. The engine's weights are copies: nothing is shared but the numerics."""

    spec: ArchSpec
    numerics: Numerics
    dtype: torch.dtype = torch.float32
    trainer_numerics: Numerics | None = None
    decode_library: Path | None = None
    settings: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(
            optimizer=OptimizerSettings(lr=1e-3),
            algorithm=AlgorithmSettings(temperature=TEMPERATURE),
            probe_tokens=0,
        )
    )

    def __post_init__(self) -> None:
        numerics = self.trainer_numerics or self.numerics
        self.trainer = NativeTrainer(self.spec, self.settings, self.dtype, numerics=numerics)
        self.trainer.init_weights(seed=3)
        self.engine: NativeEngine | None = None

    async def _roll_out(self, traffic: Traffic, nudge: str | None) -> list[list[GenerateOutput]]:
        context = max(traffic.prompts) + max(traffic.responses)
        settings = EngineSettings(
            max_context_len=context,
            seed=5,
            max_running_requests=traffic.slots,
            max_prefill_tokens=traffic.max_prefill_tokens,
            dtype=self.dtype,
            numerics=self.numerics,
            decode_library=self.decode_library,
        )
        self.engine = NativeEngine(self.spec, settings)
        copies = {name: tensor.clone() for name, tensor in self.trainer.named_weights()}
        if nudge is not None:
            copies[nudge] = torch.nextafter(copies[nudge], torch.tensor(float("inf")))
        await self.engine.receive_weights(copies.items(), version=0)
        calls = traffic.requests(self.spec.vocab_size)
        order = list(range(len(calls)))
        random.Random(traffic.order_seed).shuffle(order)
        answers = await asyncio.gather(*(self.engine.generate(calls[i]) for i in order))
        return [answers[order.index(i)] for i in range(len(calls))]

    def roll_out(self, traffic: Traffic, nudge: str | None = None) -> TrainBatch:
        """A batch with the engine's log-probs and routes. `nudge`: a weight the engine gets one ulp up."""
        answers = asyncio.run(asyncio.wait_for(self._roll_out(traffic, nudge), 600))
        samples: list[Sample] = []
        for call, outputs in zip(traffic.requests(self.spec.vocab_size), answers, strict=True):
            for request, output in zip(call, outputs, strict=True):
                samples.append(
                    Sample(
                        prompt="",
                        tokens=[*request.input_ids, *output.output_ids],
                        response_length=len(output.output_ids),
                        reward=float(output.output_ids[0] % 3),
                        status=SampleStatus.COMPLETED,
                        rollout_log_probs=output.log_probs,
                        rollout_routed_experts=output.routed_experts,
                        group_index=request.group,
                        index=len(samples),
                        rollout_id=len(samples),
                    )
                )
        return pack(samples)

    def differing(self, traffic: Traffic) -> tuple[int, int]:
        """Tokens whose log-prob has other bits in the trainer than in the engine, and tokens compared."""
        batch = self.roll_out(traffic)
        self.trainer.settings = replace(self.settings, micro_batch_size=traffic.micro_batch)
        ours = self.trainer.log_probs(batch).log_probs
        seen = batch.loss_mask > 0
        return int((ours[seen] != batch.rollout_log_probs[seen]).sum()), int(seen.sum())
