"""The nearest layout that works, for a refusal to name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import log2

from miles.arch import ArchSpec
from miles.planning.layout import Layout, layout_problems

WEIGHTS = (1.0, 1.0, 1.0, 1.0, 2.0)
"""Of TP, PP, CP, EP and ETP: experts are small matrices, which are spread before they are cut."""


def nearest_layout(asked: Layout, spec: ArchSpec, fits: Callable[[Layout], bool]) -> Layout | None:
    """The layout over the same ranks that has no problem, satisfies `fits`, and differs least from `asked`.

    The distance is the weighted number of doublings and halvings of TP, PP, CP, EP and ETP; of equals the one
    with less tensor parallelism wins, because its matrices stay larger.
    """
    candidates = sorted(_candidates(asked, spec), key=lambda layout: (_distance(layout, asked), layout.tp))
    return next((c for c in candidates if not any(layout_problems(c, spec)) and fits(c)), None)


def _candidates(asked: Layout, spec: ArchSpec) -> Iterator[Layout]:
    powers = tuple(2**i for i in range(asked.world.bit_length()) if 2**i <= asked.world)
    sizes = sorted({*powers, *(size for size in (asked.pp, asked.world) if size <= asked.world)})
    experts = [size for size in sizes if spec.is_moe and spec.num_experts % size == 0] or [1]
    for tp, pp, cp, ep in product(powers, sizes, powers, experts):
        if asked.world % (tp * pp * cp):
            continue
        for etp, kept in product({1, tp}, {False, pp == asked.pp}):
            yield replace(
                asked,
                tp=tp,
                pp=pp,
                cp=cp,
                ep=ep,
                etp=etp,
                sequence_parallel=tp > 1,
                virtual_stage_layers=asked.virtual_stage_layers if kept and pp > 2 else None,
                first_stage_layers=asked.first_stage_layers if kept else None,
                last_stage_layers=asked.last_stage_layers if kept else None,
            )


def _distance(layout: Layout, asked: Layout) -> float:
    pairs = zip(_sizes(layout), _sizes(asked), WEIGHTS, strict=True)
    return sum(weight * abs(log2(mine / theirs)) for mine, theirs, weight in pairs)


def _sizes(layout: Layout) -> tuple[int, ...]:
    return layout.tp, layout.pp, layout.cp, layout.ep, layout.etp
