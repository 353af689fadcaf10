"""`miles train --rehearse`: three real steps of a cluster profile, on the CPUs of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_support import Cli, summary_of

from miles.planning.facts.server import ENVIRONMENT
from miles.record import RunReader

pytest.importorskip("megatron.core")

PROFILE = "qwen3-moe-fp8"
PYTHON = Path(__file__).parents[2] / ENVIRONMENT / "bin" / "python"


def rehearsed(cli: Cli, *flags: str, profile: str = PROFILE) -> tuple[Path, dict[str, object]]:
    """The run directory and its plan, once the run has trained three times and can be diagnosed."""
    done = cli("train", "--profile", profile, "--rehearse", *flags)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    assert (summary_of(run)["status"], summary_of(run)["steps"]) == ("finished", 3)
    rows = [row for row in RunReader(run).rows() if row.step]
    assert all(row.metrics["train/grad_norm"] > 0 for row in rows), "backward ran"
    assert all(row.metrics.get("route/replayed_rows_frac", 1) == 1 for row in rows)
    dense = profile == "gemma-3-12b"
    assert ("route/replayed_rows_frac" in rows[0].metrics) != dense, "models with experts"
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["trainer"], plan["executor"], plan["dtype"]) == ("megatron", "ray", "bf16")
    assert cli("diagnose", str(run)).returncode == 0
    return run, plan


@pytest.mark.slow
def test_megatron_rehearses_a_cluster_profile_with_the_native_engine(cli: Cli, tmp_path: Path) -> None:
    nowhere = ("--server-python", str(tmp_path / "no" / "python"))
    _, plan = rehearsed(cli, *nowhere)
    changes = {change["setting"]: change for change in plan["rehearsal"]}  # type: ignore[attr-defined]
    assert plan["engine"] == "native" and plan["rollout_format"] == "fp8"
    assert "make sglang-cpu" in changes["rollout.backend"]["why"]
    assert changes["parallel.pipeline_model_parallel_size"]["old"] == 4


@pytest.mark.slow
def test_megatron_rehearses_a_model_of_windows_over_two_ranks(cli: Cli, tmp_path: Path) -> None:
    nowhere = ("--server-python", str(tmp_path / "no" / "python"))
    run, _ = rehearsed(cli, *nowhere, profile="gemma-3-12b")
    parallel = json.loads((run / "config.json").read_text())["values"]["parallel"]
    assert (parallel["tensor_model_parallel_size"], parallel["sequence_parallel"]) == (2, True)


@pytest.mark.slow
def test_megatron_rehearses_int4_on_both_sides(cli: Cli, tmp_path: Path) -> None:
    nowhere = ("--server-python", str(tmp_path / "no" / "python"))
    run, plan = rehearsed(cli, *nowhere, profile="deepseek-v3-int4-single-node")
    assert (plan["engine"], plan["rollout_format"]) == ("native", "int4")
    rows = [row for row in RunReader(run).rows() if row.step]
    assert all(0.05 < row.metrics["precision/weight_error"] < 0.15 for row in rows), "the trainer rounds too"


@pytest.mark.scale
def test_megatron_rehearses_a_cluster_profile_with_a_real_sglang_server(cli: Cli) -> None:
    if not PYTHON.exists():
        pytest.skip("make sglang-cpu")
    run, plan = rehearsed(cli, "--server-python", str(PYTHON))
    assert plan["engine"] == "sglang"
    assert list((run / "logs").glob("server-*.log"))
