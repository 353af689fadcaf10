"""Attention of a training pass, compiled beside torch's blocked kernel: where each is quicker.

    python benchmarks/attention.py           # heads of 16, 32, 64 and 128; 33 to 2,048 visible tokens
    python benchmarks/attention.py --avx2    # both sides as on a machine without AVX-512

A block of attention (projections included) over about 2,048 tokens, one thread, fp32. Both take turns; a
number is the median of the ratios of processor seconds, compiled over torch. *Packed*: sequences of that many
tokens. *Shared*: 8 samples continue each prompt, which is half of what they see. *Short*: the same with
responses of 8 tokens. *Training* is forward and backward; *backward* compares the two backward passes of the
compiled forward, its own over torch's blocked one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import numpy as np
from laptop.machine import cores, load, processor

WIDTHS, VISIBLE, TOKENS = (16, 32, 64, 128), (33, 64, 96, 128, 256, 512, 1024, 2048), 2048
HEADS, KEY_HEADS, HIDDEN, GROUP, SHORT_RESPONSE = 4, 2, 64, 8, 8
NARROW = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
Layout = tuple[list[int], list[int]]
"""Lengths of prompts, and of what continues each prompt, GROUP times."""


def layouts(visible: int) -> dict[str, Layout]:
    count = max(1, TOKENS // visible)
    few = max(1, count // 4)
    own = visible - visible // 2
    return {
        "packed": ([visible] * count, []),
        "shared": ([visible // 2] * few, [own] * few),
        "short": ([visible - SHORT_RESPONSE] * count, [SHORT_RESPONSE] * count),
    }


def ratio(one: Callable[[], None], other: Callable[[], None], seconds: float) -> float:
    """Processor seconds of `one` over those of `other`."""
    one()
    other()
    found: list[float] = []
    calls, end = max(1, int(0.01 / seconds_of(other))), time.monotonic() + seconds
    while time.monotonic() < end or len(found) < 3:
        times = [sum(seconds_of(side) for _ in range(calls)) for side in (one, other)]
        found.append(times[0] / times[1])
    return statistics.median(found)


def seconds_of(call: Callable[[], None]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def row(width: int, visible: int, layout: Layout, seconds: float) -> list[float]:
    """Ratios: forward and backward, forward alone, the backward of the compiled side."""
    import torch

    from miles.arch.spec import AttentionSpec, RopeSpec
    from miles.models.compiled import attention, build
    from miles.models.compiled.library import Library
    from miles.models.compiled.numerics import CompiledNumerics
    from miles.models.decoder import AttentionBlock
    from miles.models.numerics import FAST
    from miles.models.segment_attention import SegmentAttention

    compiled = CompiledNumerics(Library(build.library("c++")))
    spec = AttentionSpec(HEADS, KEY_HEADS, width, RopeSpec(1e4), qkv_bias=True, output_bias=False)
    block = AttentionBlock(spec, HIDDEN, 1e-6, torch.float32)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prompts, responses = layout
    own = [length for length in responses for _ in range(GROUP)]
    prompt_of = np.repeat(np.arange(len(responses)), GROUP)
    starts = [prompts[i] for i in prompt_of]
    positions = [torch.arange(n) for n in prompts]
    positions += [torch.arange(at, at + n) for at, n in zip(starts, own, strict=True)]
    flat = torch.cat(positions)
    rotation = FAST.rotations(spec, visible, flat)
    x = torch.randn(len(flat), HIDDEN, requires_grad=True)
    offsets = np.array(list(accumulate([*prompts, *own], initial=0)))
    alone = torch.full((len(prompts),), -1)
    continues = torch.cat((alone, torch.from_numpy(prompt_of)))
    ours = attention.CompiledAttention(
        compiled._library, torch.from_numpy(offsets), continues, lambda: in_torch
    )
    in_torch = SegmentAttention(offsets, prompt_of if own else None)

    def run(compiled_side: bool, most: int, backward: bool) -> None:
        attention.MOST_VISIBLE = most
        block.numerics = compiled if compiled_side else FAST
        with torch.set_grad_enabled(backward):
            out = block(x, rotation, ours if compiled_side else in_torch, 0)
        if backward:
            out.backward(torch.ones_like(out))

    most = attention.MOST_VISIBLE
    shipped, torchs = (partial(run, side, most, True) for side in (True, False))
    forward, torchs_forward = (partial(run, side, most, False) for side in (True, False))
    own_way, blocked = (partial(run, True, limit, True) for limit in (1 << 30, 0))
    pairs = ((shipped, torchs), (forward, torchs_forward), (own_way, blocked))
    found = [ratio(*pair, seconds) for pair in pairs]
    attention.MOST_VISIBLE = most
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--visible", type=int, nargs="+", default=list(VISIBLE))
    parser.add_argument("--seconds", type=float, default=0.3, help="per number")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.avx2:
        os.environ.update(NARROW)
        from miles.models.compiled import build

        build.FLAGS = (*build.FLAGS, "-mno-avx512f")
    import torch

    torch.set_num_threads(1)
    print(f"{processor()}, {cores()} cores, load {load():.1f}; torch {torch.__version__}", end="")
    print(", as with AVX2\n" if options.avx2 else "\n")
    names = list(layouts(VISIBLE[0]))
    kinds = [f"{kind}, {name}" for kind in ("training", "forward", "backward") for name in names]
    print(f"| width | visible | {' | '.join(kinds)} |\n|---:|---:|{'---:|' * len(kinds)}")
    for width in options.widths:
        for visible in options.visible:
            of_layouts = [
                row(width, visible, layout, options.seconds) for layout in layouts(visible).values()
            ]
            cells = " | ".join(f"{found[i]:.2f}" for i in range(3) for found in of_layouts)
            print(f"| {width} | {visible:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
