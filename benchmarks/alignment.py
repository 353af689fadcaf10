"""How far engine and trainer are apart, and what each remedy does about it and costs.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --models quickstart --formats bf16 --write docs/benchmarks.md

An engine in bf16, or on weights rounded to block FP8 or INT4, samples; an fp32 trainer compares. Two
policies: the quickstart's, and one of 8 layers and 32 experts that a supervised run of this benchmark makes
(about a minute, kept in the cache). Every figure is the median of five seeds. Exit code 1: a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from agreement.measure import Setup, measure
from agreement.models import deep, quickstart
from agreement.table import bars, markdown, medians
from laptop.machine import cores, load, processor
from laptop.page import write_section

from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.models.invariance import find_exact_numerics

FORMATS = ("bf16", "fp8", "int4")
DEEP_STEPS = 250


def measure_all(models: list[str], formats: list[str], seeds: list[int], prompts: int) -> dict[str, Any]:
    """Every model, format and seed."""
    torch.set_num_threads(1)
    before, cells = load(), []
    for model in models:
        runs: dict[str, list[Any]] = {name: [] for name in formats}
        numerics = None
        for seed in seeds:
            policy = quickstart(seed) if model == "quickstart" else deep(seed, DEEP_STEPS)
            numerics = numerics or find_exact_numerics(policy.spec, torch.float32)
            for name in formats:
                print(f"{model}, seed {seed}: {name}", file=sys.stderr)
                precision = PrecisionPolicy(NumberFormat(name))  # type: ignore[arg-type]
                setup = Setup(policy, precision, prompts, seed, numerics)
                runs[name].append(measure(setup))
        cells += [{"model": model, "format": name, "figures": medians(runs[name])} for name in formats]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": cores(),
        "load_before": before,
        "torch": torch.__version__,
        "seeds": seeds,
        "samples": prompts * 8,
        "cells": cells,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=["quickstart", "deep"], default=["quickstart", "deep"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=64, help="prompts per seed, of 8 samples each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    options = parser.parse_args()
    result = measure_all(options.models, options.formats, options.seeds, options.prompts)
    text = markdown(result)
    if options.write is not None:
        write_section(options.write, "alignment", text)
    print(json.dumps(result) if options.json else text)
    sys.exit(0 if all(bar.met for cell in result["cells"] for bar in bars(cell)) else 1)


if __name__ == "__main__":
    main()
