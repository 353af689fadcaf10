"""Where a token stands: rotary position embedding, and how it is stretched to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Longer contexts by slower rotation: frequencies of wavelengths beyond `original_positions /
    low_freq_factor` are divided by `factor`, those below `original_positions / high_freq_factor` stay, and
    those between are interpolated (Llama 3.1, https://arxiv.org/abs/2407.21783).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Longer contexts by slower rotation: every frequency is divided by `factor`
    (https://arxiv.org/abs/2306.15595).
    """

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Longer contexts by slower rotation: pairs that turn less than `slow_turns` times within
    `original_positions` are slowed by `factor`, those that turn more than `fast_turns` times are not, with a
    ramp between (https://arxiv.org/abs/2309.00071). `mscale`, `mscale_all_dim`: by how much scores grow with
    log(factor), on rotated pairs and on all; 0: not given.
    """

    factor: float
    original_positions: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def magnitude(self) -> float:
        """What rotated pairs are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def score_growth(self) -> float:
        """What the scale of all scores is multiplied with."""
        return self._growth(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None
    width: int | None = None
    """Elements at the start of a head that are rotated; None: all."""
    interleaved: bool = False
    """Whether published weights rotate elements 2 i and 2 i + 1 together; otherwise i and i + width / 2."""
