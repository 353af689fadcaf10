"""How the trainer cuts one model over its ranks: the sizes, what divides what, and what is computed wrongly.

Ranks form TP x PP x CP x DP for attention and dense layers, and ETP x EP x PP x EDP for experts. Checks
follow megatron-core 0.16.1 (`transformer/transformer_config.py`, `model_parallel_config.py`,
`parallel_state.py`); the layouts that it accepts and computes wrongly were measured against one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miles.arch import ArchSpec, DenseMlpSpec


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions over `world` ranks."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    virtual_stage_layers: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        """Data-parallel ranks of attention and dense layers."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Data-parallel ranks of the experts."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        words = [
            f"--tensor-model-parallel-size {self.tp}",
            f"--pipeline-model-parallel-size {self.pp}",
            f"--context-parallel-size {self.cp}",
            f"--expert-model-parallel-size {self.ep}",
            f"--expert-tensor-parallel-size {self.etp}",
        ]
        return " ".join([*words, *(["--sequence-parallel"] if self.sequence_parallel else [])])

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage; the layout has been checked."""
        first, last = self.first_stage_layers, self.last_stage_layers
        middle = self.pp - (first is not None) - (last is not None)
        even = (num_layers - (first or 0) - (last or 0)) // max(middle, 1)
        return (
            *([first] if first is not None else []),
            *[even] * middle,
            *([last] if last is not None else []),
        )

    def __str__(self) -> str:
        dense, experts = f"TP {self.tp} x PP {self.pp} x CP {self.cp}", f"EP {self.ep} x ETP {self.etp}"
        divides = (
            self.world % (self.tp * self.pp * self.cp) == self.world % (self.etp * self.ep * self.pp) == 0
        )
        parallel = " with sequence parallelism" if self.sequence_parallel else ""
        if not divides:
            return f"{dense}{parallel} · experts {experts}"
        spread = f" · experts {experts} x DP {self.edp}" if self.ep * self.etp > 1 else ""
        return f"{dense} x DP {self.dp}{parallel}{spread}"


@dataclass(frozen=True)
class LayoutProblem:
    """Why a layout cannot be used: the rule, the numbers, and the setting to change."""

    rule: str
    what: str
    setting: str


TP, PP, CP, EP, ETP = (
    f"parallel.{name}"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )
)


def layout_problems(layout: Layout, spec: ArchSpec) -> Iterator[LayoutProblem]:
    """Everything that is wrong with a layout for a model; nothing for one that works."""
    yield from _world(layout)
    yield from _tensor(layout, spec)
    yield from _pipeline(layout, spec)
    if layout.cp > 1 and spec.has_indexer:
        yield LayoutProblem("LAY10", f"CP {layout.cp} with an indexer, which chooses among all keys", CP)
    yield from _experts(layout, spec)
    yield from _wrong_results(layout, spec)


def _world(layout: Layout) -> Iterator[LayoutProblem]:
    ranks = layout.tp * layout.pp * layout.cp
    if layout.world % ranks:
        yield LayoutProblem(
            "LAY1",
            f"TP {layout.tp} x PP {layout.pp} x CP {layout.cp} = {ranks} does not divide {layout.world}",
            TP,
        )
    expert_ranks = layout.etp * layout.ep * layout.pp
    if layout.world % expert_ranks:
        yield LayoutProblem(
            "LAY1",
            f"ETP {layout.etp} x EP {layout.ep} x PP {layout.pp} = {expert_ranks} does not divide "
            f"{layout.world}",
            EP,
        )


def _tensor(layout: Layout, spec: ArchSpec) -> Iterator[LayoutProblem]:
    attention = spec.layers[0].attention
    heads, groups = attention.num_heads, attention.num_kv_heads
    if heads % layout.tp:
        yield LayoutProblem("LAY2", f"{heads} attention heads over TP {layout.tp}", TP)
    if groups % layout.tp and layout.tp % groups:
        yield LayoutProblem("LAY2", f"{groups} key-value heads over TP {layout.tp}", TP)
    dense = {layer.mlp.intermediate_size for layer in spec.layers if isinstance(layer.mlp, DenseMlpSpec)}
    for width in sorted(width for width in dense if width % layout.tp):
        yield LayoutProblem("LAY2", f"an MLP width of {width} over TP {layout.tp}", TP)
    if spec.moe is not None and spec.moe.intermediate_size % layout.etp:
        yield LayoutProblem(
            "LAY2", f"an expert width of {spec.moe.intermediate_size} over ETP {layout.etp}", ETP
        )
    if layout.sequence_parallel and layout.tp == 1:
        yield LayoutProblem("LAY5", "sequence_parallel with TP 1", "parallel.sequence_parallel")


def _pipeline(layout: Layout, spec: ArchSpec) -> Iterator[LayoutProblem]:
    first, last = layout.first_stage_layers, layout.last_stage_layers
    middle = layout.pp - (first is not None) - (last is not None)
    left = spec.num_layers - (first or 0) - (last or 0)
    if middle < 0 or left < 0 or (middle == 0) != (left == 0):
        yield LayoutProblem(
            "LAY3",
            f"{spec.num_layers} layers, {first} on the first and {last} on the last of {layout.pp} stages",
            PP,
        )
        return
    if middle and (left % middle or left < middle):
        yield LayoutProblem("LAY3", f"{left} layers over {middle} equal stages", PP)
        return
    virtual = layout.virtual_stage_layers
    if virtual is None:
        return
    setting = "parallel.num_layers_per_virtual_pipeline_stage"
    if layout.pp == 1:
        yield LayoutProblem("LAY3", "virtual stages without pipeline stages", setting)
    elif any(stage % virtual for stage in layout.stages(spec.num_layers)):
        yield LayoutProblem("LAY3", f"virtual stages of {virtual} layers", setting)


def _experts(layout: Layout, spec: ArchSpec) -> Iterator[LayoutProblem]:
    if not spec.is_moe:
        if layout.ep > 1:
            yield LayoutProblem("LAY4", f"EP {layout.ep} for a dense model", EP)
    elif spec.num_experts % layout.ep:
        yield LayoutProblem("LAY4", f"{spec.num_experts} experts over EP {layout.ep}", EP)
    if spec.is_moe and layout.tp > 1 and not layout.sequence_parallel:
        yield LayoutProblem(
            "LAY5", f"TP {layout.tp} for an MoE model without sequence_parallel", "parallel.sequence_parallel"
        )


def _wrong_results(layout: Layout, spec: ArchSpec) -> Iterator[LayoutProblem]:
    """Layouts that megatron-core accepts and computes wrongly."""
    if spec.is_moe and layout.ep == 1 and layout.etp < layout.tp:
        yield LayoutProblem("LAY6", f"TP {layout.tp} with ETP {layout.etp} and EP 1", ETP)
    if layout.pp == 2 and layout.virtual_stage_layers is not None:
        yield LayoutProblem(
            "LAY7", "PP 2 with virtual stages", "parallel.num_layers_per_virtual_pipeline_stage"
        )
