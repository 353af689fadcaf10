"""The plan of a run on GPUs as text: placement, layout, and the memory of each phase with its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from miles.planning.memory import MemoryPart
from miles.planning.outline import Outline
from miles.planning.phases import PhaseMemory
from miles_cli.units import binary_bytes, count

LABEL_WIDTH = 10


def outline_lines(outline: Outline) -> Iterator[str]:
    """The outline in lines, without colour."""
    scale = outline.scale
    yield line(
        "model",
        f"{outline.model} · {outline.parameters:,} parameters ({outline.active_parameters:,} active) · "
        f"{outline.dtype}, engine {scale.rollout_format}",
    )
    yield line("hardware", str(scale.hardware))
    yield from placement_lines(outline)
    yield line("layout", str(scale.layout))
    if not scale.problems:
        yield from _layout_lines(outline)
    for phase in scale.phases:
        yield from phase_lines(phase, scale.gpu_bytes)
    if scale.host:
        total = sum(part.bytes for part in scale.host)
        yield line("host", f"{binary_bytes(total)} of host memory per trainer node")
        yield from part_lines(scale.host)
    if scale.exports:
        yield line("exports", " ".join(f"{name}={value}" for name, value in scale.exports))


def placement_lines(outline: Outline) -> Iterator[str]:
    """How the GPUs are dealt out."""
    placement = outline.scale.placement
    shared = ", which take turns" if placement.colocate else ""
    yield line(
        "placement",
        f"{placement.arithmetic} GPUs: {outline.trainer} trainer, {outline.engine} engines{shared}",
    )
    if placement.engines:
        gpus = count(placement.gpus_per_engine, "GPU")
        yield line("", f"{count(placement.engines, 'engine')} of {gpus} each")


def _layout_lines(outline: Outline) -> Iterator[str]:
    layout = outline.scale.layout
    share, rest = divmod(outline.samples_per_step, layout.dp)
    if rest == 0:
        yield line(
            "",
            f"{outline.samples_per_step} samples a step = {layout.dp} x {share} · at most "
            f"{outline.max_context_len:,} tokens each",
        )


def phase_lines(phase: PhaseMemory, gpu_bytes: int) -> Iterator[str]:
    """One phase: its sum against the GPU, and its parts."""
    share = f" of {binary_bytes(gpu_bytes)} ({phase.total_bytes / gpu_bytes:.0%})" if gpu_bytes else ""
    yield line("memory", f"{phase.name}: {binary_bytes(phase.total_bytes)}{share} per {phase.role}")
    yield from part_lines(phase.parts)


def part_lines(parts: Iterable[MemoryPart]) -> Iterator[str]:
    """Parts with their formulas."""
    for part in parts:
        yield line("", f"{binary_bytes(part.bytes):>10}  {part.name} = {part.formula}")


def line(label: str, text: str) -> str:
    """A line with its label."""
    return f"{label:<{LABEL_WIDTH}}{text}"
