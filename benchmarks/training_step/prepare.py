"""Writes what both sides read: a checkpoint of random weights, and the step's samples with old log-probs.

Old log-probs are the model's own, moved at random: ratios are not 1, and the loss depends on the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from miles.arch import load_spec
from miles.training.native.trainer import NativeTrainer
from miles.weights.hf import write_hf
from training_step import miles_side
from training_step.workloads import MODELS, WORKLOADS, make_batch

NOISE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = options.directory / "config"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(MODELS[options.model] | {"dtype": "float32"}))
    spec = load_spec(source)
    trainer = NativeTrainer(spec, miles_side.settings("budget"))
    trainer.init_weights(seed=0)
    write_hf(options.directory / "checkpoint", spec, trainer.named_weights(), source_dir=source)
    batch = make_batch(WORKLOADS[options.workload][options.model], spec.vocab_size)
    responses = int((batch["lengths"] - batch["prompt_lengths"]).sum())
    packed = miles_side.train_batch(batch | {"old_log_probs": np.zeros(responses, np.float32)})
    own = trainer.log_probs(packed).log_probs[packed.loss_mask > 0]
    noise = np.random.default_rng(1).normal(0, NOISE, responses)
    np.savez(options.directory / "batch.npz", **batch, old_log_probs=(own + noise).astype(np.float32))


if __name__ == "__main__":
    main()
