"""The two policies that are measured: the quickstart's, and a deeper one that the same task teaches.

Both are made by the project itself and kept in its cache: the quickstart's by its warm start, once per seed,
the deeper one by a run of the warm-start profile on another config.json.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miles import environment
from miles.arch import ArchSpec, load_spec
from miles.config import config_hash, resolve
from miles.data.source import PromptSource
from miles.data.tasks import resolve_builtin
from miles.data.tokenizer import CheckpointTokenizer
from miles.models.decoder import Decoder
from miles.orchestration import assemble
from miles.orchestration.checkpoint_sources import locate_checkpoint
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.launch import run
from miles.orchestration.observer import SilentObserver
from miles.planning import collect_facts, make_plan
from miles.record import RunLayout
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import to_published

DEEP = {
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 64,
}
"""What the deeper policy has other than the quickstart's: 8 layers, 32 experts, 4 of them per token."""
DEEP_RECIPE = ("optimizer.lr=2e-3", "optimizer.min_lr=2e-4")
DEEP_VERSION = 1


@dataclass(frozen=True)
class Policy:
    """A checkpoint with the task it learned."""

    name: str
    spec: ArchSpec
    weights: dict[str, Tensor]
    """fp32, under published names."""
    prompts: PromptSource
    tokenizer: CheckpointTokenizer
    stop_token_ids: tuple[int, ...]
    max_response_len: int


def quickstart(seed: int) -> Policy:
    """The warm-started policy of `miles train --profile quickstart` under another seed of its task."""
    return _policy("quickstart", seed, f"builtin:sort@{seed}", None)


def deep(seed: int, steps: int) -> Policy:
    """The deeper policy, trained once (`steps` of supervised learning), with prompts and draws of `seed`."""
    return _policy("deep", seed, "builtin:sort", _trained_deep(steps))


def _policy(name: str, seed: int, task: str, checkpoint: Path | None) -> Policy:
    sets = [f'model.hf_checkpoint="{checkpoint or task}"', f'data.prompt_data="{task}/train"']
    resolved = resolve("quickstart", sets=[*sets, f"rollout.rollout_seed={42 + seed}"])
    plan = make_plan(resolved, collect_facts(resolved.config))
    directory = checkpoint or locate_checkpoint(resolved, SilentObserver()).directory
    spec = load_spec(directory)
    tokenizer = assemble.load_tokenizer(resolved.config, directory)
    return Policy(
        name=name,
        spec=spec,
        weights={n: tensor.float() for n, tensor in read_hf(directory)},
        prompts=assemble.prompt_source(resolved.config, plan, tokenizer),
        tokenizer=tokenizer,
        stop_token_ids=assemble.stop_tokens(resolved.config, spec, tokenizer),
        max_response_len=plan.max_response_len,
    )


def _trained_deep(steps: int) -> Path:
    """The checkpoint of the deeper policy, made on first use."""
    root = environment.cache_dir() / "checkpoints"
    scratch = Path(tempfile.mkdtemp(prefix=".deep-", dir=_made(root)))
    try:
        _write_untrained(scratch / "untrained")
        recipe = resolve("quickstart-sft", sets=list(_recipe("checkpoint", steps)))
        target = root / f"sort-deep-v{DEEP_VERSION}-{config_hash(recipe.config)[:12]}"
        if not target.exists():
            _train(scratch / "untrained", steps, scratch / "run", target)
        return target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _recipe(checkpoint: str, steps: int) -> Iterator[str]:
    yield f'model.hf_checkpoint="{checkpoint}"'
    yield f"rollout.num_rollout={steps}"
    yield from DEEP_RECIPE


def _train(untrained: Path, steps: int, run_dir: Path, target: Path) -> None:
    resolved = resolve("quickstart-sft", sets=list(_recipe(str(untrained), steps)))
    plan = make_plan(resolved, collect_facts(resolved.config))
    outcome = run(resolved, plan, run_dir=run_dir, observer=SilentObserver())
    assert outcome.exit_code == 0, outcome.error
    last = CheckpointStore(RunLayout(run_dir).checkpoints_dir).latest()
    assert last is not None, "a finished run has a checkpoint of its last step"
    os.rename(last / "trainer" / "model", target)


def _write_untrained(directory: Path) -> None:
    """The task's tokenizer, the deeper config and random weights, as a Hugging Face checkpoint."""
    source = resolve_builtin("builtin:sort")
    shell = Path(f"{directory}-config")
    shutil.copytree(source, shell)
    config = json.loads((source / "config.json").read_text()) | DEEP
    (shell / "config.json").write_text(json.dumps(config))
    spec = load_spec(shell)
    decoder = Decoder(spec)
    decoder.init_weights(torch.Generator().manual_seed(0))
    write_hf(directory, spec, to_published(decoder), source_dir=shell)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
