"""What every cluster profile tells Megatron and SGLang, as text: the golden files.

python tests/cpu/training/megatron/launch_arguments.py     # writes them anew

Megatron's part is made by megatron-core's own classes, of which it names every field that is not at its
default. On a machine without Transformer Engine its version is answered with that of the GPU image.
"""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from miles.arch.megatron import megatron_obstacle
from miles.config import resolve, shipped_names
from miles.orchestration import assemble
from miles.planning import collect_facts
from miles.planning.hardware import parse_hardware
from miles.planning.outline import make_outline
from miles.planning.plan import Plan, _plan
from miles.planning.preflight import preflight
from miles.planning.subject import Subject
from miles.rollout.sglang.command import argument_words
from miles.training.megatron import cpu

GOLDEN = Path(__file__).with_name("golden")
ENGINE_VERSION = "2.17.0"
"""Of Transformer Engine in `docker/Dockerfile`."""

HARDWARE = {
    "qwen3-moe-fp8": "16xH100",
    "qwen3-4b": "8xH100",
    "llama-3.1-8b": "8xH100",
    "qwen3-235b-a22b": "64xH100",
    "deepseek-v3-fp8": "128xH100",
    "deepseek-v3-int4-single-node": "144xH200",
    "glm-4.5-spec": "64xH100",
    "minimax-m2": "64xH100",
    "gemma-3-12b": "8xH100",
}
"""What each cluster profile is for."""


def cluster_profiles() -> list[str]:
    """Shipped recipes that ask for GPUs."""
    recipes = [name for name in shipped_names() if "/" not in name]
    return [name for name in recipes if resolve(name).config.cluster.actor_num_gpus_per_node]


def arguments(profile: str) -> str:
    """Trainer settings, server arguments and environment of a profile on its own hardware."""
    resolved = resolve(profile)
    facts = collect_facts(resolved.config, assume=parse_hardware(HARDWARE[profile]))
    subject = Subject(resolved, facts)
    plan = _plan(subject, preflight(resolved, facts), make_outline(subject))
    lines = [f"# {profile} on {HARDWARE[profile]}", "", *_megatron(subject, plan), "", "[SGLang server]"]
    words = argument_words(plan.server_args or {})
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    lines += [" ".join(words[a:b]) for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]
    lines += ["", "[environment]", *(f"{name}={value}" for name, value in plan.exports)]
    return "\n".join(lines) + "\n"


def _megatron(subject: Subject, plan: Plan) -> Iterator[str]:
    spec = subject.spec
    assert spec is not None
    obstacle = megatron_obstacle(spec, engine=True)
    if obstacle:
        yield f"# Megatron does not carry {obstacle}"
        return
    cpu.install()
    from miles.training.megatron.core_config import ddp_config, optimizer_config
    from miles.training.megatron.transformer_config import transformer_config

    settings = assemble.trainer_settings(subject.config, plan, spec)
    layout = assemble.megatron_layout(subject.config, plan.device)
    dtype = assemble.DTYPES[plan.dtype]
    with engine_of_the_image(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = (
            transformer_config(spec, layout, settings, dtype),
            ddp_config(layout),
            optimizer_config(settings.optimizer, layout, dtype),
        )
    for number, part in enumerate(made):
        yield from ([""] if number else [])
        yield f"[{type(part).__name__}]"
        yield from (f"{name} = {value}" for name, value in sorted(_set(part)))


@contextmanager
def engine_of_the_image() -> Iterator[None]:
    """Inside, megatron-core believes in the Transformer Engine of the GPU image: its version and a kernel."""
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils

    before = utils.get_te_version(), rope_utils.fused_apply_rotary_pos_emb_thd
    utils._te_version, rope_utils.fused_apply_rotary_pos_emb_thd = Version(ENGINE_VERSION), object()
    try:
        yield
    finally:
        utils._te_version, rope_utils.fused_apply_rotary_pos_emb_thd = before


def _set(config: Any) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            yield field.name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, partial):
        value = value.func
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__qualname__", None) or repr(value)


if __name__ == "__main__":
    for each in cluster_profiles():
        (GOLDEN / f"{each}.txt").write_text(arguments(each), encoding="utf-8")
