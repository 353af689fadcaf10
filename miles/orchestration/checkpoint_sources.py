"""Where a run's first weights come from: a checkpoint directory, or a built-in one made on first use."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles import environment
from miles.config import ResolvedConfig, RunConfig, config_hash, resolve
from miles.data.tasks import is_builtin, resolve_builtin
from miles.errors import RunError
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.observer import Observer
from miles.planning import collect_facts, make_plan
from miles.planning.speculation import mtp_training_steps
from miles.record import RunLayout, RunStatus
from miles.scratch import scratch_directory, sweep

if TYPE_CHECKING:
    from miles.orchestration.job import RunOutcome

WARM_START_PROFILE = "quickstart-sft"
STAGE = "warm start"


@dataclass(frozen=True)
class CheckpointSource:
    """A directory with config and tokenizer; without weights, training starts from random ones."""

    directory: Path
    has_weights: bool = True


def locate_checkpoint(resolved: ResolvedConfig, observer: Observer) -> CheckpointSource:
    """The checkpoint of a run. A built-in one gets its weights from a supervised warm start, once per recipe.

    Raises: the MilesError that ended a warm start which did not finish.
    """
    name = resolved.config.model.hf_checkpoint
    assert name is not None, "preflight asks for a checkpoint"
    if not is_builtin(name):
        return CheckpointSource(Path(name))
    if resolved.config.algorithm.loss_type == "sft_loss":
        return CheckpointSource(resolve_builtin(name), has_weights=False)
    return CheckpointSource(_warm_started(name, resolved.config, observer))


def _warm_started(name: str, config: RunConfig, observer: Observer) -> Path:
    """The built-in checkpoint with weights; made by the shipped SFT profile when the cache has none. MTP
    layers learn along with it.
    """
    sets = [f'model.hf_checkpoint="{name}"', f'data.prompt_data="{name}/demonstrations"']
    if config.speculative.mtp_num_layers is not None:
        sets += [
            f"speculative.mtp_num_layers={config.speculative.mtp_num_layers}",
            "speculative.enable_mtp_training=true",
            f"speculative.mtp_training_steps={mtp_training_steps(config)}",
        ]
    recipe = resolve(WARM_START_PROFILE, sets=sets)
    root = environment.cache_dir() / "checkpoints"
    target = root / f"{name.partition(':')[2]}-sft-{config_hash(recipe.config)[:12]}"
    sweep(root, ".")
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        _warm_start(recipe, target, observer)
    return target


def _warm_start(recipe: ResolvedConfig, target: Path, observer: Observer) -> None:
    """Run the recipe in a scratch directory and move its last weights to `target`."""
    from miles.orchestration.launch import run

    started = time.monotonic()
    plan = make_plan(recipe, collect_facts(recipe.config))
    observer.on_event("stage", {"name": STAGE, "state": "start", "total": plan.num_rollouts})
    with scratch_directory(target.parent, f".{target.name}-") as scratch:
        outcome = run(recipe, plan, run_dir=scratch / "run", observer=_StageObserver(observer))
        if outcome.summary.status != RunStatus.FINISHED:
            raise outcome.error or _unfinished(outcome, plan.num_rollouts)
        last = CheckpointStore(RunLayout(outcome.run_dir).checkpoints_dir).latest()
        assert last is not None, "a finished run has a checkpoint of its last step"
        os.rename(last / "trainer" / "model", target)
    observer.on_event("stage", {"name": STAGE, "state": "end", "seconds": time.monotonic() - started})


def _unfinished(outcome: RunOutcome, total: int) -> RunError:
    """What a user who ended the warm start is told: its run directory is gone with it."""
    error = RunError(
        f"the warm start was {outcome.summary.status} after {outcome.summary.steps} of {total} steps",
        why="half a warm start is not kept",
        fix="type the same command again",
    )
    error.exit_code = outcome.exit_code
    return error


class _StageObserver:
    """Passes the steps of a preparing run on as progress of its stage."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """A preparing run's own events stay in its own record."""

    def on_step(self, row: dict[str, Any]) -> None:
        self._observer.on_event("stage", {"name": STAGE, "state": "step", **row})
