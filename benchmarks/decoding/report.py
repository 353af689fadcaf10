"""The cells of one model as Markdown, and its place in a page."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from laptop.machine import cores, load, processor

from decoding.measure import Cell
from decoding.models import Subject
from decoding.roofline import MOST_COPIED, bandwidth, flops
from miles._version import __version__


def markdown(subject: Subject, cells: list[Cell], load_before: float) -> str:
    """What was measured on what, and one line per workload."""
    head = (
        "| batch | prompt + response | miles, new tokens/s | of the roof | transformers generate | times "
        "better | its continuous batching | times better | miles, wall | generate, wall |"
    )
    lines = [_provenance(subject, cells, load_before), "", head, "|---:|---:|" + "---:|" * 8]
    return "\n".join(lines + [_row(cell) for cell in cells])


def _provenance(subject: Subject, cells: list[Cell], load_before: float) -> str:
    parameters = subject.spec.num_parameters()
    size = f"{parameters / 1e6:.0f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}K"
    settings = "; ".join(dict.fromkeys(cell.setting for cell in cells))
    kernels = ", ".join(dict.fromkeys(cell.decode_kernel for cell in cells))
    return (
        f"`{subject.name}` ({size} parameters), {time.strftime('%Y-%m-%d')}, {processor()}, {cores()} cores, "
        f"{torch.get_num_threads()} thread(s), Python {platform.python_version()}; miles {__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}. Decode kernel: {kernels}. Best "
        f"settings of generate: {settings}. This machine: {flops() / 1e9:.0f} GFLOP/s fp32, copies at "
        f"{bandwidth(MOST_COPIED) / 1e9:.0f} GB/s. Load before and after: {load_before:.1f}, {load():.1f}."
    )


def _row(cell: Cell) -> str:
    work = cell.workload
    columns = (
        str(work.batch),
        f"{work.prompt} + {work.response}",
        f"{cell.miles:,.0f}",
        f"{cell.miles / cell.ceiling:.0%}",
        f"{cell.generate:,.0f}",
        f"{cell.times_generate:.2f}x",
        "" if cell.continuous is None else f"{cell.continuous:,.0f}",
        "" if cell.times_continuous is None else f"{cell.times_continuous:.1f}x",
        f"{cell.miles_wall:,.0f}",
        f"{cell.generate_wall:,.0f}",
    )
    return f"| {' | '.join(columns)} |"


def write_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of model `name` in `page`."""
    begin, end = f"<!-- engine {name}: begin -->", f"<!-- engine {name}: end -->"
    head, found, rest = page.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
