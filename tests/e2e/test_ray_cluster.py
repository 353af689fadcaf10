"""Submission to a running cluster: a real head, real jobs, and their record on the launching machine."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from e2e_support import EVEN, PATIENCE_S, SMALL, Cli, metrics_of, summary_of

from miles.record import RunReader
from miles.rollout.sglang.server import free_ports

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
STARTS = 5
"""Of a head, until the tests give up."""
CPUS = 5
LONG = (*SMALL, "--num-rollout", "400", "--save-interval", "400", "--skip-eval-before-train")


@dataclass
class ClusterCli(Cli):
    """`miles` as on a machine that knows the cluster's token; `kept_apart`: it shares no files with it."""

    token: str = ""
    kept_apart: bool = field(default=False)

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"RAY_AUTH_TOKEN": self.token}

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """`miles train`, where the launcher may be told to keep its files to itself."""
        if not self.kept_apart:
            return self.start("train", *arguments)
        program = (
            "import sys\n"
            "from miles.orchestration import submission\n"
            "submit = submission.submit\n"
            "submission.submit = lambda *a: submit(*a, share_files=False)\n"
            "from miles_cli.main import main\n"
            "sys.argv[1:1] = ['train']\n"
            "main()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process


@dataclass(frozen=True)
class Head:
    """A Ray head on loopback, with a token."""

    url: str
    token: str
    runs: Path
    """Where jobs that share no files keep their runs."""


@pytest.fixture(scope="module")
def head(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One head for all tests of this module, ended by its own process."""
    runs, token = tmp_path_factory.mktemp("cluster-runs"), secrets.token_hex(24)
    environment = EVEN | {
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        "HOME": str(tmp_path_factory.mktemp("cluster-home")),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "MILES_RUNS_DIR": str(runs),
        "MILES_CACHE_DIR": str(shared_cache),
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "dashboard-host": "127.0.0.1",
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": CPUS,
        "num-gpus": 0,
        "object-store-memory": 200 << 20,
        "temp-dir": f"/tmp/mt-{os.getpid()}",
    }
    with standing_head(environment, options, tmp_path_factory.mktemp("head") / "log") as (url, _):
        yield Head(url, token, runs)


@contextmanager
def standing_head(
    environment: Mapping[str, str], options: Mapping[str, object], log: Path
) -> Iterator[tuple[str, str]]:
    """A head that stands, until the block ends: its URL and the address that nodes join at.

    Ray's client server, which nobody uses here, waits 30 s for the node; on a busy machine the head ends with
    it, and is started again.
    """
    for _ in range(STARTS):
        gcs, dashboard, client, agent = free_ports(4)
        ports = {"port": gcs, "dashboard-port": dashboard, "ray-client-server-port": client}
        words = [f"--{name}={value}" for name, value in {**options, **ports}.items()]
        words.append(f"--dashboard-agent-listen-port={agent}")
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(BINARIES / "ray"), "start", "--head", "--block", *words],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        url = f"http://127.0.0.1:{dashboard}"
        try:
            if stands(url, environment["RAY_AUTH_TOKEN"], client, process, log):
                yield url, f"127.0.0.1:{gcs}"
                return
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE_S)
    raise AssertionError(log.read_text())


def stands(url: str, token: str, client: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until every server of a head listens; False: it ended."""
    from miles.errors import Unavailable
    from miles.planning.facts import cluster

    deadline = time.monotonic() + PATIENCE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", token)
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            with suppress(Unavailable, OSError):
                cluster.read_cluster(url)
                socket.create_connection(("127.0.0.1", client), PATIENCE_S).close()
                return True
            time.sleep(0.3)
    return False


@pytest.fixture
def cli(head: Head, shared_cache: Path, tmp_path: Path) -> Iterator[ClusterCli]:
    instance = ClusterCli(shared_cache, tmp_path / "runs", token=head.token)
    yield instance
    instance.kill_leftovers()


def steps_recorded(cli: Cli) -> int:
    return max((RunReader(run).history.last_step or 0 for run in cli.runs.glob("*-*")), default=0)


def test_a_submitted_run_is_the_local_run(cli: ClusterCli, head: Head, uninterrupted: Path) -> None:
    done = cli("train", *SMALL, "--address", head.url)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert "step 12/12" in done.stdout and "finished: 12 steps" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "pid=" not in done.stderr
    submission = json.loads((run / "meta.json").read_text())["submission"]
    assert submission["address"] == head.url and submission["id"] == run.name and submission["shared"]


def test_a_failed_job_brings_back_its_exit_code_and_its_error(
    cli: ClusterCli, head: Head, tmp_path: Path
) -> None:
    hook = tmp_path / "judge.py"
    hook.write_text("def judge(args, sample):\n    return 1 / 0\n")
    options = ("--custom-rm-path", f"{hook}:judge", "--skip-eval-before-train")
    done = cli("train", *SMALL, *options, "--address", head.url)
    assert done.returncode == 1, done.stderr
    assert "judge.py:2" in done.stderr and "division by zero" in done.stderr
    assert "Traceback" not in done.stderr
    assert summary_of(cli.only_run())["status"] == "failed"


def test_without_shared_files_the_record_is_mirrored_stopped_and_resumed(cli: ClusterCli, head: Head) -> None:
    cli.kept_apart = True
    process = cli.submit(*LONG, "--address", head.url)
    cli.wait_until(lambda: steps_recorded(cli) >= 5, process)
    run = cli.only_run()
    listed = cli("runs", "ls", "--json")
    assert [row["status"] for row in json.loads(listed.stdout)] == ["running"]
    assert cli("runs", "show", run.name).returncode == 8

    stopped = cli("runs", "stop", run.name, "--wait")
    assert stopped.returncode == 0 and "interrupted" in stopped.stdout, stopped.stderr
    cli.outcome(process)
    assert process.returncode == 143

    on_cluster = head.runs / run.name
    steps = summary_of(run)["steps"]
    assert 5 <= steps < 400
    assert (on_cluster / "checkpoints" / f"step-{steps:06d}").is_dir(), "a stop saves first"
    assert not list((run / "checkpoints").iterdir())

    more = f"rollout.num_rollout={steps + 3}"
    resumed = cli("runs", "resume", run.name, "--set", more)
    assert resumed.returncode == 0, resumed.stderr
    reader = RunReader(run)
    assert reader.attempt == 2 and reader.history.resumes == {2: steps}
    assert summary_of(run)["steps"] == steps + 3 and summary_of(run)["status"] == "finished"
    for name in ("events/driver.jsonl", "events/engine-0.jsonl", "summary.json"):
        assert (run / name).read_bytes() == (on_cluster / name).read_bytes(), name


def test_a_launcher_that_went_away_is_caught_up_with(cli: ClusterCli, head: Head) -> None:
    cli.kept_apart = True
    process = cli.submit(*SMALL, "--num-rollout", "30", "--address", head.url)
    cli.wait_until(lambda: steps_recorded(cli) >= 1, process)
    process.kill()
    process.wait()
    run = cli.only_run()
    deadline = time.monotonic() + PATIENCE_S
    while cli("runs", "show", run.name).returncode == 8:
        assert time.monotonic() < deadline
    assert summary_of(run)["status"] == "finished" and summary_of(run)["steps"] == 30


def test_a_request_beyond_the_cluster_is_refused_with_the_arithmetic(cli: ClusterCli, head: Head) -> None:
    done = cli("train", *SMALL, "--address", head.url, "--num-engines", "6")
    assert done.returncode == 3 and not cli.runs.exists()
    assert "RAY1" in done.stderr and "engines 6 × 1" in done.stderr and "= 9 CPU" in done.stderr
    assert f"has {CPUS} CPU" in done.stderr and "4 too few" in done.stderr


def test_a_dead_address_is_refused_in_under_five_seconds(cli: ClusterCli) -> None:
    """The quickest of several tries: others may have met a busy machine."""
    (port,) = free_ports(1)
    for _ in range(10):
        began = time.monotonic()
        done = cli("train", *SMALL, "--address", f"http://127.0.0.1:{port}")
        assert done.returncode == 4 and "does not answer" in done.stderr and not cli.runs.exists()
        if time.monotonic() - began < 5:
            return
    raise AssertionError("every try took five seconds")


def test_a_wrong_token_is_refused_before_anything_is_submitted(cli: ClusterCli, head: Head) -> None:
    cli.token = "wrong"
    done = cli("train", *SMALL, "--address", head.url)
    assert done.returncode == 4 and "token" in done.stderr and not cli.runs.exists()
