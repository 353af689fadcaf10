"""PPO on the quickstart's task: the reward rises against a critic, and a run cut off goes on as it was."""

from __future__ import annotations

import pytest
from e2e_support import RECORDING_A_STEP, SMALL, Cli, metrics_of, summary_of
from preloaded import Pause

from miles.record import RunReader

pytestmark = pytest.mark.slow

PPO = ("--advantage-estimator", "ppo", "--critic-lr", "1e-3", "--lambd", "0.95")


BACKENDS = {"native": (), "megatron": ("--train-backend", "megatron")}


def with_backend(backend: str) -> tuple[str, ...]:
    if backend == "megatron":
        pytest.importorskip("megatron.core")
    return BACKENDS[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reward_rises_and_so_does_what_the_critic_foresees(backend: str, cli: Cli) -> None:
    words = ("--num-rollout", "40", "--normalize-advantages", "--skip-eval-before-train")
    done = cli("train", "--profile", "quickstart", *PPO, *words, *with_backend(backend))
    assert done.returncode == 0, done.stderr
    summary, reader = summary_of(cli.only_run()), RunReader(cli.only_run())
    assert summary["reward_last5"] >= 0.75 > 0.5 > summary["reward_first5"]
    assert summary["alerts"] == {"critical": 0, "warning": 0, "info": 0}
    values, returns = reader.series("rollout/values").values, reader.series("rollout/returns").values
    assert values[0] == 0 and abs(values[-1] - returns[-1]) < 0.2
    assert max(reader.series("train/explained_variance").values[-5:]) > 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_killed_resumes_with_the_same_critic(backend: str, cli: Cli) -> None:
    """In its warm-up it is killed, and again behind it; Megatron's with checkpoints in its own form."""
    words = (*SMALL, *PPO, "--num-critic-only-steps", "4", "--num-rollout", "9", *with_backend(backend))
    if backend == "megatron":
        words += ("--ckpt-format", "torch_dist")
    assert cli("train", *words).returncode == 0
    straight = cli.only_run().rename(cli.runs.parent / "straight")
    rows = metrics_of(straight)
    assert "train/loss" not in rows[4] and "train/loss" in rows[5]
    first = cli.start_until(Pause(*RECORDING_A_STEP, call=4), "train", *words)
    cli.kill(first)
    again = ("runs", "resume", str(cli.only_run()))
    second = cli.start_until(Pause(*RECORDING_A_STEP, call=5), *again)
    assert RunReader(cli.only_run()).history.last_step == 7
    cli.kill(second)
    done = cli(*again)
    assert done.returncode == 0, done.stderr
    assert metrics_of(cli.only_run()) == rows


def test_under_ray_a_critic_learns_what_it_learns_inline(cli: Cli) -> None:
    words = (*SMALL, *PPO, "--num-rollout", "4")
    assert cli("train", *words).returncode == 0
    inline = cli.only_run().rename(cli.runs.parent / "inline")
    done = cli("train", *words, "--executor", "ray")
    assert done.returncode == 0, done.stderr
    rows = metrics_of(cli.only_run())
    assert rows == metrics_of(inline)
    assert "train/value_loss" in rows[4]


def test_two_megatron_ranks_under_ray_train_a_critic_as_one_process_does(cli: Cli) -> None:
    words = (*SMALL, *PPO, "--num-rollout", "2", *with_backend("megatron"))
    assert cli("train", *words).returncode == 0
    alone = metrics_of(cli.only_run().rename(cli.runs.parent / "alone"))
    done = cli("train", *words, "--data-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    both = metrics_of(cli.only_run())
    for name in ("train/value_loss", "train/critic_grad_norm", "rollout/returns"):
        assert both[1][name] == pytest.approx(alone[1][name], rel=1e-4), name
    assert both[2]["rollout/values"] == pytest.approx(alone[2]["rollout/values"], abs=1e-3) != 0
