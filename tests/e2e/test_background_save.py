"""`--async-save`: the run goes on while its checkpoints are written, and a kill costs no more than one."""

from __future__ import annotations

import preloaded
import pytest
from e2e_support import NAMING_A_CHECKPOINT, Cli, metrics_of

from miles.orchestration.checkpoints import CheckpointStore
from miles.record import RunReader

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow

ARGUMENTS = (
    *("train", "--profile", "quickstart", "--train-backend", "megatron", "--num-rollout", "5"),
    *("--rollout-batch-size", "8", "--n-samples-per-prompt", "4", "--skip-eval-before-train"),
    *("--eval-prompt-data", "sort", "builtin:sort/test@[0:8]"),
    *("--ckpt-format", "torch_dist", "--async-save", "--save-interval", "2"),
)


def test_a_run_killed_while_its_checkpoint_is_on_its_way_resumes_exactly(cli: Cli, tmp_path) -> None:
    cli.imported = preloaded.MEGATRON_RUNS
    whole = Cli(cli.cache, tmp_path / "whole", imported=cli.imported)
    done = whole(*ARGUMENTS)
    assert done.returncode == 0, done.stderr
    told = RunReader(whole.only_run()).events("checkpoint")
    assert [event["step"] for event in told] == [2, 4, 5]
    assert all(event["blocked_s"] > 0 and event["background_s"] > 0 for event in told)
    assert CheckpointStore(whole.only_run() / "checkpoints").latest_step() == 5

    process = cli.start_until(preloaded.Pause(*NAMING_A_CHECKPOINT, call=2), *ARGUMENTS)
    assert len(list(cli.only_run().glob("checkpoints/.partial-step-000004-*"))) == 1
    cli.kill(process)
    store = CheckpointStore(cli.only_run() / "checkpoints")
    assert store.latest_step() == 2 and store.load_state(store.at_step(2)).step == 2
    resumed = cli("runs", "resume", str(cli.only_run()))
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(cli.only_run()) == metrics_of(whole.only_run())
    assert not list((cli.only_run() / "checkpoints").glob(".partial-*"))
