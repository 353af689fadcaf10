"""Long prompts first: what it saves when a rollout has more samples than the engine has slots.

    python benchmarks/stragglers.py [--groups 16] [--slots 64] [--rounds 4]

Groups of 8 on the quickstart's model, lengths drawn twice per prompt (log-normal, median about 30 tokens, the
given correlation inside a prompt): the first draw is what the length book knows, the second is generated.
Both orders in turn, in one process; the ratios are longest first over arrival order, medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch
from decoding.models import QUICKSTART

from miles.arch import spec_from_hf_config
from miles.models.decoder import Decoder
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine

GROUP, MEAN, SIGMA, LONGEST = 8, 40.0, 0.8, 240


def draw_lengths(rng: np.random.Generator, shared: np.ndarray, correlation: float) -> np.ndarray:
    """Lengths [groups, GROUP]; `shared` [groups, 1] is what the samples of a prompt have in common."""
    own = rng.normal(size=(len(shared), GROUP))
    z = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return np.clip(np.round(MEAN * np.exp(SIGMA * z - SIGMA**2 / 2)), 1, LONGEST).astype(int)


async def generate(
    decoder: Decoder, lengths: np.ndarray, order: Sequence[int], slots: int
) -> tuple[float, float]:
    """(processor seconds, decode steps) of one rollout."""
    settings = EngineSettings(max_context_len=256, seed=0, max_running_requests=slots)
    engine = NativeEngine(decoder.spec, settings)
    await engine.share_weights(decoder, version=0)
    started = time.process_time()
    calls = [
        [
            GenerateRequest(
                input_ids=[group % 50 + 1, 5, 6, 7],
                sampling=SamplingParams(max_new_tokens=int(length)),
                sample_key=group * GROUP + member,
                group=group,
            )
            for member, length in enumerate(lengths[group])
        ]
        for group in order
    ]
    await asyncio.gather(*(engine.generate(call) for call in calls))
    return time.process_time() - started, engine.metrics()["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoder = Decoder(spec_from_hf_config(QUICKSTART))
    decoder.init_weights(torch.Generator().manual_seed(0))
    decoder.requires_grad_(False)
    rng = np.random.default_rng(0)
    for correlation in (0.3, 0.7):
        seconds, steps = [], []
        for _ in range(options.rounds):
            shared = rng.normal(size=(options.groups, 1))
            known, actual = (draw_lengths(rng, shared, correlation) for _ in range(2))
            longest = np.argsort(-known.mean(axis=1), kind="stable").tolist()
            usual = asyncio.run(generate(decoder, actual, range(options.groups), options.slots))
            first = asyncio.run(generate(decoder, actual, longest, options.slots))
            seconds.append(first[0] / usual[0])
            steps.append(first[1] / usual[1])
        ratios = f"processor seconds x {median(seconds):.3f}, steps x {median(steps):.3f}"
        print(f"correlation {correlation}: {ratios}")


if __name__ == "__main__":
    main()
