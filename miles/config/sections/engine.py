"""`[engine]`: limits of the native engine (SGLang's own settings are in `[sglang]`)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from miles.config.sections.base import Section


class EngineSection(Section):
    """Capacity of one native engine."""

    num_engines: PositiveInt = 1
    """Native engines, each in a process of its own; prompts are spread over them."""

    max_running_requests: PositiveInt = 256
    """Samples decoded at once; the others wait."""

    decode_kernel: Literal["auto", "torch", "fused"] = "auto"
    """What decodes: `fused`, a kernel compiled on first use, or `torch`. `auto` takes the kernel where there
    is a compiler and the engine runs in fast fp32 on one CPU thread. The two round differently: a run with
    one is not repeated bit for bit by a run with the other."""
