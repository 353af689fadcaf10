"""What both sides share: the optimizer's numbers, the clock around steps, the line they print."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from laptop.stopwatch import Span

LEARNING_RATE, BETAS, EPS, CLIP_GRAD = 1e-4, (0.9, 0.99), 1e-8, 1.0
EPS_CLIP, EPS_CLIP_HIGH = 0.2, 0.28
WARM_STEPS = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--layout", default="")
    return parser.parse_args()


def read_batch(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def rss_mb() -> float:
    """Memory that this process holds now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def peak_mb() -> float:
    """The most that it ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(step: Callable[[], tuple[float, float]], steps: int) -> None:
    """Run warm-up and `steps` steps of (loss, gradient norm), and print what they took as one JSON line.

    `growth_mb`: how far the steps lifted memory above what the process with its loaded model held.
    """
    loaded = rss_mb()
    spans, losses, norms = [], [], []
    for _ in range(WARM_STEPS + steps):
        begin = Span.now()
        loss, norm = step()
        spans.append(Span.now() - begin)
        losses.append(loss)
        norms.append(norm)
    result: dict[str, Any] = {
        "cpu": [span.cpu for span in spans[WARM_STEPS:]],
        "wall": [span.wall for span in spans[WARM_STEPS:]],
        "losses": losses,
        "norms": norms,
        "peak_mb": peak_mb(),
        "growth_mb": peak_mb() - loaded,
    }
    json.dump(result, sys.stdout)
