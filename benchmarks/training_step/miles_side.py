"""miles' side: `NativeTrainer.train_step`, as a run calls it, its checks and measurements included.

Routes are decided, as transformers decides them, and not replayed. `--layout whole` trains the step in one
micro-batch, `budget` in micro-batches of TOKEN_BUDGET rows.
"""

from __future__ import annotations

import numpy as np
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.policy_objective import ClipRange
from miles.arch import load_spec
from miles.data.batch import TrainBatch
from miles.models.allocator import keep_freed_memory
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings
from miles.weights.hf import read_hf
from training_step import common
from training_step.workloads import TOKEN_BUDGET


def train_batch(batch: dict[str, np.ndarray]) -> TrainBatch:
    """The step's samples as a run packs them, with the advantages and old log-probs of the file."""
    ends = np.cumsum(batch["lengths"])
    samples = list(zip(ends - batch["lengths"], ends, batch["prompt_lengths"], strict=True))
    texts = [batch["tokens"][begin:end] for begin, end, _ in samples]
    rows = batch["lengths"] - 1
    mask = np.concatenate(
        [np.r_[np.zeros(p - 1), np.ones(end - begin - p)] for begin, end, p in samples]
    ).astype(np.float32)
    old = np.full(len(mask), np.nan, np.float32)
    old[mask > 0] = batch["old_log_probs"]
    return TrainBatch(
        tokens=np.concatenate([text[:-1] for text in texts]),
        targets=np.concatenate([text[1:] for text in texts]),
        positions=np.concatenate([np.arange(n) for n in rows]),
        cu_seqlens=np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        loss_mask=mask,
        rollout_log_probs=old,
        rewards=batch["advantages"],
        response_lengths=(batch["lengths"] - batch["prompt_lengths"]).astype(np.int32),
        sample_index=np.arange(len(rows)),
        group_index=batch["groups"],
        rollout_ids=np.arange(len(rows)),
        advantages=np.repeat(batch["advantages"], rows),
        old_log_probs=old,
    )


def settings(layout: str) -> TrainerSettings:
    return TrainerSettings(
        optimizer=OptimizerSettings(
            lr=common.LEARNING_RATE,
            adam_beta1=common.BETAS[0],
            adam_beta2=common.BETAS[1],
            adam_eps=common.EPS,
            clip_grad=common.CLIP_GRAD,
        ),
        algorithm=AlgorithmSettings(
            calculate_per_token_loss=True,
            policy=PolicyLossSettings(clip=ClipRange(common.EPS_CLIP, common.EPS_CLIP_HIGH)),
        ),
        max_tokens_per_micro_batch=TOKEN_BUDGET if layout == "budget" else None,
    )


def main() -> None:
    options = common.arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    trainer = NativeTrainer(load_spec(options.checkpoint), settings(options.layout))
    trainer.load_weights(read_hf(options.checkpoint))
    batch = train_batch(common.read_batch(options.batch))

    def step() -> tuple[float, float]:
        metrics = trainer.train_step(batch).metrics
        return metrics["train/loss"], metrics["train/grad_norm"]

    common.measure(step, options.steps)


if __name__ == "__main__":
    main()
