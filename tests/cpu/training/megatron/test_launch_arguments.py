"""Cluster profiles tell Megatron and SGLang exactly what their golden files say.

Megatron's settings pass through megatron-core's own dataclasses, so that no field name can drift.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cpu.training.megatron.launch_arguments import (
    ENGINE_VERSION,
    GOLDEN,
    HARDWARE,
    arguments,
    cluster_profiles,
)

REPOSITORY = Path(__file__).parents[4]


@pytest.mark.parametrize("profile", cluster_profiles())
def test_a_cluster_profile_has_its_golden_arguments(profile: str) -> None:
    kept = (GOLDEN / f"{profile}.txt").read_text(encoding="utf-8")
    assert arguments(profile) == kept, "write them anew with launch_arguments.py, and look at the difference"


def test_there_is_one_file_for_each_cluster_profile() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(cluster_profiles()) == set(HARDWARE)


def test_transformer_engine_is_that_of_the_image() -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(ENGINE_VERSION)}\b", dockerfile)
