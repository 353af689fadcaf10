"""The images install what the project pins, and the launch examples resolve as miles would resolve them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from miles.config import parse_flags, resolve

ROOT = Path(__file__).parents[3]
GPU, CPU = ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cpu"
EXAMPLES = sorted((ROOT / "docker/examples").iterdir())


def instructions(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", text))


@pytest.mark.parametrize("image", [GPU, CPU], ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say(image: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    command = [linter, "--config", ROOT / "docker/hadolint.yaml", image]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_gpu_image_pins_what_this_build_was_written_against() -> None:
    found = pins(instructions(GPU))
    versions = tomllib.loads((ROOT / "miles/planning/versions.toml").read_text())
    assert f"=={found['megatron-core']}" == versions["requires"]["megatron-core"]["accepts"]
    assert found["torch"] == pins((ROOT / "constraints.txt").read_text())["torch"]
    assert versions["sglang"]["pins"][found["sglang"]]["torch"] == found["torch"]
    assert found["transformer-engine"]


def test_the_cpu_image_installs_by_the_line_that_make_demo_runs() -> None:
    text = instructions(CPU)
    assert "RUN make install" in text and "pip" not in text
    assert "demo: install" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_launch_line_of_an_example_resolves(example: Path) -> None:
    (line,) = re.findall(r"miles train (.+)", example.read_text())[-1:]
    words = shlex.split(line)
    profile = words[words.index("--profile") + 1]
    rest = [word for word in words if word not in ("--profile", profile)]
    config = resolve(profile, flags=parse_flags(rest)).config
    assert config.cluster.address and config.cluster.actor_num_nodes == 2


def test_the_cluster_asks_for_the_gpus_of_its_profile() -> None:
    cluster: Any = yaml.safe_load((ROOT / "docker/examples/raycluster.yaml").read_text())
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    config = resolve("qwen3-moe-fp8").config.cluster
    assert workers["replicas"] == config.actor_num_nodes
    assert workers["rayStartParams"]["num-gpus"] == str(config.actor_num_gpus_per_node)
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(config.num_gpus_per_node)
    assert container["env"] == cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]


def test_the_slurm_script_is_valid_bash() -> None:
    script = ROOT / "docker/examples/slurm.sbatch"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
