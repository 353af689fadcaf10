from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from miles.arch.spec import ArchSpec
from miles.models.invariance import find_exact_numerics
from miles.models.numerics import ExactNumerics


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def _probe(spec: ArchSpec, dtype: torch.dtype) -> ExactNumerics:
    return find_exact_numerics(spec, dtype)


@pytest.fixture
def exact():
    """The exact numerics of this machine for a model, probed once."""
    torch.set_num_threads(1)
    return _probe
