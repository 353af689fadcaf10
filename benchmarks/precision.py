"""The number formats on a CPU: each cast beside torch's own, the gap between both sides, the reward reached.

    python benchmarks/precision.py [--part casts gap reward] --write docs/benchmarks.md

`gap`, `reward`: see `low_precision/`. Of the casts: Error: ||rounded - exact|| / ||exact|| in fp32, of
Gaussian weights and of weights of which one in a thousand is ten times larger. Speed: processor nanoseconds
a weight, one thread, the least of several turns taken in rotation. Memory: what a process holds beyond the
weights and the result while it rounds them (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laptop.machine import cores, load, processor
from laptop.page import write_section
from low_precision import gap, reward
from torch import Tensor

from miles.arch.precision import NumberFormat
from miles.precision.weight_format import dequantised, published, quantised

SHAPE = (2048, 4096)
TURNS = 5
FORMATS = {
    "fp8": NumberFormat("fp8"),
    "fp8-pow2": NumberFormat("fp8", "pow2"),
    "fp8_channel": NumberFormat("fp8_channel"),
    "fp8_tensor": NumberFormat("fp8_tensor"),
    "mxfp8": NumberFormat("mxfp8"),
    "nvfp4": NumberFormat("nvfp4"),
    "int4": NumberFormat("int4"),
    "int4-g128": NumberFormat("int4", group_size=128),
    "int4-asymmetric": NumberFormat("int4", symmetric=False),
    "int8": NumberFormat("int8"),
}
CASTS = {"bf16": torch.bfloat16, "e4m3, no scale": torch.float8_e4m3fn}


def gaussian() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02


def with_outliers() -> Tensor:
    weight = gaussian()
    chosen = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.001
    return weight * torch.where(chosen, 10.0, 1.0)


def relative_error(rounded: Tensor, exact: Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


def row(name: str) -> dict[str, Any]:
    """Error and bytes of one format, and what is timed."""
    weight = gaussian()
    exact = (weight, with_outliers())
    if name in CASTS:
        dtype = CASTS[name]
        stored: Any = weight.to(dtype)
        errors = [relative_error(w.to(dtype).float(), w) for w in exact]
        return {
            "errors": errors,
            "bits": 8.0 * dtype.itemsize,
            "there": lambda: weight.to(dtype),
            "back": lambda: stored.float(),
        }
    form = FORMATS[name]
    stored = quantised(form, weight)
    errors = [relative_error(dequantised(quantised(form, w)), w) for w in exact]
    size = sum(tensor.nbytes for tensor in published("weight", stored).values())
    return {
        "errors": errors,
        "bits": 8 * size / weight.numel(),
        "there": lambda: quantised(form, weight),
        "back": lambda: dequantised(stored),
    }


def nanoseconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e9 / (SHAPE[0] * SHAPE[1])


def extra_megabytes(name: str) -> float:
    """Measured in a process of its own, on a matrix four times as large."""
    out = subprocess.run([sys.executable, __file__, "--extra", name], capture_output=True, check=True)
    return float(out.stdout)


def print_extra(name: str) -> None:
    """Growth of the process's peak, less the result, in MB."""
    weight = torch.randn(2 * SHAPE[0], 2 * SHAPE[1])
    small = weight[:512, :512].contiguous()
    for part in (small, weight):
        before = peak_bytes()
        stored = quantised(FORMATS[name], part)
    held = sum(value.nbytes for value in vars(stored).values() if isinstance(value, Tensor))
    print((peak_bytes() - before - held) / 1e6)


def peak_bytes() -> int:
    """Peak resident memory of this process; `ru_maxrss` would start from its parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_all() -> dict[str, Any]:
    """Every format and cast; turns go round, so that a busy moment hits all of them alike."""
    torch.set_num_threads(1)
    before = load()
    rows = {name: row(name) for name in (*CASTS, *FORMATS)}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        for name, found in rows.items():
            for way in ("there", "back"):
                times.setdefault((name, way), []).append(nanoseconds(found[way]))
    cells = {
        name: {
            "errors": found["errors"],
            "bits": found["bits"],
            "there": min(times[name, "there"]),
            "back": min(times[name, "back"]),
            "extra": extra_megabytes(name) if name in FORMATS else None,
        }
        for name, found in rows.items()
    }
    return {"date": time.strftime("%Y-%m-%d"), "load": before, "cells": cells}


def markdown(result: dict[str, Any]) -> str:
    plain = result["cells"]["e4m3, no scale"]
    head = (
        f"{result['date']}, {processor()}, {cores()} cores, torch {torch.__version__}, one thread, "
        f"load before {result['load']:.1f}. {SHAPE[0]}x{SHAPE[1]} weights."
    )
    lines = [
        head,
        "",
        "| format | bits a weight | error | with outliers | quantise [ns] | dequantise [ns] "
        "| against torch's e4m3 casts | beyond the result [MB] |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cell in result["cells"].items():
        ratios = f"{cell['there'] / plain['there']:.1f}x, {cell['back'] / plain['back']:.1f}x"
        extra = "-" if cell["extra"] is None else f"{cell['extra']:.0f}"
        errors = " | ".join(f"{error:.2%}" for error in cell["errors"])
        form = str(FORMATS[name]) if name in FORMATS else f"torch: {name}"
        lines.append(
            f"| {form} | {cell['bits']:.2f} | {errors} | {cell['there']:.1f} | {cell['back']:.1f} "
            f"| {ratios} | {extra} |"
        )
    return "\n".join(lines)


def gap_table() -> str:
    head = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {cores()} cores, torch {torch.__version__}, one thread."
    )
    return f"{head} {gap.markdown(gap.measure())}"


def reward_table() -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return f"{time.strftime('%Y-%m-%d')}, {processor()}. {reward.markdown(reward.measure(Path(scratch)))}"


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "casts": ("precision", lambda: markdown(measure_all())),
    "gap": ("precision_gap", gap_table),
    "reward": ("precision_reward", reward_table),
}
"""Section of the page, and what measures it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--extra", choices=list(FORMATS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.extra is not None:
        print_extra(options.extra)
        return
    for part in options.part:
        section, measured = PARTS[part]
        text = measured()
        if options.write is not None:
            write_section(options.write, section, text)
        print(text)


if __name__ == "__main__":
    main()
