"""TRL's side: GRPOTrainer in the fastest CPU setting we know, on the inputs of the miles run.

Measured against its alternatives on a two-core machine: `grouped_mm` experts beat eager and batched ones, a
dynamic cache beats a static one, plain `generate` beats continuous batching, one thread beats two. Nothing is
logged per step. The optimizer and its schedule are built here so that both sides warm up alike (Transformers'
own schedule would spend the first step at rate 0). Prints one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from laptop.stopwatch import Stopwatch


class ExactReward:
    """1 for the exact label and an end token, else 0; remembers what the step's figures need."""

    __name__ = "exact"

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.mean, self.response_tokens = 0.0, 0

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], label: list[str], **_: Any
    ) -> list[float]:
        rewards = [
            float(text == gold and ids[-1] == self.eos_token_id)
            for text, ids, gold in zip(completions, completion_ids, label, strict=True)
        ]
        self.mean = sum(rewards) / len(rewards)
        self.response_tokens = sum(map(len, completion_ids))
        return rewards


class StepCallback(TrainerCallback):
    """Starts the stopwatch with the training loop and ends a step where the trainer does."""

    def __init__(self, watch: Stopwatch, reward: ExactReward) -> None:
        self.watch, self.reward = watch, reward

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.end_step(self.reward.mean, self.reward.response_tokens)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a stopwatch around its rollout: prompts, generation, rewards, advantages."""

    watch: Stopwatch

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.watch.rollout():
            return super()._generate_and_score_completions(inputs)


def arguments(settings: dict[str, Any], steps: int, scratch: Path) -> GRPOConfig:
    """GRPO as the quickstart does it: no reference model, clip-higher, token mean, one update per rollout."""
    batch = settings["rollout_batch_size"] * settings["n_samples_per_prompt"]
    return GRPOConfig(
        output_dir=str(scratch),
        use_cpu=True,
        bf16=False,
        seed=settings["seed"],
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=settings["n_samples_per_prompt"],
        max_completion_length=settings["max_response_len"],
        temperature=settings["temperature"],
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        epsilon=settings["eps_clip"],
        epsilon_high=settings["eps_clip_high"],
        loss_type="dapo",
        scale_rewards="group",
        router_aux_loss_coef=0.0,
        learning_rate=settings["lr"],
        max_grad_norm=settings["clip_grad"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def optimizer(
    model: torch.nn.Module, settings: dict[str, Any]
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Fused AdamW and the linear warm-up of the miles run."""
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    warmup = settings["warmup"]
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda update: min(1.0, (update + 1) / warmup))
    return adam, schedule


def train(inputs: dict[str, Any], steps: int, scratch: Path, watch: Stopwatch) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = inputs["settings"]
    rows = [json.loads(line) for line in Path(inputs["prompts"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(inputs["checkpoint"])
    assert tokenizer([row["prompt"] for row in rows])["input_ids"] == [row["token_ids"] for row in rows]
    model = AutoModelForCausalLM.from_pretrained(
        inputs["checkpoint"], dtype=torch.float32, experts_implementation="grouped_mm"
    )
    reward = ExactReward(tokenizer.eos_token_id)
    TimedTrainer.watch = watch
    trainer = TimedTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(settings, steps, scratch),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "label": r["label"]} for r in rows]),
        processing_class=tokenizer,
        callbacks=[StepCallback(watch, reward)],
        optimizers=optimizer(model, settings),
    )
    trainer.train()
    assert len(watch.steps) == steps
    modules = {"trl": trl, "transformers": transformers, "accelerate": accelerate, "torch": torch}
    versions = {name: module.__version__ for name, module in modules.items()}
    return watch.result(versions | {"threads": str(torch.get_num_threads())})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--spawned", type=float, required=True)
    options = parser.parse_args()
    inputs = json.loads(options.inputs.read_text())
    result = train(inputs, options.steps, options.scratch, Stopwatch(options.spawned))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
