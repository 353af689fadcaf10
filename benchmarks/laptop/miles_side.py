"""miles' side: the shipped quickstart through the entry point of `miles train`, without its evaluations.

`prepare` makes the warm-started checkpoint and writes down the prompts that the run will read, in its order;
`run` trains. Both print one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from laptop.stopwatch import Stopwatch
from miles._version import __version__
from miles.config import ResolvedConfig, resolve
from miles.planning import Plan, collect_facts, make_plan
from miles_cli.session import prepare


def job(seed: int, steps: int, runs_dir: Path | None) -> tuple[ResolvedConfig, Plan]:
    """The quickstart profile under another seed: its task, its warm start, its prompts and its samples."""
    sets = [
        f'model.hf_checkpoint="builtin:sort@{seed}"',
        f'data.prompt_data="builtin:sort@{seed}/train"',
        "eval.eval_prompt_data=[]",
        "eval.eval_greedy=false",
        "run.executor=inline",
        f"run.seed={1234 + seed}",
        f"rollout.rollout_seed={42 + seed}",
        f"rollout.num_rollout={steps}",
        f"checkpoint.save_interval={steps}",
    ]
    if runs_dir is not None:
        sets.append(f'run.runs_dir="{runs_dir}"')
    resolved = resolve("quickstart", sets=sets)
    return resolved, make_plan(resolved, collect_facts(resolved.config))


def write_inputs(seed: int, steps: int, prompts: Path) -> dict[str, Any]:
    """Write one line per prompt, {prompt, label, token_ids}; returns the checkpoint and the settings."""
    resolved, plan = job(seed, steps, None)
    prepare(plan)

    from miles.orchestration import assemble
    from miles.orchestration.checkpoint_sources import locate_checkpoint
    from miles.orchestration.observer import SilentObserver

    checkpoint = locate_checkpoint(resolved, SilentObserver()).directory
    config = resolved.config
    source = assemble.prompt_source(config, plan, assemble.load_tokenizer(config, checkpoint))
    groups = source.next_groups(steps * plan.batch.rollout_batch_size)
    rows = (
        {"prompt": first.prompt, "label": first.label, "token_ids": list(first.tokens)}
        for first, *_ in groups
    )
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "seed": config.run.seed,
        "rollout_batch_size": plan.batch.rollout_batch_size,
        "n_samples_per_prompt": plan.batch.n_samples_per_prompt,
        "max_response_len": plan.max_response_len,
        "temperature": config.rollout.rollout_temperature,
        "lr": config.optimizer.lr,
        "warmup": config.optimizer.lr_warmup_iters,
        "betas": [config.optimizer.adam_beta1, config.optimizer.adam_beta2],
        "eps": config.optimizer.adam_eps,
        "weight_decay": config.optimizer.weight_decay,
        "clip_grad": config.optimizer.clip_grad,
        "eps_clip": config.algorithm.eps_clip,
        "eps_clip_high": config.algorithm.eps_clip_high,
    }
    return {"checkpoint": str(checkpoint), "settings": settings}


class StepObserver:
    """Ends a step of the stopwatch where the loop reports it."""

    def __init__(self, watch: Stopwatch, samples: int) -> None:
        self.watch, self.samples = watch, samples

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Nothing but steps is measured."""

    def on_step(self, row: dict[str, Any]) -> None:
        metrics = row["metrics"]
        tokens = round(metrics["rollout/response_len/mean"] * self.samples)
        self.watch.end_step(metrics["rollout/raw_reward"], tokens)


def train(seed: int, steps: int, runs_dir: Path, watch: Stopwatch) -> dict[str, Any]:
    """Run the job to its end under the stopwatch."""
    resolved, plan = job(seed, steps, runs_dir)
    prepare(plan)

    import torch

    from miles.orchestration.driver import Driver
    from miles.orchestration.launch import run

    phase = Driver.phase

    @contextmanager
    def timed(driver: Driver, name: str, step: int) -> Iterator[None]:
        watch.start()
        if name != "rollout":
            with phase(driver, name, step):
                yield
            return
        with watch.rollout(), phase(driver, name, step):
            yield

    batch = plan.batch.rollout_batch_size * plan.batch.n_samples_per_prompt
    with patch.object(Driver, "phase", timed):
        outcome = run(resolved, plan, observer=StepObserver(watch, batch))
    assert outcome.exit_code == 0, outcome.error
    assert len(watch.steps) == steps
    return watch.result(
        {"miles": __version__, "torch": torch.__version__, "threads": str(plan.threads.count)}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--runs-dir", type=Path)
    parser.add_argument("--spawned", type=float, default=0.0)
    options = parser.parse_args()
    if options.what == "prepare":
        result = write_inputs(options.seed, options.steps, options.prompts)
    else:
        result = train(options.seed, options.steps, options.runs_dir, Stopwatch(options.spawned))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
