"""MegatronTrainer: the trainer protocol on megatron-core, in one process or cut over many.

>>> trainer = MegatronTrainer(spec, settings, MegatronLayout(pp=2), parallel=parallel)
>>> trainer.load_weights(read_hf(checkpoint))
>>> result = trainer.train_step(batch)

Every process makes the same calls with the same arguments, the whole rollout batch included. The results are
those of the native trainer up to the order of floating-point sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.training.critic_course import CriticCourse
from miles.training.knobs import Knobs
from miles.training.megatron.groups import MegatronRanks, open_groups
from miles.training.megatron.layout import MegatronLayout, require_expressible
from miles.training.native.batch_checks import validate_batch
from miles.training.native.measurements import PassMeasurements
from miles.training.native.micro_batches import (
    MicroBatch,
    cut_micro_batches,
    make_micro_batch,
    trained_sequences,
)
from miles.training.native.probe import NO_REPLAY, probed_sequences
from miles.training.native.process_group import DataParallel
from miles.training.native.rounding_watch import RoundingWatch
from miles.training.native.state import CriticProgress, TrainerState
from miles.training.native.update import Update
from miles.training.rollout_trainer import RolloutTrainer
from miles.training.settings import TrainerSettings
from miles.training.teacher import Teacher
from miles.training.trainer import LogProbs, ModelRole
from miles.weights.native_map import to_published

if TYPE_CHECKING:
    from miles.training.megatron.checkpoint import TrainerTensors
    from miles.training.megatron.critic import Critic
    from miles.training.megatron.dist_checkpoint import Parts
    from miles.training.megatron.draft import DraftTraining
    from miles.training.megatron.optimizer import MasterAdam
    from miles.training.megatron.passes import Chunks
    from miles.training.megatron.residence import Held


class MegatronTrainer(RolloutTrainer):
    """Implements `training.trainer.Trainer`.

    Args:
        layout: how the model is cut over the ranks; what is left over is data-parallel.
        device: where the model lives; with `parallel` it is that of the rank.
        dist_checkpoints: save in Megatron's own form (`dist_checkpoint`), not under published names.
        background_saves: let other processes write them while training goes on (`finish_saving`).
        parallel: this process's place in the world of trainer processes; None trains alone.
        dtype: fp32 or bf16; optimizer state is fp32 in any case.
        source_dir: the HF checkpoint whose config.json and tokenizer go along with saved weights.
        settings: with `settings.critic`, a critic lives beside the policy; its weights are undefined until
            `load_critic` or `start_critic`.
    """

    def __init__(
        self,
        spec: ArchSpec,
        settings: TrainerSettings,
        layout: MegatronLayout | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        source_dir: Path | None = None,
        parallel: DataParallel | None = None,
        dist_checkpoints: bool = False,
        background_saves: bool = False,
    ) -> None:
        settings.validate()
        require_expressible(spec, layout)
        self.spec, self.settings, self.dtype, self.source_dir = spec, settings, dtype, source_dir
        self._dist_checkpoints = dist_checkpoints
        self.layout = layout or MegatronLayout()
        self.device = torch.device(device) if parallel is None else parallel.device
        open_groups(self.layout, spec.num_layers)
        # Only now: what imports megatron-core must find it fit for this machine.
        from miles.training.megatron.background_save import BackgroundSave
        from miles.training.megatron.chunks import built, built_draft, draft_training, training_chunks
        from miles.training.megatron.optimizer import MasterAdam
        from miles.training.megatron.rounded_weights import int4_policy
        from miles.training.megatron.sharded_adam import ShardedAdam
        from miles.training.megatron.tensors import MegatronTensors

        self._background = BackgroundSave() if background_saves else None
        self.ranks = MegatronRanks()
        with warnings.catch_warnings():
            # megatron-core deprecates arguments of its own calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._chunks = training_chunks(spec.policy, self.layout, settings, dtype, self.device)
            self._draft = built_draft(spec, self.layout, settings, dtype, self.device)
            self._draft_training: DraftTraining | None = None
            if settings.train_mtp:
                self._draft_training = draft_training(spec, self._chunks, self._draft, settings, dtype)
            self.critic: Critic | None = self._make_critic()
            self._build_reference = lambda: built(spec.policy, self.layout, settings, dtype, self.device)
        self.tensors = MegatronTensors(spec, self._chunks.bare, self.device, self._draft)
        self._policy_tensors = MegatronTensors(spec.policy, self._chunks.bare, self.device)
        adam = ShardedAdam if self.layout.options.distributed_optimizer else MasterAdam
        self.optimizer = adam(self._chunks.wrapped, settings.optimizer, dtype, self.layout)
        self._reference: Chunks | None = None
        self._rounding: RoundingWatch | None = None
        if int4_policy(settings) is not None:
            rounded = self._chunks.rounded
            self._rounding = RoundingWatch(
                {layer: rounded.get(layer, []) for layer in range(spec.num_layers)}
            )
        knobs = Knobs.from_settings(settings)
        self.state = TrainerState(
            knobs=knobs,
            configured=knobs,
            draft_updates=0 if settings.train_mtp else None,
            critic=None if self.critic is None else CriticProgress(),
        )

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], model: ModelRole = "policy") -> None:
        """Fill the policy or the reference from tensors under published names, in any dtype."""
        if model == "policy":
            self.tensors.load(tensors, where="weights")
            self.optimizer.reset_masters()
            if self._draft_optimizer is not None:
                self._draft_optimizer.reset_masters()
            return
        from miles.training.megatron.tensors import MegatronTensors

        if self._reference is None:
            self._reference = self._build_reference()
        MegatronTensors(self.spec.policy, self._reference.bare, self.device).load(
            tensors, where="reference weights"
        )

    def load_teacher(self, spec: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """A frozen model beside the policy, cut like it, from tensors under its published names."""
        from miles.training.megatron.chunks import built
        from miles.training.megatron.passes import Pass, PassSettings
        from miles.training.megatron.tensors import MegatronTensors

        require_expressible(spec, self.layout)
        chunks = built(spec, self.layout, self.settings, self.dtype, self.device)
        MegatronTensors(spec, chunks.bare, self.device).load(tensors, where="teacher weights")
        settings = PassSettings(
            replay=False,
            measure=False,
            temperature=self.settings.algorithm.temperature,
            with_entropy=False,
            chunk_tokens=self.settings.log_probs_chunk_size,
        )

        def read(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
            return [output.log_probs_R for output in Pass(chunks, settings, None).run(micro_batches)]

        def cut(batch: TrainBatch, indices_N: np.ndarray) -> list[MicroBatch]:
            return self._filled(cut_micro_batches(batch, indices_N, self.settings, self.device, self.ranks))

        self.teacher = Teacher(spec, cut, read, self.ranks)

    def init_weights(self, seed: int) -> None:
        """Random weights, those of the native trainer, the same for any layout."""
        generator = torch.Generator().manual_seed(seed)
        source = Decoder(self.spec, dtype=self.dtype)
        source.init_weights(generator)
        draft = None if self.spec.mtp is None else MtpDraft(self.spec, dtype=self.dtype)
        if draft is not None:
            draft.init_weights(generator)
        self.load_weights(to_published(source, draft))

    def named_weights(self, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Detached weights in the trained dtype under published names.

        On several ranks they are gathered in buckets: every rank has to iterate to the end, and only the
        first is given tensors, or all of them with `everywhere`.
        """
        self.optimizer.settle()
        return self.tensors.published(self.dtype, everywhere=everywhere)

    def log_probs(self, batch: TrainBatch, model: ModelRole = "policy") -> LogProbs:
        """Log-probs (and entropy, when the settings ask for it) of the trained rows.

        The policy replays the batch's routes; the reference decides for itself, since the routes are not its
        own.
        """
        from miles.training.megatron.passes import Pass, PassSettings

        validate_batch(batch, self.spec)
        self.ranks.require_same_input(batch, self.state)
        algorithm = self.settings.algorithm
        replay = self.settings.replay_routes and model == "policy"
        settings = PassSettings(
            replay=replay,
            measure=True,
            temperature=algorithm.temperature,
            with_entropy=algorithm.needs_entropy,
            chunk_tokens=self.settings.log_probs_chunk_size,
        )
        micro_batches = self._cut(batch, trained_sequences(batch))
        outputs = Pass(self._model(model), settings, None).run(micro_batches)
        measurements = PassMeasurements(self.spec)
        log_probs = np.zeros(batch.num_tokens, dtype=np.float32)
        entropy = log_probs.copy() if algorithm.needs_entropy else None
        for micro_batch, output in zip(micro_batches, outputs, strict=True):
            if micro_batch.padding:
                continue
            rows = micro_batch.trained_rows
            log_probs[rows] = output.log_probs_R.cpu().numpy()
            if entropy is not None and output.entropy_R is not None:
                entropy[rows] = output.entropy_R.cpu().numpy()
            measurements.add_routing(micro_batch, output.router, replay)
            if model == "policy":
                measurements.add_log_probs(micro_batch, output, batch.newest_rollout_log_probs)
        log_probs = self._over_ranks(log_probs, batch)
        entropy = None if entropy is None else self._over_ranks(entropy, batch)
        metrics = self._pass_metrics(measurements.over(self.ranks), model, log_probs)
        return LogProbs(log_probs, entropy, replay and batch.routes is not None, metrics)

    def hold(self, held: Held) -> None:
        """Keep this much of the trainer on its GPU, while engines have the rest of it."""
        from miles.training.megatron.residence import hold

        wrapped, optimizers = list(self._chunks.wrapped), list(self.optimizer.parts())
        if self._draft_training is not None:
            wrapped.append(self._draft_training.wrapped)
            optimizers += self._draft_training.optimizer.parts()
        references = () if self._reference is None else self._reference.bare
        hold(held, wrapped, optimizers, references, self.device)
        if self.critic is not None:
            # No engine is sent its weights.
            theirs: Held = "everything" if held == "everything" else "nothing"
            hold(theirs, self.critic.chunks.wrapped, self.critic.optimizer.parts(), (), self.device)

    def save(self, directory: Path, *, optimizer: bool = True) -> None:
        """Write weights, optimizer moments, counters and knobs into an existing directory.

        The first rank writes, and is the one that raises when the disk refuses. What was written can be
        loaded in any layout, and by the native trainer. In Megatron's own form every rank writes, into the
        same directory; without `optimizer`, only published names are.
        """
        self.optimizer.settle()
        if self.critic is not None:
            self.critic.optimizer.settle()
        if self._dist_checkpoints and optimizer:
            from miles.training.megatron.dist_checkpoint import save_dist_checkpoint

            save_dist_checkpoint(directory, self._in_parts, self.state, self.source_dir, self._background)
            self._save_reference(directory)
            return
        from miles.training.megatron.checkpoint import save_checkpoint

        save_checkpoint(
            directory,
            self._on_disk,
            self.state,
            self.source_dir,
            with_optimizer=optimizer,
            critic=self._critic_on_disk,
        )
        if optimizer:
            self._save_reference(directory)

    def finish_saving(self, *, wait: bool) -> bool:
        """Whether what `save` began is on disk; `wait` until it is. All ranks ask together.

        Raises CheckpointError when it could not be written.
        """
        return self._background is None or self._background.finish(wait=wait)

    def load(self, directory: Path) -> None:
        """Restore what any trainer's `save` wrote, but for knobs that the configuration has changed since."""
        from miles.training.megatron.checkpoint import load_checkpoint
        from miles.training.megatron.dist_checkpoint import DIST_DIR, load_dist_checkpoint

        if (directory / DIST_DIR).is_dir():
            state = load_dist_checkpoint(directory, self._in_parts)
        else:
            state = load_checkpoint(directory, self._on_disk, self._policy_tensors, self._critic_on_disk)
        self.state = state.under(Knobs.from_settings(self.settings))
        self._load_reference(directory)

    def _reference_weights(self) -> tuple[Iterator[tuple[str, Tensor]], bool]:
        from miles.training.megatron.tensors import MegatronTensors

        assert self._reference is not None
        tensors = MegatronTensors(self.spec.policy, self._reference.bare, self.device)
        return tensors.published(self.dtype), dist.get_rank() == 0

    def _update(self, batch: TrainBatch, measurements: PassMeasurements | None) -> Update:
        from miles.training.megatron.update import MegatronStep

        taught = None if self.critic is None else self.critic.update(batch, self.state)
        if taught is not None and self._warms_up:
            return self._counted(Update.of_critic(taught))
        step = MegatronStep(
            chunks=self._chunks,
            tensors=self.tensors,
            optimizer=self.optimizer,
            settings=self.settings,
            state=self.state,
            ranks=self.ranks,
            cut=self._cut,
            measurements=measurements,
            draft=self._draft_training,
        )
        return self._counted(step.run(batch).beside(taught))

    def _before_updates(self, batch: TrainBatch) -> dict[str, float]:
        """The gap without routing replay, measured on the same sequences by every data-parallel rank."""
        from miles.training.megatron.passes import Pass, PassSettings

        if self._rounding is not None:
            self._rounding.measure()
        probed = probed_sequences(batch, self.settings)
        if probed is None:
            return {}
        micro_batch = make_micro_batch(batch, probed, self.device, self._shares_prompts)
        if micro_batch.num_trained == 0:
            return {}
        settings = PassSettings(
            replay=False,
            measure=True,
            temperature=self.settings.algorithm.temperature,
            with_entropy=False,
            chunk_tokens=self.settings.log_probs_chunk_size,
        )
        output, *_ = Pass(self._chunks, settings, None).run(self._filled([micro_batch]))
        measurements = PassMeasurements(self.spec)
        measurements.add_log_probs(micro_batch, output, batch.newest_rollout_log_probs)
        measurements.add_routing(micro_batch, output.router, replay=False)
        return measurements.gap_metrics(NO_REPLAY) | measurements.agreement_metrics(NO_REPLAY)

    def _after_updates(self) -> dict[str, float]:
        from miles.training.megatron.rounded_weights import over_all_ranks

        return {} if self._rounding is None else self._rounding.metrics(over_all_ranks)

    def _cut(self, batch: TrainBatch, indices_N: np.ndarray) -> list[MicroBatch]:
        found = cut_micro_batches(
            batch, indices_N, self.settings, self.device, self.ranks, self._shares_prompts
        )
        return self._filled(found)

    def _filled(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """An interleaved pipeline takes them in rounds of its stages; what is added counts for nothing."""
        if self.layout.virtual_stage_layers is None or not micro_batches:
            return micro_batches
        added = replace(micro_batches[-1], padding=True)
        return [*micro_batches, *[added] * (-len(micro_batches) % self.layout.pp)]

    def _make_critic(self) -> Critic | None:
        from miles.training.megatron.critic import Critic

        settings = self.settings
        if settings.critic is None:
            return None
        course = CriticCourse(self.spec, settings, settings.critic)
        return Critic(course, self.layout, self.dtype, self.device, self.ranks, self._cut)

    @property
    def _draft_optimizer(self) -> MasterAdam | None:
        """That of the MTP layers, where they are trained."""
        return None if self._draft_training is None else self._draft_training.optimizer

    @property
    def _on_disk(self) -> TrainerTensors:
        from miles.training.megatron.checkpoint import TrainerTensors

        trains = self.settings.train_mtp
        spec, tensors = (self.spec, self.tensors) if trains else (self.spec.policy, self._policy_tensors)
        return TrainerTensors(self.spec, self.tensors, spec, tensors, self.optimizer, self._draft_optimizer)

    @property
    def _critic_on_disk(self) -> TrainerTensors | None:
        from miles.training.megatron.checkpoint import TrainerTensors

        critic = self.critic
        if critic is None:
            return None
        own = critic.tensors
        return TrainerTensors(critic.spec, own, critic.spec, own, critic.optimizer, None)

    @property
    def _in_parts(self) -> Parts:
        """What goes into Megatron's own form of a checkpoint."""
        from miles.training.megatron.dist_checkpoint import Parts

        critic, on_disk = self.critic, self._critic_on_disk
        theirs = None if critic is None or on_disk is None else Parts(on_disk, critic.chunks.bare)
        return Parts(self._on_disk, self._chunks.bare, self._draft, theirs)

    @property
    def _shares_prompts(self) -> bool:
        """Rows that are padded or cut, Transformer Engine's attention and windows take whole sequences."""
        layout = self.layout
        cut = layout.implementation != "local" or layout.sequence_parallel or layout.cp > 1
        return not cut and self.spec.has_plain_attention

    def _model(self, model: ModelRole) -> Chunks:
        if model == "policy":
            return self._chunks
        if self._reference is None:
            raise RunError(
                "the loss needs a reference model, and none was loaded",
                fix="set model.ref_load, or switch the KL term off",
            )
        return self._reference
