"""Weights that a source lacks: new MTP layers."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from miles.models.mtp import MtpDraft
from miles.weights.convert.plan import Conversion
from miles.weights.hf import TORCH_DTYPES
from miles.weights.native_map import mtp_to_published


class FreshWeights:
    """Random matrices ~ N(0, initializer_range²), norms 1; made when the first one is asked for."""

    def __init__(self, plan: Conversion) -> None:
        self._plan = plan
        self._made: dict[str, Tensor] = {}
        self._guard = threading.Lock()

    def __call__(self, name: str) -> Tensor:
        with self._guard:
            if not self._made:
                spec = self._plan.spec
                draft = MtpDraft(spec, TORCH_DTYPES[spec.dtype])
                draft.init_weights(torch.Generator().manual_seed(self._plan.wanted.seed))
                self._made = dict(mtp_to_published(draft))
            return self._made[name]
