"""The plan of a run on GPUs: placement, layout, and the memory of each phase.

It is computed for any run file that asks for GPUs, also where this build cannot run it yet, so that a cluster
profile can be checked on a laptop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from miles.arch import ArchSpec
from miles.config import RunConfig
from miles.planning.critic import trains_critic
from miles.planning.engine_memory import EnginePlan, plan_engine
from miles.planning.formats import Format
from miles.planning.hardware import Hardware
from miles.planning.layout import Layout, LayoutProblem, layout_problems
from miles.planning.memory import MemoryPart, MemoryPlan
from miles.planning.model_shape import ModelShape, model_shape
from miles.planning.nearest import nearest_layout
from miles.planning.phases import PhaseMemory, Workload, host_parts, plan_phases
from miles.planning.placement import Placement, plan_placement
from miles.planning.precision import fp8_scales
from miles.planning.speculation import drafting_layers
from miles.planning.trainer_memory import TrainerNumerics

STATIC_FRACTION = 0.8
"""Share of a GPU for weights and KV cache where `--sglang-mem-fraction-static` is not set; SGLang chooses
about this much by itself."""

COMFORT = 0.92
"""Share of a GPU that a phase may plan with: fragmentation, uneven routing and what the arithmetic leaves out
need the rest."""

KV_BYTES = {"fp8_e5m2": 1, "fp8_e4m3": 1}
"""Bytes of a cached number by `--sglang-kv-cache-dtype`; any other is a 16-bit one."""


@dataclass(frozen=True)
class ScalePlan:
    """What a run on GPUs would be. `phases` is empty where the layout has a problem or no GPU is known."""

    hardware: Hardware
    placement: Placement
    layout: Layout
    problems: tuple[LayoutProblem, ...]
    rollout_format: Format
    engine: EnginePlan | None
    phases: tuple[PhaseMemory, ...]
    host: tuple[MemoryPart, ...]
    exports: tuple[tuple[str, str], ...]

    @property
    def gpu_bytes(self) -> int:
        return self.hardware.kind.memory_bytes if self.hardware.kind else 0

    @property
    def peak(self) -> PhaseMemory | None:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes, default=None)

    @property
    def peak_memory(self) -> MemoryPlan | None:
        """The parts of the fullest phase."""
        return MemoryPlan(self.peak.parts) if self.peak else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, totals included."""
        values = asdict(self)
        values["hardware"] |= {"num_gpus": self.hardware.num_gpus, "name": str(self.hardware)}
        values["placement"] |= {"total_gpus": self.placement.total_gpus, "engines": self.placement.engines}
        if not self.problems:
            values["layout"] |= {"dp": self.layout.dp, "edp": self.layout.edp}
        for phase, given in zip(values["phases"], self.phases, strict=True):
            phase["total_bytes"] = given.total_bytes
        values["exports"] = dict(self.exports)
        return values


