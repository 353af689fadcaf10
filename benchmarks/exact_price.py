"""What exactness costs: whole steps of the quickstart's model with exact numerics beside fast ones.

    python benchmarks/exact_price.py [--write docs/benchmarks.md]

One engine and one trainer per mode in one process, on the same weights and prompts, steps in turn; responses
have given lengths. Both modes in torch, and in fp32 both on the compiled kernels as well. A step is a rollout
and one optimizer step with everything the trainer measures. Processor seconds of the process, median over the
steps. Exit code 1: a step of some row costs more than the bar, or an exact one has a gap.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from laptop.machine import cores, load, processor

from miles.arch import ArchSpec, load_spec
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.data.tasks import resolve_builtin
from miles.models.allocator import keep_freed_memory
from miles.models.compiled import build as training
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.compiled.numerics import CompiledNumerics
from miles.models.invariance import find_exact_numerics
from miles.models.numerics import FAST, Numerics
from miles.planning.facts.compiler import read_compiler
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.rollout.native.fused import build as decoding
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings

Kernels = Literal["torch", "compiled"]

BAR = 1.1
BEGIN, END = "<!-- exact_price: begin -->", "<!-- exact_price: end -->"


@dataclass(frozen=True)
class Job:
    """Groups of samples that share a prompt; response lengths are drawn around `response`."""

    name: str
    groups: int
    group: int
    prompt: int
    response: int

    def requests(self, vocab: int, step: int) -> list[list[GenerateRequest]]:
        rng = np.random.default_rng(step)
        return [
            [
                GenerateRequest(
                    input_ids=prompt,
                    sampling=SamplingParams(max_new_tokens=int(length)),
                    sample_key=1000 * group + member,
                    group=group,
                )
                for member, length in enumerate(
                    rng.integers(self.response // 2, self.response + 1, self.group)
                )
            ]
            for group, prompt in enumerate(
                rng.integers(3, vocab, self.prompt).tolist() for _ in range(self.groups)
            )
        ]


JOBS = (
    Job("256 samples of 5-12 tokens, prompts of 10, all different", 256, 1, 10, 12),
    Job("32 groups of 8, 5-12 tokens, prompts of 10", 32, 8, 10, 12),
    Job("32 samples of 128-256 tokens, prompts of 64, all different", 32, 1, 64, 256),
)


@dataclass
class Side:
    """Trainer and engine of one mode; `seconds` per phase and step."""

    spec: ArchSpec
    dtype: torch.dtype
    numerics: Numerics
    decode_library: Path | None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"rollout": [], "train": []})

    def __post_init__(self) -> None:
        settings = TrainerSettings(
            optimizer=OptimizerSettings(lr=1e-4),
            algorithm=AlgorithmSettings(),
            max_tokens_per_micro_batch=16384,
        )
        self.trainer = NativeTrainer(self.spec, settings, self.dtype, numerics=self.numerics)
        self.trainer.init_weights(seed=1)

    def step(self, job: Job, number: int) -> float:
        """Gap between the two sides, the largest of the step."""
        started = time.process_time()
        batch = asyncio.run(self._roll_out(job, number))
        sampled = time.process_time()
        metrics = self.trainer.train_step(batch).metrics
        self.seconds["rollout"].append(sampled - started)
        self.seconds["train"].append(time.process_time() - sampled)
        return metrics["train/train_rollout_logprob_abs_diff_max"]

    async def _roll_out(self, job: Job, number: int) -> TrainBatch:
        settings = EngineSettings(
            max_context_len=job.prompt + job.response,
            seed=number,
            dtype=self.dtype,
            numerics=self.numerics,
            decode_library=self.decode_library,
        )
        engine = NativeEngine(self.spec, settings)
        await engine.share_weights(self.trainer.decoder, version=number)
        calls = job.requests(self.spec.vocab_size, number)
        answers = await asyncio.gather(*(engine.generate(call) for call in calls))
        pairs = [
            pair
            for call, outputs in zip(calls, answers, strict=True)
            for pair in zip(call, outputs, strict=True)
        ]
        return pack(
            [
                Sample(
                    prompt="",
                    tokens=[*request.input_ids, *output.output_ids],
                    response_length=len(output.output_ids),
                    reward=float(output.output_ids[0] % 2),
                    status=SampleStatus.COMPLETED,
                    rollout_log_probs=output.log_probs,
                    rollout_routed_experts=output.routed_experts,
                    group_index=request.group,
                    index=index,
                    rollout_id=index,
                )
                for index, (request, output) in enumerate(pairs)
            ]
        )


@dataclass(frozen=True)
class Row:
    """Of the table: its text, the ratio of whole steps, and the largest gap of exact ones."""

    text: str
    ratio: float
    exact_gap: float

    @property
    def met(self) -> bool:
        return self.ratio <= BAR and self.exact_gap == 0


def both_modes(kernels: Kernels, spec: ArchSpec, dtype: torch.dtype) -> dict[str, Side]:
    """One side of each mode, in torch or compiled."""
    if kernels == "torch":
        numerics = {"fast": FAST, "exact": find_exact_numerics(spec, dtype)}
        return {mode: Side(spec, dtype, how, None) for mode, how in numerics.items()}
    compiler = read_compiler()
    assert compiler is not None, "a machine without a compiler has --kernels torch"
    library = Library(training.library(compiler.path))
    compiled = {"fast": CompiledNumerics(library), "exact": CompiledExactNumerics(library)}
    decode = decoding.library(compiler.path)
    return {mode: Side(spec, dtype, how, decode) for mode, how in compiled.items()}


def price(job: Job, dtype: torch.dtype, kernels: Kernels, steps: int) -> Row:
    """The first step of each side is not counted."""
    spec = replace(load_spec(resolve_builtin("builtin:sort")), max_position_embeddings=4096)
    sides = both_modes(kernels, spec, dtype)
    gaps = dict.fromkeys(sides, 0.0)
    for number in range(steps + 1):
        for name in sorted(sides, reverse=number % 2 == 1):
            gaps[name] = max(gaps[name], sides[name].step(job, number))
    times = {
        name: {phase: median(all_[1:]) for phase, all_ in side.seconds.items()}
        for name, side in sides.items()
    }
    whole = {
        name: median(sum(pair) for pair in list(zip(*side.seconds.values(), strict=True))[1:])
        for name, side in sides.items()
    }
    ratios = [times["exact"][phase] / times["fast"][phase] for phase in ("rollout", "train")]
    ratio = whole["exact"] / whole["fast"]
    cells = (
        job.name,
        str(dtype).removeprefix("torch."),
        kernels,
        f"{1000 * whole['fast']:,.0f}",
        f"{1000 * whole['exact']:,.0f}",
        *(f"{r:.2f}x" for r in (*ratios, ratio)),
        f"{gaps['fast']:.1e}",
        f"{gaps['exact']:.1f}",
    )
    return Row("| " + " | ".join(cells) + " |", ratio, gaps["exact"])


def report(
    jobs: tuple[Job, ...], dtypes: list[torch.dtype], kernels: list[Kernels], steps: int
) -> tuple[str, list[Row]]:
    """The table with what it was measured on, and its rows."""
    before = load()
    pairs = [(d, k) for d in dtypes for k in kernels if k == "torch" or d == torch.float32]
    rows = [price(job, *pair, steps) for pair in pairs for job in jobs]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    head = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {cores()} cores, {versions}. "
        f"{torch.get_num_threads()} thread(s), median of {steps} steps, load before {before:.1f}.",
        "",
        "| step | dtype | kernels | fast [ms] | exact [ms] | rollout | train | whole | gap, fast | exact |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    )
    missed = sum(not row.met for row in rows)
    judged = "met by every row" if not missed else f"missed by {missed} of {len(rows)} rows"
    bar = f"Bar: a whole exact step at most {BAR}x, and no gap: {judged}."
    return "\n".join([*head, *(row.text for row in rows), "", bar]), rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--kernels", choices=["torch", "compiled"], nargs="+", default=["torch", "compiled"])
    parser.add_argument("--job", type=int, nargs="+", default=range(len(JOBS)), help="rows of the table")
    parser.add_argument("--write", type=Path, help="a page with the marks of this table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    dtypes = [{"fp32": torch.float32, "bf16": torch.bfloat16}[name] for name in options.dtype]
    text, rows = report(tuple(JOBS[i] for i in options.job), dtypes, options.kernels, options.steps)
    print(text)
    if options.write is not None:
        head, found, rest = options.write.read_text().partition(BEGIN)
        _, closed, tail = rest.partition(END)
        if not (found and closed):
            sys.exit(f"{options.write} has no marks {BEGIN} and {END}")
        options.write.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    sys.exit(0 if all(row.met for row in rows) else 1)


if __name__ == "__main__":
    main()
