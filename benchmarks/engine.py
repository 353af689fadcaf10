"""The native engine beside transformers: `generate` in its best setting, and its continuous batching.

    python benchmarks/engine.py                                   # the quickstart's model, 2 minutes
    python benchmarks/engine.py --model moe-100m --batch 16 64 --lengths 256x256 --no-continuous --repeats 1
    python benchmarks/engine.py --decode-kernel torch             # our engine without its fused kernel

Same weights, same prompts in groups of 8, same threads, fp32, one process, the sides in turn; temperature 1,
every response runs to its full length. Our side also returns log-probs and routes. Rates are medians per
second of processor time, prefill included, and stand beside those of wall time. Exit code 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from decoding.measure import Cell, measure_cell
from decoding.models import CONFIGS, build
from decoding.report import markdown, write_into
from decoding.workload import Workload
from laptop.machine import load

SMALL_BATCHES = (1, 8, 64, 128, 256)
BARS = {"quickstart": ((64, 4.0),), "moe-100m": ((17, 1.2), (1, 1.5))}
"""Model -> (smallest batch, times generate) pairs, largest batch first."""
CONTINUOUS_BAR = 8.0
SCALING_BAR = 0.9
"""Tokens/s at batch 256 against batch 128."""


def missed_bars(model: str, cells: list[Cell]) -> list[str]:
    """One line for each bar that a cell is below."""
    missed = []
    for cell in cells:
        batch = cell.workload.batch
        bar = next((times for least, times in BARS.get(model, ()) if batch >= least), None)
        if bar is not None and cell.times_generate < bar:
            missed.append(f"batch {batch}: {cell.times_generate:.2f}x generate, bar {bar:g}x")
        if cell.times_continuous is not None and cell.times_continuous < CONTINUOUS_BAR:
            missed.append(
                f"batch {batch}: {cell.times_continuous:.1f}x continuous batching, bar {CONTINUOUS_BAR:g}x"
            )
    by_batch = {cell.workload.batch: cell.miles for cell in cells}
    if {128, 256} <= by_batch.keys() and by_batch[256] < SCALING_BAR * by_batch[128]:
        missed.append(f"batch 256 runs at {by_batch[256] / by_batch[128]:.2f}x of batch 128")
    return missed


def lengths(text: str) -> tuple[int, int]:
    """`12x32` -> prompt 12, response 32."""
    prompt, _, response = text.partition("x")
    return int(prompt), int(response)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(CONFIGS), default="quickstart")
    parser.add_argument("--batch", type=int, nargs="+", default=SMALL_BATCHES)
    parser.add_argument("--lengths", type=lengths, nargs="+", default=[(12, 32)], metavar="PROMPTxRESPONSE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-continuous", action="store_true", help="without continuous batching")
    parser.add_argument("--decode-kernel", choices=["auto", "torch", "fused"], default="auto")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        help="try only this setting of generate, e.g. 'grouped_mm, sdpa, static cache'; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before, subject = load(), build(options.model)
    cells = []
    for prompt, response in options.lengths:
        for batch in options.batch:
            workload = Workload(batch, prompt, response)
            continuous = not options.no_continuous
            cells.append(
                measure_cell(
                    subject, workload, options.repeats, continuous, options.decode_kernel, options.setting
                )
            )
            print(json.dumps(asdict(cells[-1])), file=sys.stderr, flush=True)
    table = markdown(subject, cells, before)
    if options.write is not None:
        write_into(options.write, options.model, table)
    print(json.dumps([asdict(cell) for cell in cells]) if options.json else table)
    missed = missed_bars(options.model, cells)
    print("\n".join(missed), file=sys.stderr)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
