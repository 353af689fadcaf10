"""What INT4 costs in reward: trained for (QAT), put on afterwards, and not at all.

Runs of the profile `quickstart` through the command line, in one plain type. The policy of the plain run is
also sampled from with its experts rounded to INT4 after training, by a run of one step that moves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

SEEDS = (42, 43, 44)
STEPS = 80
INT4 = ("--int4-qat", "--rollout-format", "int4")
PLAIN = "plain"
POINTS = 0.05
"""What INT4 with QAT may lose against plain weights."""


def train(words: tuple[str, ...], runs: Path, dtype: str) -> Path:
    """The directory of a finished run."""
    done = subprocess.run(
        [sys.executable, "-m", "miles_cli", "train", "--profile", "quickstart", "--dtype", dtype, *words],
        env=os.environ | {"MILES_RUNS_DIR": str(runs)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    (run,) = runs.iterdir()
    return run


def held_out(run: Path, moment: str) -> dict[str, float]:
    """Reward on the held-out prompts, `sampled` and `greedy`; moment: `eval_before` or `eval_after`."""
    rewards: dict[str, float] = json.loads((run / "summary.json").read_text())[moment]["sort"]
    return rewards


def of_seed(seed: int, steps: int, dtype: str, scratch: Path) -> dict[str, dict[str, float]]:
    """Rewards by way."""
    common = ("--rollout-seed", str(seed), "--num-rollout", str(steps), "--save-interval", str(steps))
    plain = train((*common, "--skip-eval-before-train"), scratch / f"plain-{seed}", dtype)
    trained = train((*common, *INT4, "--skip-eval-before-train"), scratch / f"qat-{seed}", dtype)
    policy = plain / "checkpoints" / f"step-{steps:06d}" / "trainer" / "model"
    still = ("--num-rollout", "1", "--lr", "0", "--lr-warmup-iters", "0", "--rollout-seed", str(seed))
    after = train(("--hf-checkpoint", str(policy), *still, *INT4), scratch / f"ptq-{seed}", dtype)
    return {
        PLAIN: held_out(plain, "eval_after"),
        "INT4, trained with QAT": held_out(trained, "eval_after"),
        "INT4, put on the plain policy afterwards": held_out(after, "eval_before"),
    }


def measure(
    scratch: Path, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, dtype: str = "fp32"
) -> dict[str, Any]:
    """`dtype`: of everything that is not INT4. A CPU without bf16 units is several times faster in fp32."""
    found = {seed: of_seed(seed, steps, dtype, scratch) for seed in seeds}
    return {"steps": steps, "dtype": dtype, "seeds": found}


def means(result: dict[str, Any], kind: str) -> dict[str, float]:
    """Mean over the seeds by way."""
    rows = list(result["seeds"].values())
    return {way: fmean(row[way][kind] for row in rows) for way in rows[0]}


def met(result: dict[str, Any]) -> bool:
    """QAT ends within five points of plain, and rounding afterwards loses more than QAT."""
    plain, trained, afterwards = means(result, "sampled").values()
    return plain - trained <= POINTS and plain - afterwards > plain - trained


def markdown(result: dict[str, Any]) -> str:
    seeds = result["seeds"]
    lines = [
        f"{result['steps']} steps of `quickstart` in {result['dtype']}; reward on 512 held-out prompts at "
        "the end, sampled at temperature 1; greedy in brackets.",
        "",
        f"| weights of the engine | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | against plain |",
        f"|---|{'---:|' * (len(seeds) + 2)}",
    ]
    sampled, greedy = means(result, "sampled"), means(result, "greedy")
    for way, mean in sampled.items():
        cells = [f"{row[way]['sampled']:.3f} ({row[way]['greedy']:.3f})" for row in seeds.values()]
        cells += [f"{mean:.3f} ({greedy[way]:.3f})", f"{mean - sampled[PLAIN]:+.3f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    verdict = "met" if met(result) else "missed"
    lines += ["", f"Bar: with QAT within {POINTS:.2f} of plain, and closer than without: {verdict}."]
    return "\n".join(lines)
