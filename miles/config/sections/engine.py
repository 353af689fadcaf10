"""`[engine]`: number and limits of engines (SGLang's own settings are in `[sglang]`)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from miles.config.sections.base import Section


class EngineSection(Section):
    """Engines, native ones and SGLang servers."""

    num_engines: PositiveInt = 1
    """Engines, each in a process of its own; prompts are spread over them."""

    max_running_requests: PositiveInt = 256
    """Samples decoded at once; the others wait."""

    server_python: str | None = None
    """Python of the environment that runs SGLang servers; default: `.venv-sglang` (`make sglang-cpu`), else
    the environment of miles where SGLang is installed in it."""

    decode_kernel: Literal["auto", "torch", "fused"] = "auto"
    """What decodes: `fused`, a kernel compiled on first use, or `torch`. `auto` takes the kernel where there
    is a compiler and the engine runs in fp32 on one CPU thread; with exact numerics where the training
    kernel is taken too. The two round differently: a run with one is not repeated bit for bit by a run with
    the other."""
