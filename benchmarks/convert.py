"""`miles convert` on a synthetic MoE checkpoint of 2 GB: time beside a plain copy, and memory.

    python benchmarks/convert.py --write docs/benchmarks.md

The copy reads every file of the larger side once, hashes it (SHA-256), writes it and flushes it to the disk,
in one thread. `verified` reads back every weight that was written and computes its error. Copy and both kinds
of conversion take turns; each time is the median of its turns.
Memory: what the process holds in anonymous pages at most, beyond what it holds before it opens the
checkpoint (Linux); sampled every 5 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from laptop.machine import cores, load, processor
from laptop.page import write_section

from miles.arch import published_tensors, spec_from_hf_config
from miles.weights.hf import write_hf

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 62,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
SHARD_BYTES = 500_000_000
BASE = "base"
WAYS: dict[str, tuple[str, list[str]]] = {
    "bf16 -> bf16": (BASE, ["--to", "bf16"]),
    "bf16 -> fp32": (BASE, ["--to", "fp32"]),
    "bf16 -> fp8": (BASE, ["--to", "fp8"]),
    "bf16 -> fp8_channel": (BASE, ["--to", "fp8_channel"]),
    "bf16 -> mxfp8": (BASE, ["--to", "mxfp8"]),
    "bf16 -> nvfp4": (BASE, ["--to", "nvfp4"]),
    "bf16 -> int4": (BASE, ["--to", "int4"]),
    "bf16 -> int8": (BASE, ["--to", "int8"]),
    "bf16 -> dcp": (BASE, ["--to", "dcp"]),
    "fp8 -> bf16": ("fp8", ["--to", "bf16"]),
}
"""Where from, and the words of the command."""
CONVERT = """
import sys
import miles.weights.convert, miles_cli.commands.convert
from miles_cli.main import run
print("ready", flush=True)
sys.stdin.readline()
sys.exit(run(sys.argv[1:]))
"""
SAMPLE_SECONDS = 0.005
TURNS = 3
KINDS: dict[str, list[str]] = {"plain": ["--no-verify"], "verified": []}


def make_checkpoint(directory: Path) -> None:
    spec = spec_from_hf_config(CONFIG)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in published_tensors(spec).items():
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    write_hf(directory, spec, tensors(), max_shard_bytes=SHARD_BYTES)


def plain_copy(source: Path, target: Path) -> dict[str, float]:
    """Read, hash, write and flush every file, then throw the copy away."""
    target.mkdir()
    began, worked = time.monotonic(), time.process_time()
    for path in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as reading, (target / path.name).open("wb") as writing:
            while chunk := reading.read(1 << 22):
                digest.update(chunk)
                writing.write(chunk)
            writing.flush()
            os.fsync(writing.fileno())
    told = {"wall": time.monotonic() - began, "processor": time.process_time() - worked}
    shutil.rmtree(target)
    return told


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next((row for row in status.splitlines() if row.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


def conversion(source: Path, target: Path, words: list[str]) -> dict[str, float]:
    """One `miles convert` in a process of its own, without its start-up."""
    command = [sys.executable, "-c", CONVERT, "convert", str(source), str(target), *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    process.stdout.readline()
    base = peak = anonymous_bytes(process.pid)
    began, worked = time.monotonic(), _processor_seconds(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        seconds = _processor_seconds(process.pid)
        time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0, command
    wall = time.monotonic() - began
    return {"wall": wall, "processor": seconds - worked, "extra": (peak - base) / 1e6}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def medians(told: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in told) for key in told[0]}


def measure(folder: Path, ways: list[str]) -> dict[str, Any]:
    before = load()
    make_checkpoint(folder / BASE)
    size = bytes_in(folder / BASE)
    rows = {}
    for way in ways:
        source_name, words = WAYS[way]
        source, target = folder / source_name, folder / "target"
        if not source.is_dir():
            conversion(folder / BASE, source, ["--to", source_name])
        turns: dict[str, list[dict[str, float]]] = {"copy": [], **{kind: [] for kind in KINDS}}
        for _ in range(TURNS):
            for kind, more in KINDS.items():
                turns[kind].append(conversion(source, target, [*words, *more]))
                out = bytes_in(target)
                if kind == "plain":
                    larger = max(source, target, key=bytes_in)
                    turns["copy"].append(plain_copy(larger, folder / "copy"))
                shutil.rmtree(target)
        rows[way] = {kind: medians(told) for kind, told in turns.items()} | {"bytes": out}
        print(way, json.dumps(rows[way]), file=sys.stderr)
    return {"date": time.strftime("%Y-%m-%d"), "load": before, "size": size, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    lines = [
        f"{result['date']}, {processor()}, {cores()} cores, torch {torch.__version__}, load before "
        f"{result['load']:.1f}. Source: {result['size'] / 1e9:.2f} GB, "
        f"{CONFIG['num_experts']} experts in each of {CONFIG['num_hidden_layers']} layers.",
        "",
        "| conversion | written [GB] | the copy [s] | wall [s] | ratio | verified [s] | ratio "
        "| processor: copy, conversion, verified [s] | memory, verified [MB] |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, cell in rows.items():
        bare, full, copy = cell["plain"], cell["verified"], cell["copy"]
        lines.append(
            f"| {way} | {cell['bytes'] / 1e9:.2f} | {copy['wall']:.1f} | {bare['wall']:.1f} "
            f"| {bare['wall'] / copy['wall']:.2f}x | {full['wall']:.1f} | {full['wall'] / copy['wall']:.2f}x "
            f"| {copy['processor']:.1f}, {bare['processor']:.1f}, {full['processor']:.1f} "
            f"| {bare['extra']:.0f}, {full['extra']:.0f} |"
        )
    peak = max(cell[kind]["extra"] for cell in rows.values() for kind in ("plain", "verified"))
    bars = [f"memory below 600 MB: {'met' if peak < 600 else 'missed'} ({peak:.0f} MB)"]
    if (same := rows.get("bf16 -> bf16")) is not None:
        met = "met" if same["plain"]["wall"] <= 2 * same["copy"]["wall"] else "missed"
        bars.insert(0, f"Hugging Face to Hugging Face within 2x of the copy: {met}")
    return "\n".join([*lines, "", f"Bars: {'; '.join(bars)}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for a while (about 10 GB)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = markdown(measure(Path(folder), options.ways))
    if options.write is not None:
        write_section(options.write, "convert", text)
    print(text)


if __name__ == "__main__":
    main()