@dataclass(frozen=True)
class ScaleRequest:
    """What the arithmetic needs to know of a run."""

    config: RunConfig
    spec: ArchSpec
    hardware: Hardware
    dtype: Format
    rollout_format: Format
    max_context_len: int
    samples_per_rollout: int
    samples_per_step: int
    replay: bool

    @property
    def model(self) -> ModelShape:
        return model_shape(self.spec)

    def splits_steps(self, layout: Layout) -> bool:
        """Whether the samples of an optimizer step can be dealt out to the data-parallel ranks."""
        return self.samples_per_step % (layout.dp * self.micro_batch_size) == 0

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch, or 1 where a token budget decides."""
        training = self.config.training
        return 1 if training.use_dynamic_batch_size else training.micro_batch_size


def plan_scale(request: ScaleRequest) -> ScalePlan:
    """The whole arithmetic. Pure: equal requests give equal plans."""
    placement = plan_placement(request.config)
    layout = plan_layout(request.config)
    problems = tuple(layout_problems(layout, request.spec))
    engine = _engine(request, placement)
    phases: tuple[PhaseMemory, ...] = ()
    host: tuple[MemoryPart, ...] = ()
    if not problems and request.hardware.kind is not None:
        model, work = request.model, _workload(request, engine, layout)
        phases = plan_phases(model, layout, work)
        host = host_parts(
            model,
            layout,
            work,
            gpus_per_node=placement.trainer_gpus_per_node,
            reference=_has_reference(request.config),
            samples=request.samples_per_rollout,
        )
    return ScalePlan(
        request.hardware,
        placement,
        layout,
        problems,
        request.rollout_format,
        engine,
        phases,
        host,
        exports=_exports(request),
    )


def plan_layout(config: RunConfig) -> Layout:
    """The layout that a run file asks for; on CPU every rank is a process."""
    parallel, cluster = config.parallel, config.cluster
    replica = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    return Layout(
        world=cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
        or replica * config.training.data_parallel_size,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        virtual_stage_layers=parallel.num_layers_per_virtual_pipeline_stage,
        first_stage_layers=parallel.decoder_first_pipeline_num_layers,
        last_stage_layers=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=parallel.sequence_parallel,
    )


def nearest_that_fits(request: ScaleRequest, asked: Layout) -> Layout | None:
    """The nearest layout that divides the model and fits the GPU in every phase with room to spare."""
    model, engine = request.model, _engine(request, plan_placement(request.config))

    def fits(layout: Layout) -> bool:
        if not request.splits_steps(layout):
            return False
        if request.hardware.kind is None:
            return True
        phases = plan_phases(model, layout, _workload(request, engine, layout))
        return all(phase.total_bytes <= COMFORT * request.hardware.kind.memory_bytes for phase in phases)

    return nearest_layout(asked, request.spec, fits)


def larger_that_fits(request: ScaleRequest, asked: Layout) -> Layout | None:
    """The nearest layout over 2, 4, … 64 times the ranks, the fewest that have one that works."""
    grown = (replace(asked, world=asked.world * 2**doublings) for doublings in range(1, 7))
    return next((near for layout in grown if (near := nearest_that_fits(request, layout))), None)


def _engine(request: ScaleRequest, placement: Placement) -> EnginePlan | None:
    kind, sglang = request.hardware.kind, request.config.sglang.server_args()
    if kind is None or placement.rollout_gpus < placement.gpus_per_engine:
        return None
    draft = drafting_layers(request.config, request.spec)
    return plan_engine(
        request.model,
        gpus=placement.gpus_per_engine,
        gpu_bytes=kind.memory_bytes,
        static_fraction=float(sglang.get("mem_fraction_static", STATIC_FRACTION)),
        weight_format=request.rollout_format,
        plain=request.dtype,
        int4_group_size=request.config.precision.int4_group_size,
        kv_bytes=KV_BYTES.get(str(sglang.get("kv_cache_dtype")), 2),
        draft_layers=len(draft.layers) if draft else 0,
        draft_parameters=draft.num_parameters(request.spec.hidden_size) if draft else 0,
    )


def _workload(request: ScaleRequest, engine: EnginePlan | None, layout: Layout) -> Workload:
    config = request.config
    training, cluster = config.training, config.cluster
    longest = -(-request.max_context_len // layout.cp)
    if training.use_dynamic_batch_size and training.max_tokens_per_gpu:
        # A sample is never split over micro-batches: a longer one than the budget makes its own.
        tokens = max(training.max_tokens_per_gpu, longest)
        no_grad = max(training.log_probs_max_tokens_per_gpu or tokens, longest)
    else:
        tokens = no_grad = training.micro_batch_size * longest
    return Workload(
        numerics=_numerics(config, request.dtype),
        engine=engine,
        max_context_len=request.max_context_len,
        train_tokens=tokens,
        log_prob_tokens=no_grad,
        replay=request.replay,
        colocate=cluster.colocate,
        offload_train=bool(cluster.offload_train),
        offload_rollout=bool(cluster.offload_rollout),
        bucket_bytes=config.weight_sync.update_weight_buffer_size,
        critic=model_shape(request.spec.critic) if trains_critic(config) else None,
    )


def _numerics(config: RunConfig, dtype: Format) -> TrainerNumerics:
    training, precision = config.training, config.precision
    chunk = training.log_probs_chunk_size
    return TrainerNumerics(
        dtype=dtype,
        fp8=precision.fp8_format is not None,
        int4_qat=precision.int4_qat,
        fp8_param_gather=precision.fp8_param_gather,
        fp32_gradients=training.accumulate_allreduce_grads_in_fp32,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        optimizer_on_host=config.optimizer.optimizer_cpu_offload,
        recompute=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers or 1,
        log_probs_chunk_tokens=chunk if chunk > 0 else None,
    )


def _has_reference(config: RunConfig) -> bool:
    return config.algorithm.use_kl_loss or config.algorithm.kl_coef != 0


def _exports(request: ScaleRequest) -> tuple[tuple[str, str], ...]:
    """Environment variables that the hardware asks for in every worker."""
    variables = {}
    if request.hardware.kind is not None:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        if request.config.precision.fp8_recipe == "blockwise":
            variables["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = (
                "1" if fp8_scales(request.config, request.hardware) == "fp32" else "0"
            )
    return tuple(variables.items())
