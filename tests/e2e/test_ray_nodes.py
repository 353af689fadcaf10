"""A run over two Ray nodes on one machine, and what losing one of them means."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from e2e_support import EVEN, PATIENCE_S, SMALL, Cli, metrics_of, summary_of
from namespace import own_network
from test_ray_cluster import REPOSITORY, standing_head

from miles.errors import Unavailable
from miles.record import RunReader
from miles.rollout.sglang.server import free_ports

pytestmark = [pytest.mark.scale, pytest.mark.usefixtures("network_namespaces")]

WAITING_JUDGE = """
import time
from pathlib import Path

calls = 0

def judge(args, sample):
    global calls
    calls += 1
    # The untrained policy is judged on 32 prompts in two ways, a step has 32 samples: in step 4.
    while calls > 2 * 32 + 3 * 32 + 16 and not Path("{go_on}").exists():
        time.sleep(0.02)
    return float(sample.response == sample.label and sample.status.value == "completed")
"""
"""The exact reward, which goes on in step 4 once that file is there."""
CPUS = 2
"""Of each node. The run needs four: driver 1, trainer 1, engine 1, reward worker 1."""


@dataclass
class Nodes:
    """A head and the nodes that join it, each a process of its own."""

    environment: dict[str, str]
    gcs: str
    url: str
    logs: Path
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ray(self, name: str, **options: object) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block"]
        words = [
            f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
            for key, value in options.items()
        ]
        with (self.logs / name).open("w") as out:
            return subprocess.Popen(
                [*command, *words], env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def join(self) -> None:
        """Add a node and wait until the cluster has it."""
        name = f"node-{len(self.others)}"
        (agent,) = free_ports(1)
        size = {
            # Two nodes of one address are one node to Ray's driver.
            "node_ip_address": f"127.0.0.{2 + len(self.others)}",
            "num_cpus": CPUS,
            "num_gpus": 0,
            "object_store_memory": 100 << 20,
            "dashboard_agent_listen_port": agent,
            "min_worker_port": 0,
            "max_worker_port": 0,
        }
        self.others.append(self.ray(name, address=self.gcs, **size))
        self.wait_for(1 + sum(node.poll() is None for node in self.others), self.logs / name)

    def wait_for(self, count: int, log: Path) -> None:
        from miles.planning.facts import cluster

        patch = pytest.MonkeyPatch()
        patch.setenv("RAY_AUTH_TOKEN", self.environment["RAY_AUTH_TOKEN"])
        deadline = time.monotonic() + PATIENCE_S

        def there() -> bool:
            with suppress(Unavailable):  # The head is busy with the new node.
                return cluster.read_cluster(self.url).cpus == CPUS * count
            return False

        while not there():
            assert time.monotonic() < deadline and self.others[-1].poll() is None, log.read_text()
            time.sleep(0.5)
        patch.undo()

    def remove_last(self) -> set[int]:
        """Take a node away at once, with everything that runs there: the ids of those processes."""
        node = psutil.Process(self.others[-1].pid)
        family = (*node.children(recursive=True), node)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        self.others[-1].wait(timeout=PATIENCE_S)
        return {member.pid for member in family}


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    """Skips, before anything is started, where this machine allows none."""
    with own_network():
        pass


@pytest.fixture
def nodes(shared_cache: Path, uninterrupted: Path, tmp_path: Path) -> Iterator[Nodes]:
    with own_network():
        yield from cluster_of_two(shared_cache, tmp_path)


def cluster_of_two(shared_cache: Path, tmp_path: Path) -> Iterator[Nodes]:
    token = secrets.token_hex(24)
    environment = EVEN | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without it Ray keeps to one node; with it, it listens on every interface of this network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "MILES_CACHE_DIR": str(shared_cache),
        "OMP_NUM_THREADS": "1",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": CPUS,
        "num-gpus": 0,
        "object-store-memory": 100 << 20,
        "temp-dir": f"/tmp/mn-{os.getpid()}",
    }
    with standing_head(environment, options, tmp_path / "head-log") as (url, gcs):
        cluster = Nodes(environment, gcs, url, tmp_path)
        try:
            cluster.join()
            yield cluster
        finally:
            for process in cluster.others:
                if process.poll() is None:
                    process.terminate()
                    process.wait(timeout=PATIENCE_S)


@pytest.fixture
def cli(nodes: Nodes, shared_cache: Path, tmp_path: Path) -> Iterator[Cli]:
    @dataclass
    class TokenCli(Cli):
        @property
        def environment(self) -> dict[str, str]:
            return super().environment | {"RAY_AUTH_TOKEN": nodes.environment["RAY_AUTH_TOKEN"]}

    instance = TokenCli(shared_cache, tmp_path / "runs", in_own_network=True)
    yield instance
    instance.kill_leftovers()


def last_step(cli: Cli) -> int:
    return max((RunReader(run).history.last_step or 0 for run in cli.runs.glob("*-*")), default=0)


def workers_among(run: Path, pids: set[int]) -> set[str]:
    """The workers of a run whose processes are among these."""
    started = RunReader(run).events("worker_start")
    return {event["worker"] for event in started if event["pid"] in pids}


def test_a_run_over_two_nodes_survives_the_loss_of_one(
    cli: Cli, nodes: Nodes, uninterrupted: Path, tmp_path: Path
) -> None:
    """It is the local run, its trainer and engine on two nodes; without the second it waits for another."""
    judge, go_on = tmp_path / "judge.py", tmp_path / "go-on"
    judge.write_text(WAITING_JUDGE.format(go_on=go_on))
    spread = ("--placement-strategy", "SPREAD", "--custom-rm-path", f"{judge}:judge")
    process = cli.start("train", *SMALL, "--address", nodes.url, *spread)
    cli.wait_until(lambda: last_step(cli) == 3, process)
    run = cli.only_run()
    there = workers_among(run, nodes.remove_last())
    go_on.touch()
    assert len(there & {"trainer-0", "engine-0"}) == 1
    lost = RunReader(run)

    def told() -> bool:
        lost.poll()
        return bool(lost.events("node_lost"))

    cli.wait_until(told, process)
    assert there == set(lost.events("node_lost")[0]["workers"])
    nodes.join()
    _, stderr = cli.outcome(process)
    assert process.returncode == 0, stderr
    assert "lost: the node" in stderr and "restarted: " in stderr
    assert metrics_of(run) == metrics_of(uninterrupted)


def test_without_a_successor_the_run_ends_clean_and_can_be_resumed(cli: Cli, nodes: Nodes) -> None:
    wait = ("--worker-start-timeout", "90")
    process = cli.start("train", *SMALL, "--num-rollout", "200", "--address", nodes.url, *wait)
    cli.wait_until(lambda: last_step(cli) >= 4, process)
    nodes.remove_last()
    _, stderr = cli.outcome(process)
    run = cli.only_run()
    assert process.returncode == 1, stderr
    assert "no room for" in stderr and "nodes left: 1" in stderr and "runs resume" in stderr
    assert "Traceback" not in stderr
    assert summary_of(run)["status"] == "failed"
    assert (run / "checkpoints" / "step-000003").is_dir()
