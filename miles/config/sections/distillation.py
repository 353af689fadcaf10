"""`[distillation]`: on-policy distillation from a teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from miles.config.sections.base import Section, Strings


class DistillationSection(Section):
    """Teachers and the weight of their advice."""

    use_opd: bool = False
    """Add the reverse KL to a teacher to the advantages."""

    opd_type: Literal["native", "sglang", "megatron"] | None = None
    """Where the teacher runs."""

    opd_kl_coef: NonNegativeFloat = 1.0
    """Weight of the reverse KL."""

    opd_teacher_load: str | None = None
    """Checkpoint of a teacher beside the trainer."""

    opd_teacher_urls: Strings = ()
    """Addresses of served teachers; `name=url` routes by the sample's metadata."""

    opd_teacher_key: str = "opd_teacher"
    """Entry of the sample's metadata that names its teacher."""
