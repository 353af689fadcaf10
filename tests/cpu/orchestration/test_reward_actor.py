"""A reward worker judges without torch: there may be many on a machine, and each starts by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from miles.record import RunLayout

JUDGES = """
import asyncio, json, os, sys
from pathlib import Path
from miles.config import parse_flags, resolve
from miles.data.sample import Sample, SampleStatus
from miles.orchestration.checkpoint_sources import CheckpointSource
from miles.orchestration.job import Job
from miles.orchestration.posts import Post
from miles.orchestration.reward_actor import RewardActor
from miles.planning import make_plan
from miles.planning.facts import collect_facts
from ray import cloudpickle

run = resolve("quickstart", flags=parse_flags(["--executor", "ray"]))
job = Job(run, make_plan(run, collect_facts(run.config)), CheckpointSource(Path("none")), Path(sys.argv[1]))
post = cloudpickle.loads(cloudpickle.dumps(Post("reward-0", job, os.getcwd())))
told = os.dup(1)
actor = RewardActor(post)
ended = {"label": "12", "status": SampleStatus.COMPLETED}
answers = [Sample("sort 21=", response=said, **ended) for said in ("12", "21")]
judged, failed = asyncio.run(actor.score(answers, evaluation=False))
print("into the log", flush=True)
rewards = [sample.reward for sample in judged]
os.write(told, json.dumps([rewards, failed, "torch" in sys.modules]).encode())
"""


def test_it_scores_and_records_and_never_loads_torch(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", JUDGES, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1.0, 0.0], [], False]
    layout = RunLayout(tmp_path)
    assert "into the log" in (layout.logs_dir / "reward-0.log").read_text()
    assert '"worker_start"' in (layout.events_dir / "reward-0.jsonl").read_text()
