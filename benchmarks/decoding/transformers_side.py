"""transformers: `generate` in every setting that may be the best on a CPU, and continuous batching.

Continuous batching gets a capped cache: it sizes its own from free memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from decoding.models import Subject
from decoding.workload import Clock, Timing, Workload

PAGE = 16
"""Tokens of a page of the continuous cache: short sequences would leave most of the default 256 empty."""


@dataclass(frozen=True)
class Setting:
    """One way to call `generate`."""

    experts: str | None
    attention: str
    cache: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.experts, self.attention, f"{self.cache} cache") if part)


def settings(subject: Subject) -> Iterator[Setting]:
    """Experts computed in groups or one by one (batched ones are ten times slower), either attention, either
    cache."""
    for experts in ("grouped_mm", "eager") if subject.spec.is_moe else (None,):
        for attention in ("sdpa", "eager"):
            for cache in ("dynamic", "static"):
                yield Setting(experts, attention, cache)


def generate(subject: Subject, workload: Workload, setting: Setting) -> Timing:
    """One plain `generate` of the whole batch. It returns no log-probs and no routes, ours does."""
    model = subject.hf
    model.set_attn_implementation(setting.attention)
    if setting.experts is not None:
        model.set_experts_implementation(setting.experts)
    ids = torch.tensor(workload.prompts(subject.spec.vocab_size))
    config = _config(workload, cache_implementation="static" if setting.cache == "static" else None)
    if setting.cache == "static":
        config.disable_compile = True
    with Clock() as clock, torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert out.shape == (workload.batch, workload.prompt + workload.response)
    return clock.timing


def continuous_batching(subject: Subject, workload: Workload) -> Timing:
    """`generate_batch` over the same requests."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = subject.hf
    model.set_attn_implementation("sdpa")
    if subject.spec.is_moe:
        model.set_experts_implementation("grouped_mm")
    pages = -(-(workload.prompt + workload.response + 1) // PAGE) + 1
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=workload.batch * pages + 8,
        max_batch_tokens=max(512, 2 * workload.batch),
    )
    prompts = workload.prompts(subject.spec.vocab_size)
    with Clock() as clock, torch.inference_mode():
        done = model.generate_batch(
            prompts, generation_config=_config(workload), continuous_batching_config=config, warmup=False
        )
    assert sum(len(output.generated_tokens) for output in done.values()) == workload.new_tokens
    return clock.timing


def _config(workload: Workload, cache_implementation: str | None = None) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=workload.response,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache_implementation,
    )
