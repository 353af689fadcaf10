"""The native engine with and without guesses: where does guessing ahead pay?

    python benchmarks/speculative.py [--write docs/benchmarks.md]

The policy of the profile `quickstart-mtp` after its warm start, with the MTP layer that was taught along, on
held-out prompts in groups of 8, sampled at temperature 1 until the answer ends. Torch decodes with no
guesses, with a chain and with a tree of the MTP layer's, and with guesses from the text alone; the compiled
kernel, which does not guess, stands beside them. New tokens per second of processor time, prefill included,
medians over the turns, all sides in turn. The tokens per verification count the policy's own token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from laptop.machine import cores, load, processor
from laptop.page import write_section

from miles.arch import load_spec
from miles.data.tasks import resolve_builtin
from miles.data.tokenizer import CheckpointTokenizer
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.rollout.native.fused import build
from miles.weights.hf import read_hf

GROUP, RESPONSE, CONTEXT = 8, 12, 64
WAYS = {
    "no guesses": None,
    "MTP, 3 in a row": SpeculationSettings(algorithm="EAGLE", num_steps=3, num_draft_tokens=4),
    "MTP, a tree of 8": SpeculationSettings(algorithm="EAGLE", num_steps=3, eagle_topk=2, num_draft_tokens=8),
    "from the text": SpeculationSettings(algorithm="NGRAM", num_steps=3, num_draft_tokens=4),
    "no guesses, compiled kernel": None,
}
KERNEL = "no guesses, compiled kernel"


def warm_start(scratch: Path) -> Path:
    """The checkpoint that the profile makes on first use."""
    words = ("--profile", "quickstart-mtp", "--num-rollout", "1", "--skip-eval-before-train")
    variables = {"MILES_RUNS_DIR": str(scratch / "runs"), "MILES_CACHE_DIR": str(scratch / "cache")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "miles_cli",
            "train",
            *words,
            "--eval-prompt-data",
            "sort",
            "builtin:sort/test@[0:8]",
        ],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    (checkpoint,) = (scratch / "cache" / "checkpoints").iterdir()
    return checkpoint


class Side:
    """One engine; `rates` in tokens per processor second, one for each turn."""

    def __init__(self, name: str, checkpoint: Path, batch: int) -> None:
        settings = EngineSettings(
            max_context_len=CONTEXT,
            seed=0,
            max_running_requests=batch,
            speculation=WAYS[name],
            decode_library=build.library("c++") if name == KERNEL else None,
        )
        self.engine = NativeEngine(load_spec(checkpoint), settings)
        asyncio.run(self.engine.receive_weights(read_hf(checkpoint), version=1))
        self.rates: list[float] = []
        self.tokens = self.verifications = 0

    def turn(self, prompts: list[list[int]], stop: int, turn: int) -> None:
        sampling = SamplingParams(max_new_tokens=RESPONSE, temperature=1.0, stop_token_ids=(stop,))
        requests = [
            GenerateRequest(input_ids=ids, sampling=sampling, sample_key=1000 * turn + i, group=i // GROUP)
            for i, ids in enumerate(prompts)
        ]
        started = time.process_time()
        outputs = asyncio.run(self.engine.generate(requests))
        seconds = time.process_time() - started
        self.rates.append(sum(len(output.output_ids) for output in outputs) / seconds)
        for info in (output.spec_info for output in outputs if output.spec_info):
            self.tokens += info.accepted_tokens + info.verify_steps
            self.verifications += info.verify_steps


def measure(checkpoint: Path, batch: int, turns: int) -> dict[str, Side]:
    """The first turn of each side is not counted."""
    tokenizer = CheckpointTokenizer(checkpoint)
    stop = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    lines = resolve_builtin("builtin:sort/test").read_text().splitlines()
    groups = -(-batch // GROUP)
    texts = [json.loads(line)["input"] for line in lines[:groups] for _ in range(GROUP)][:batch]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    sides = {name: Side(name, checkpoint, batch) for name in WAYS}
    for turn in range(turns + 1):
        for side in sides.values():
            side.turn(prompts, stop, turn)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = load()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = warm_start(Path(scratch))
        results = {batch: measure(checkpoint, batch, options.turns) for batch in options.batch}
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {cores()} cores, torch {torch.__version__}, one "
        f"thread, load before {before:.1f}. New tokens per processor second; in brackets against no guesses "
        "in torch, and tokens per verification.",
        "",
        "| batch | " + " | ".join(WAYS) + " |",
        "|---:" * (1 + len(WAYS)) + "|",
    ]
    for batch, sides in results.items():
        base = median(sides["no guesses"].rates[1:])
        cells = []
        for side in sides.values():
            rate = median(side.rates[1:])
            guessed = f", {side.tokens / side.verifications:.2f}" if side.verifications else ""
            cells.append(f"{rate:,.0f} ({rate / base:.2f}x{guessed})")
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    if options.write is not None:
        write_section(options.write, "speculative", text)
    print(text)


if __name__ == "__main__":
    main()
