"""What a preflight rule looks at: the resolved run file, the facts, and what follows from both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from miles.arch import ArchSpec, Dtype, with_mtp
from miles.arch.precision import PrecisionPolicy
from miles.arch.specs import shipped_names, shipped_spec
from miles.config import ResolvedConfig, RunConfig, find_key
from miles.planning.batches import BatchPlan, plan_batches, plan_num_rollouts
from miles.planning.capabilities import Part, capabilities
from miles.planning.checkpoints import CheckpointPlan, plan_checkpoints
from miles.planning.critic import trains_critic
from miles.planning.decode_kernel import EngineKind, KernelPlan, plan_decode
from miles.planning.engine_limits import EngineLimits, plan_engine_limits
from miles.planning.exact_kernels import exact_obstacles
from miles.planning.facts import Facts
from miles.planning.formats import Format
from miles.planning.hardware import Hardware
from miles.planning.layout import Layout
from miles.planning.memory import MemoryPlan, estimate_memory
from miles.planning.precision import plan_precision
from miles.planning.recompute import plan_recompute
from miles.planning.scale import (
    ScalePlan,
    ScaleRequest,
    larger_that_fits,
    nearest_that_fits,
    plan_layout,
    plan_scale,
)
from miles.planning.server_args import plan_server_args
from miles.planning.speculation import SpeculationPlan, drafting_layers, mtp_layers, plan_speculation
from miles.planning.stored_bytes import StoredBytes, stored_bytes
from miles.planning.threads import ThreadPlan, plan_threads
from miles.planning.train_kernel import plan_train_kernel
from miles.planning.workers import WorkersPlan, asks_for_gpus, plan_workers, trainer_ranks


@dataclass(frozen=True)
class Subject:
    """One run before it starts."""

    resolved: ResolvedConfig
    facts: Facts

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def spec(self) -> ArchSpec | None:
        """The checkpoint's architecture; where there is none, the shipped one that `model_name` names."""
        checkpoint, name = self.facts.checkpoint, self.config.model.model_name
        if checkpoint.spec is None and checkpoint.state in ("unset", "missing") and name in shipped_names():
            return shipped_spec(name)
        return checkpoint.spec

    def value(self, setting: str) -> Any:
        """The value of `section.name`."""
        return self.resolved.value(setting)

    def default(self, setting: str) -> Any:
        """The default of `section.name`; None for SGLang's own arguments."""
        field = find_key(setting)
        return field.default if field else None

    def place(self, setting: str) -> str:
        """Where the user wrote a setting; its name where nobody did."""
        origin = self.resolved.origin(setting)
        return str(origin) if origin.is_explicit else setting

    def explicit_settings(self) -> Iterator[tuple[str, Any]]:
        """Every setting that a profile, the run file or a flag sets, with its value."""
        for setting, origin in self.resolved.origins.items():
            if origin.is_explicit:
                yield setting, self.value(setting)

    @property
    def executor(self) -> str:
        """`auto` takes `inline`, one process, where that is enough: one trainer, one engine, taking turns, no
        cluster."""
        config = self.config
        if config.run.executor != "auto":
            return config.run.executor
        # SGLang servers are processes of their own under any executor.
        counts = (
            trainer_ranks(config),
            config.engine.num_engines if config.rollout.backend == "native" else 1,
            config.reward.num_reward_workers,
        )
        several = max(counts) > 1 or config.rollout.one_step_ahead or config.rollout.fully_async
        return "ray" if several or config.cluster.address is not None else "inline"

    @property
    def workers(self) -> WorkersPlan | None:
        """The processes beside the driver; None where everything happens in one."""
        return plan_workers(self.config, self.threads.count) if self.executor == "ray" else None

    def parts(self) -> tuple[tuple[str, Part], ...]:
        """The chosen trainer, engine and executor, each with the setting that chose it."""
        table = capabilities().parts
        chosen = (
            ("training.backend", table["trainer", self.config.training.backend]),
            ("rollout.backend", table["engine", self.config.rollout.backend]),
            ("run.executor", table["executor", self.executor]),
        )
        return tuple((setting, part.here(self.on_gpus)) for setting, part in chosen)

    def uses(self, setting: str) -> bool:
        """Whether some part of this run uses a setting.

        Beside a part that is not available stands the one to use instead, so that the refusal of the part is
        not repeated for each of its settings.
        """
        return setting in capabilities().common or any(
            part.uses(setting) for part in self._parts_and_instead()
        )

    def _parts_and_instead(self) -> Iterator[Part]:
        for _, part in self.parts():
            yield part
            if not part.available:
                yield next(p for p in capabilities().parts.values() if p.kind == part.kind and p.available)

    @property
    def hardware(self) -> Hardware:
        """The accelerators that the run is planned for."""
        return self.facts.hardware

    @property
    def on_gpus(self) -> bool:
        """Whether the run asks for GPUs: miles' own trainer and engine are placed on none."""
        return asks_for_gpus(self.config)

    @property
    def rollout_format(self) -> Format | None:
        """Format of the engine's weights: as set, else the checkpoint's, else the trainer's."""
        quantisation = self.facts.checkpoint.quantisation
        held = quantisation.method if quantisation else None
        return self.config.precision.rollout_format or held or self.dtype

    @cached_property
    def scale_request(self) -> ScaleRequest | None:
        """What the arithmetic of a run on GPUs needs, where all of it is known."""
        spec, dtype, context, batch = self.spec, self.dtype, self.max_context_len, self.batch
        if not self.on_gpus or spec is None or dtype is None or context is None or batch is None:
            return None
        assert self.rollout_format is not None, "it falls back to the dtype"
        return ScaleRequest(
            self.config,
            spec,
            self.hardware,
            dtype,
            self.rollout_format,
            max_context_len=context,
            samples_per_rollout=batch.samples_per_rollout,
            samples_per_step=batch.global_batch_size,
            replay=self.routing_replay,
        )

    @cached_property
    def scale(self) -> ScalePlan | None:
        """Placement, layout and memory on GPUs; None for a run that asks for none."""
        return plan_scale(self.scale_request) if self.scale_request else None

    @cached_property
    def working_layout(self) -> Layout | None:
        """The nearest layout that works over the GPUs asked for, else over the fewest more that have one."""
        if self.scale_request is None:
            return None
        asked = plan_layout(self.config)
        return nearest_that_fits(self.scale_request, asked) or larger_that_fits(self.scale_request, asked)

    @property
    def dtype(self) -> Dtype | None:
        """The type of the weights: as set, else the checkpoint's own."""
        return self.config.model.dtype or (self.spec.dtype if self.spec else None)

    @property
    def routing_replay(self) -> bool:
        """R3: as set, else on for MoE models."""
        wanted = self.config.alignment.use_rollout_routing_replay
        return self.spec is not None and self.spec.is_moe if wanted is None else wanted

    @cached_property
    def precision(self) -> PrecisionPolicy | None:
        """How every published tensor is stored and computed with, where the model is known."""
        if self.spec is None or self.dtype is None or self.rollout_format is None:
            return None
        return plan_precision(self.config, self.spec, self.hardware, self.dtype, self.rollout_format)

    @property
    def numerics(self) -> Literal["exact", "fast"]:
        """Kernels of both sides: as set, else exact where the run is to be truly on policy."""
        alignment = self.config.alignment
        return alignment.numerics or ("exact" if alignment.true_on_policy_mode else "fast")

    @cached_property
    def exact_obstacle(self) -> str | None:
        """What keeps exact numerics in torch; None where they are compiled, and for fast ones."""
        if self.numerics == "fast":
            return None
        engine, compiler = self._engine_kind, self.facts.machine.compiler
        trainer = self._trainer_of(engine)
        return next(exact_obstacles(self.config, engine, trainer, self.precision, compiler), None)

    @property
    def engine_kind(self) -> EngineKind:
        """What decides which kernel decodes."""
        return replace(self._engine_kind, exact_obstacle=self.exact_obstacle)

    @property
    def _engine_kind(self) -> EngineKind:
        """With fast numerics; quantised weights are multiplied as plain numbers in `dtype`,
        unless their format rounds activations too."""
        policy = self.precision
        stored: str | None = policy.rollout.name if policy else self.dtype
        if policy is not None and not policy.rollout.is_plain and not policy.rollout.rounds_activations:
            stored = self.dtype
        device = "cuda" if self.on_gpus else "cpu"
        guesses = self.config.sglang.speculative_algorithm is not None
        return EngineKind(device, stored, self.threads.count, self.spec, guesses)

    @property
    def decode(self) -> KernelPlan | None:
        """What decodes in a native engine; None for other engines, and where nothing is sampled."""
        if self.config.rollout.backend != "native" or self.config.algorithm.loss_type == "sft_loss":
            return None
        wanted, compiler = self.config.engine.decode_kernel, self.facts.machine.compiler
        return plan_decode(wanted, self.engine_kind, compiler)

    @property
    def trainer_kind(self) -> EngineKind:
        """What decides which kernel trains."""
        return self._trainer_of(self.engine_kind)

    def _trainer_of(self, engine: EngineKind) -> EngineKind:
        return replace(engine, computed=self.dtype, guesses=False)

    @property
    def train_kernel(self) -> KernelPlan | None:
        """What computes in a native trainer; None for other trainers."""
        if self.config.training.backend != "native":
            return None
        wanted, compiler = self.config.training.train_kernel, self.facts.machine.compiler
        return plan_train_kernel(wanted, self.trainer_kind, compiler)

    @property
    def speculation(self) -> SpeculationPlan | None:
        """How the native engine guesses ahead; None where it does not."""
        return plan_speculation(self.config.sglang) if self.config.rollout.backend == "native" else None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss asks for the frozen policy that the run starts from."""
        algorithm = self.config.algorithm
        return algorithm.loss_type == "policy_loss" and (algorithm.use_kl_loss or algorithm.kl_coef != 0)

    @property
    def starts_servers(self) -> bool:
        """Whether the run starts SGLang servers of its own."""
        rollout = self.config.rollout
        sampled = self.config.algorithm.loss_type != "sft_loss"
        return rollout.backend == "sglang" and sampled and not rollout.rollout_external_engine_addrs

    @property
    def server_args(self) -> dict[str, Any] | None:
        """What every SGLang server is told; None for other engines, and where the model is not known."""
        if (
            self.config.rollout.backend != "sglang"
            or self.engine_limits is None
            or self.rollout_format is None
        ):
            return None
        return plan_server_args(
            self.config, self.engine_limits, self.rollout_format, self.routing_replay, self.on_gpus
        )

    @property
    def batch(self) -> BatchPlan | None:
        return plan_batches(self.config)

    @property
    def num_rollouts(self) -> int | None:
        prompts = self.facts.prompts
        return plan_num_rollouts(self.config, prompts.num_rows if prompts else None)

    @property
    def optimizer_steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        if self.batch is None or self.num_rollouts is None:
            return None
        return self.num_rollouts * self.batch.steps_per_rollout

    @property
    def max_context_len(self) -> int | None:
        """Most tokens of prompt and response: as set, else by the two limits, else the model's positions."""
        rollout = self.config.rollout
        if rollout.rollout_max_context_len is not None:
            return rollout.rollout_max_context_len
        if self.spec is None or rollout.rollout_max_response_len is None:
            return None
        if rollout.rollout_max_prompt_len is None:
            return self.spec.max_position_embeddings
        return min(
            rollout.rollout_max_prompt_len + rollout.rollout_max_response_len,
            self.spec.max_position_embeddings,
        )

    @cached_property
    def threads(self) -> ThreadPlan:
        shell = self.facts.machine.variable("OMP_NUM_THREADS")
        return plan_threads(self.config.run.threads, shell, self.spec, self.facts.machine.cores)

    @property
    def engine_limits(self) -> EngineLimits | None:
        """How much one native engine takes on at once, where the length of a request is known."""
        context = self.max_context_len
        return plan_engine_limits(self.config, context, self.on_gpus) if context is not None else None

    @cached_property
    def memory(self) -> MemoryPlan | None:
        """The estimate of one process, where everything it needs is known; `scale` has that of GPUs."""
        if self.on_gpus:
            return None
        limits = self.engine_limits
        if self.spec is None or self.dtype is None or self.max_context_len is None or self.batch is None:
            return None
        assert limits is not None
        training = self.config.training
        longest = -(-self.max_context_len // self.config.parallel.context_parallel_size)
        tokens = training.max_tokens_per_gpu or training.micro_batch_size * longest
        in_own_processes = self.executor == "ray" and self.decode is not None
        return estimate_memory(
            self.spec,
            self.dtype,
            cached_tokens=limits.cached_tokens,
            micro_batch_tokens=tokens,
            reference=self.needs_reference,
            rollout_format=self.rollout_format,
            packed=self.decode is not None and self.decode.kernel == "fused",
            mtp_parameters=self._mtp_parameters,
            train_mtp=self.config.speculative.enable_mtp_training,
            servers=self.config.engine.num_engines if self.starts_servers else 0,
            recompute=plan_recompute(self.config, self.spec.num_layers),
            stored=self._stored_bytes,
            rounds=self.precision is not None and not self.precision.training.is_plain,
            draft_numbers=self._draft_numbers,
            route_bytes=self._route_bytes,
            packet=in_own_processes,
            apart=in_own_processes or self.config.weight_sync.update_weights_interval > 1,
            critic=trains_critic(self.config),
        )

    @property
    def _stored_bytes(self) -> StoredBytes | None:
        """Of the engine's weights, where they are quantised."""
        policy = self.precision
        if policy is None or self.spec is None or policy.rollout.is_plain:
            return None
        return stored_bytes(self.spec.policy, policy)

    @property
    def _draft_numbers(self) -> int:
        """What the cache of the model's own draft holds of a token. A draft with a checkpoint of its own,
        whose size is not known here, is not counted."""
        if self.spec is None or self.speculation is None:
            return 0
        used = drafting_layers(self.config, self.spec)
        return 0 if used is None else sum(layer.attention.cache_width for layer in used.layers)

    @property
    def _route_bytes(self) -> int:
        """Of the routes of one rollout at its longest, int16."""
        spec, batch, context = self.spec, self.batch, self.max_context_len
        assert spec is not None and batch is not None and context is not None
        if not self.routing_replay:
            return 0
        rollout = self.config.rollout
        # The batch that is trained on, and what waits beside it.
        batches = 1 + rollout.async_data_buffer_capacity_factor if rollout.fully_async else 1
        return int(batches * batch.samples_per_rollout) * context * len(spec.moe_layers) * spec.top_k * 2

    @property
    def _mtp_parameters(self) -> int:
        """Of the MTP layers that the run uses."""
        assert self.spec is not None
        used = with_mtp(self.spec, mtp_layers(self.config, self.spec.mtp_num_layers))
        return 0 if used.mtp is None else used.mtp.num_parameters(used.hidden_size)

    @cached_property
    def checkpoints(self) -> CheckpointPlan | None:
        """Disk space of checkpoints, where everything it needs is known."""
        if self.spec is None or self.dtype is None or self.num_rollouts is None:
            return None
        checkpoint = self.config.checkpoint
        return plan_checkpoints(
            self.spec,
            self.dtype,
            self.num_rollouts,
            checkpoint.save_interval,
            checkpoint.keep_checkpoints,
            trains_critic(self.config),
        )
