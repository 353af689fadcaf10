"""Faults put in on purpose, so that detection can be tested and shown on a real run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.errors import MilesError
from miles.training.native.tensor_layout import TensorLayout
from miles.training.settings import FaultInjection
from miles.weights.native_map import published_shapes


def inject_gradient_fault(
    fault: FaultInjection, spec: ArchSpec, gradients: Mapping[str, Tensor], layout: TensorLayout
) -> None:
    """Set the first element of one gradient to NaN, in place.

    When the fault names no tensor, the first one of the middle layer is taken.

    Args:
        gradients: the live gradients under native names.
    """
    names = list(published_shapes(spec, gradients))
    name = fault.tensor or next(n for n in names if f".layers.{spec.num_layers // 2}." in n)
    if name not in names:
        raise MilesError(
            f"no gradient is called {name!r}", where="debug.inject_fault", fix="use a published tensor name"
        )
    layout.set_first_element(spec, gradients, name, math.nan)
