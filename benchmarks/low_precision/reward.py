"""What INT4 costs in reward: trained for (QAT), put on afterwards, and not at all.

Runs of the profile `quickstart` through the command line, in one plain type. The policy of the plain run is
also sampled from with its experts rounded to INT4 after training, by a run of one step that moves nothing.
Gap: mean |trainer log-prob - engine log-prob| of the last policy, each side as in its run; the trainer of the
policy that is rounded afterwards is plain.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from low_precision.gap import Case, gap
from miles.arch import load_spec
from miles.arch.precision import NumberFormat
from miles.data.tokenizer import CheckpointTokenizer
from miles.models.numerics import FAST

SEEDS = (42, 43, 44)
STEPS, DTYPE = 24, "bf16"
"""A CPU without bf16 units takes about a second and a half a step."""
INT4 = ("--int4-qat", "--rollout-format", "int4")
FORMAT = NumberFormat("int4")
PLAIN = "plain"
PROMPTS = 16
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


def gap_of(policy: Path, case: Case, dtype: str) -> float:
    """The gap in nats on held-out prompts, in fast numerics."""
    tokenizer, make = CheckpointTokenizer(policy), random.Random(0)
    digits = ["".join(make.choices("0123456789", k=4 + i % 5)) for i in range(PROMPTS)]
    prompts = [list(tokenizer.encode(f"sort {number}=")) for number in digits]
    return gap(load_spec(policy), case, dtype, FAST, prompts, 12, policy)


def of_seed(seed: int, steps: int, dtype: str, scratch: Path) -> dict[str, dict[str, float]]:
    """Rewards by way."""
    common = ("--rollout-seed", str(seed), "--num-rollout", str(steps), "--save-interval", str(steps))
    plain = train((*common, "--skip-eval-before-train"), scratch / f"plain-{seed}", dtype)
    trained = train((*common, *INT4, "--skip-eval-before-train"), scratch / f"qat-{seed}", dtype)
    model = Path("checkpoints") / f"step-{steps:06d}" / "trainer" / "model"
    policy = plain / model
    still = ("--num-rollout", "1", "--lr", "0", "--lr-warmup-iters", "0", "--rollout-seed", str(seed))
    after = train(("--hf-checkpoint", str(policy), *still, *INT4), scratch / f"ptq-{seed}", dtype)
    ways = (
        (PLAIN, held_out(plain, "eval_after"), gap_of(policy, Case("", None, None), dtype)),
        (
            "INT4, trained with QAT",
            held_out(trained, "eval_after"),
            gap_of(trained / model, Case("", FORMAT, FORMAT), dtype),
        ),
        (
            "INT4, put on the plain policy afterwards",
            held_out(after, "eval_before"),
            gap_of(policy, Case("", None, FORMAT), dtype),
        ),
    )
    return {way: rewards | {"gap": nats} for way, rewards, nats in ways}


def measure(
    scratch: Path, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, dtype: str = DTYPE
) -> dict[str, Any]:
    """`dtype`: of everything that is not INT4."""
    found = {seed: of_seed(seed, steps, dtype, scratch) for seed in seeds}
    return {"steps": steps, "dtype": dtype, "seeds": found}


def means(result: dict[str, Any], kind: str) -> dict[str, float]:
    """Mean over the seeds by way."""
    rows = list(result["seeds"].values())
    return {way: fmean(row[way][kind] for row in rows) for way in rows[0]}


def met(result: dict[str, Any]) -> bool:
    """QAT ends within five points of plain, and rounding afterwards has the larger gap."""
    plain, trained, _ = means(result, "sampled").values()
    _, with_qat, without = means(result, "gap").values()
    return plain - trained <= POINTS and without > with_qat


def markdown(result: dict[str, Any]) -> str:
    seeds = result["seeds"]
    lines = [
        f"{result['steps']} steps of `quickstart` in {result['dtype']}; reward on 512 held-out prompts at "
        "the end, sampled at temperature 1; greedy in brackets.",
        "",
        f"| weights of the engine | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | against plain "
        "| gap [nats] |",
        f"|---|{'---:|' * (len(seeds) + 3)}",
    ]
    sampled, greedy, gaps = (means(result, kind) for kind in ("sampled", "greedy", "gap"))
    for way, mean in sampled.items():
        cells = [f"{row[way]['sampled']:.3f} ({row[way]['greedy']:.3f})" for row in seeds.values()]
        against = f"{mean - sampled[PLAIN]:+.3f}"
        cells += [f"{mean:.3f} ({greedy[way]:.3f})", against, f"{gaps[way]:.1e}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    verdict = "met" if met(result) else "missed"
    lines += ["", f"Bar: with QAT within {POINTS:.2f} of plain, and a smaller gap than without: {verdict}."]
    return "\n".join(lines)
