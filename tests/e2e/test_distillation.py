"""On-policy distillation in a whole run: a student without any reward comes nearer to its teacher."""

from __future__ import annotations

from statistics import fmean

import pytest
from e2e_support import SMALL, Cli

from miles.record import RunReader

pytestmark = pytest.mark.slow

KL = "rollout/opd_reverse_kl"


def test_the_divergence_from_the_teacher_falls(cli: Cli) -> None:
    taught = cli("train", *SMALL, "--num-rollout", "12", "--lr", "1e-3", "--save-interval", "12")
    assert taught.returncode == 0, taught.stderr
    first = cli.only_run()
    teacher = first / "checkpoints" / "step-000012" / "trainer" / "model"
    words = ("--use-opd", "--opd-teacher-load", str(teacher), "--set", "reward.rm_type=default")
    # Without a verifier there is nothing to evaluate by.
    small = (*SMALL[: SMALL.index("--eval-prompt-data")], "--set", "eval.eval_prompt_data=default")
    done = cli("train", *small, *words, "--num-rollout", "12", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    (run,) = [path for path in cli.runs.iterdir() if path.is_dir() and path != first]
    reader = RunReader(run)
    divergence = reader.series(KL).values
    assert divergence[0] > 0.01, "the teacher is another model"
    assert fmean(divergence[-3:]) < 0.6 * fmean(divergence[:3])
    assert set(reader.series("rollout/raw_reward").values) == {0.0}
