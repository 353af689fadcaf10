"""NativeTrainer: log-probs, losses and optimizer steps of one native decoder, in one process or several.

>>> trainer = NativeTrainer(spec, settings)
>>> trainer.load_weights(read_hf(checkpoint))
>>> result = trainer.train_step(batch)

With `parallel` (see `process_group`) this process is one of N ranks. Each of them makes the same calls with
the same arguments, the whole rollout batch included; a rank trains on its share, holds its shard of weights
and moments (FSDP2), and returns the results of the whole. The result is that of one rank up to the order of
floating-point sums, except for the load-balancing loss, which is a mean over micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from miles.arch.spec import ArchSpec
from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.models.numerics import FAST, Numerics
from miles.models.routing import Router
from miles.training.critic_course import CriticCourse
from miles.training.knobs import Knobs
from miles.training.native.batch_checks import validate_batch
from miles.training.native.checkpoint import TrainerTensors, load_checkpoint, save_checkpoint
from miles.training.native.critic import Critic
from miles.training.native.draft import DraftTraining
from miles.training.native.forward import forward, make_router
from miles.training.native.gap_watch import GapWatch
from miles.training.native.measurements import PassMeasurements
from miles.training.native.micro_batches import MicroBatch, cut_micro_batches, trained_sequences
from miles.training.native.optimizer import MasterAdamW
from miles.training.native.probe import gap_without_replay
from miles.training.native.ranks import OneRank, Ranks
from miles.training.native.rounding_watch import RoundingWatch, rounded_layers
from miles.training.native.shared_prompts import may_share_prompts
from miles.training.native.state import CriticProgress, TrainerState
from miles.training.native.tensor_layout import TensorLayout, WholeTensors
from miles.training.native.update import OptimizerStep, Update
from miles.training.rollout_trainer import RolloutTrainer
from miles.training.settings import TrainerSettings
from miles.training.teacher import Teacher
from miles.training.trainer import LogProbs, ModelRole
from miles.weights.low_precision import fake_quantise
from miles.weights.native_map import joint, to_published

if TYPE_CHECKING:
    from miles.training.native.process_group import DataParallel


class NativeTrainer(RolloutTrainer):
    """The torch trainer. Implements `training.trainer.Trainer`.

    Args:
        device: where the model lives; with `parallel` it is that of the rank.
        parallel: this process's place among the ranks; None trains alone.
        dtype: the format of the model's weights and activations; optimizer state is fp32 in any case.
        source_dir: the HF checkpoint whose config.json and tokenizer go along with saved weights.
        numerics: how the decoder computes; exact bits need the engine to have the same object.
        settings: with `settings.critic`, a critic lives beside the policy; it is uninitialised until
            `load_critic` or `start_critic`.
        spec: with `spec.mtp`, the MTP layers are loaded, saved and handed over along with the policy, and
            trained where the settings ask for it.
    """

    def __init__(
        self,
        spec: ArchSpec,
        settings: TrainerSettings,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        source_dir: Path | None = None,
        parallel: DataParallel | None = None,
        numerics: Numerics = FAST,
    ) -> None:
        settings.validate()
        self.spec, self.settings, self.dtype, self.source_dir = spec, settings, dtype, source_dir
        self.device = torch.device(device) if parallel is None else parallel.device
        self.ranks: Ranks = parallel or OneRank()
        self.layout = _layout(self.device, parallel)
        self._numerics, self._told_numerics = numerics, False
        self.decoder = self._make_decoder()
        self.decoder.recompute_num_layers = settings.recompute_num_layers
        self.decoder.recompute(settings.recompute_modules)
        self.reference: Decoder | None = None
        self.gap_watch: GapWatch | None = None
        """Set for a run that promises the engine's bits."""
        self.optimizer = self._make_optimizer(self.decoder)
        self.draft = self._make_draft()
        self._rounding: RoundingWatch | None = None
        self._unprobed: TrainBatch | None = None
        self._probed: dict[str, float] = {}
        if settings.precision is not None:
            fake_quantise(settings.precision, self.decoder, self.draft)
            self._rounding = RoundingWatch(rounded_layers(self.decoder))
        self.draft_training = self._make_draft_training()
        self.critic: Critic | None = self._make_critic()
        knobs = Knobs.from_settings(settings)
        self.state = TrainerState(
            knobs=knobs,
            configured=knobs,
            draft_updates=None if self.draft_training is None else 0,
            critic=None if self.critic is None else CriticProgress(),
        )

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], model: ModelRole = "policy") -> None:
        """Fill the policy with its MTP layers, or the reference, which has none, from tensors under published
        names, in any dtype.
        """
        if model == "policy":
            self.layout.load(self.spec, self._parameters, tensors, where="weights")
            self.optimizer.reset_masters()
            if self.draft_training is not None:
                self.draft_training.optimizer.reset_masters()
            return
        if self.reference is None:
            self.reference = self._make_decoder().requires_grad_(False)
            if self.settings.precision is not None:
                fake_quantise(self.settings.precision, self.reference)
        native = dict(self.reference.named_parameters())
        self.layout.load(self.spec.policy, native, tensors, where="reference weights")

    def load_teacher(self, spec: ArchSpec, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """A frozen model of any family beside the policy, from tensors under its published names."""
        decoder = self.layout.make_decoder(spec, self.dtype).requires_grad_(False)
        self.layout.load(spec, dict(decoder.named_parameters()), tensors, where="teacher weights")
        temperature, chunk = self.settings.algorithm.temperature, self.settings.log_probs_chunk_size

        @torch.no_grad()
        def read(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
            return [
                forward(
                    decoder, each, Router(), temperature, with_entropy=False, chunk_tokens=chunk
                ).log_probs_R
                for each in micro_batches
            ]

        def cut(batch: TrainBatch, indices_N: np.ndarray) -> list[MicroBatch]:
            return cut_micro_batches(batch, indices_N, self.settings, self.device, self.ranks)

        self.teacher = Teacher(spec, cut, read, self.ranks)

    def init_weights(self, seed: int) -> None:
        """Random weights, the same for any number of ranks."""
        generator = torch.Generator().manual_seed(seed)
        source = Decoder(self.spec, dtype=self.dtype)
        source.init_weights(generator)
        draft = None if self.spec.mtp is None else MtpDraft(self.spec, dtype=self.dtype)
        if draft is not None:
            draft.init_weights(generator)
        self.load_weights(to_published(source, draft))

    def named_weights(self, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Detached weights in the trained dtype under published names; views of the live parameters where one
        process holds them in that dtype.

        On several ranks one native tensor at a time is gathered: every rank has to iterate to the end, and
        only the first is given tensors, or all of them with `everywhere`.
        """
        return self.layout.published(self.spec, self._parameters, self.dtype, everywhere)

    @torch.no_grad()
    def log_probs(self, batch: TrainBatch, model: ModelRole = "policy") -> LogProbs:
        """Log-probs (and entropy, when the settings ask for it) of the trained rows.

        The policy replays the batch's routes; the reference decides for itself, since the routes are not
        its own.
        """
        validate_batch(batch, self.spec)
        self.ranks.require_same_input(batch, self.state)
        decoder = self._model(model)
        replay = self.settings.replay_routes and model == "policy"
        measurements = PassMeasurements(self.spec)
        log_probs = np.zeros(batch.num_tokens, dtype=np.float32)
        entropy = log_probs.copy() if self.settings.algorithm.needs_entropy else None
        indices_N = trained_sequences(batch)
        share = may_share_prompts(decoder, self.settings, batch)
        for micro_batch in cut_micro_batches(batch, indices_N, self.settings, self.device, self.ranks, share):
            router = make_router(micro_batch, replay=replay, measure=True)
            output = forward(
                decoder,
                micro_batch,
                router,
                self.settings.algorithm.temperature,
                with_entropy=entropy is not None,
                chunk_tokens=self.settings.log_probs_chunk_size,
            )
            if micro_batch.padding:
                continue
            rows = micro_batch.trained_rows
            log_probs[rows] = output.log_probs_R.cpu().numpy()
            if entropy is not None and output.entropy_R is not None:
                entropy[rows] = output.entropy_R.cpu().numpy()
            measurements.add_routing(micro_batch, router, replay)
            if model == "policy":
                measurements.add_log_probs(micro_batch, output, batch.newest_rollout_log_probs)
                if self.gap_watch is not None:
                    self.gap_watch.see(decoder, micro_batch, batch, output)
        log_probs = self._over_ranks(log_probs, batch)
        entropy = None if entropy is None else self._over_ranks(entropy, batch)
        metrics = self._pass_metrics(measurements.over(self.ranks), model, log_probs)
        return LogProbs(log_probs, entropy, replay and batch.routes is not None, metrics)

    def save(self, directory: Path, *, optimizer: bool = True) -> None:
        """Write weights, optimizer moments, counters and knobs into an existing directory.

        On several ranks the first one writes, and is the one that raises when the disk refuses. What was
        written can be loaded on any number of ranks.
        """
        save_checkpoint(
            directory,
            self._tensors,
            self.state,
            self.source_dir,
            optimizer=optimizer,
            critic=self._critic_tensors,
        )
        if optimizer:
            self._save_reference(directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; weights, moments, counters and knobs are the same bits afterwards, but
        for the knobs that the configuration has changed since.

        Every rank reads its own part of the files.
        """
        state = load_checkpoint(directory, self._tensors, self._critic_tensors)
        self.state = state.under(Knobs.from_settings(self.settings))
        self._load_reference(directory)

    def _reference_weights(self) -> tuple[Iterator[tuple[str, Tensor]], bool]:
        assert self.reference is not None
        native = dict(self.reference.named_parameters())
        return self.layout.published(self.spec.policy, native, self.dtype), self.layout.writes

    def _before_updates(self, batch: TrainBatch) -> dict[str, float]:
        if self._rounding is not None:
            self._rounding.measure()
        self._unprobed = batch
        return {}

    def _after_updates(self) -> dict[str, float]:
        rounding = {} if self._rounding is None else self._rounding.metrics(self.ranks.sum)
        return self._probed | rounding

    def _probe(self, seen: int, measurements: PassMeasurements | None) -> None:
        """Measure what would be without replay, before the first update: by what its pass over `seen`
        sequences measured, where that was the whole batch on this one rank.
        """
        whole, self._unprobed = self._unprobed, None
        if whole is not None:
            saw_all = seen == whole.num_sequences and self.ranks.size == 1
            measured = measurements if saw_all else None
            self._probed = gap_without_replay(self.decoder, whole, self.settings, self.device, measured)

    def _take_events(self) -> tuple[dict[str, Any], ...]:
        broken = None if self.gap_watch is None else self.gap_watch.take_event()
        events = (self._numerics_event(), broken)
        return tuple(event for event in events if event is not None)

    def _numerics_event(self) -> dict[str, Any] | None:
        """Which numerics were found on this machine: told once, with the first step."""
        chosen = self._numerics.chosen()
        if self._told_numerics or not chosen:
            return None
        self._told_numerics = True
        return {"kind": "numerics", "numerics": self._numerics.name, **chosen}

    def _update(self, batch: TrainBatch, measurements: PassMeasurements | None) -> Update:
        taught = None if self.critic is None else self.critic.update(batch, self.state)
        if taught is not None and self._warms_up:
            self._probe(0, None)
            return self._counted(Update.of_critic(taught))
        step = OptimizerStep(
            decoder=self.decoder,
            optimizer=self.optimizer,
            settings=self.settings,
            state=self.state,
            device=self.device,
            measurements=measurements,
            ranks=self.ranks,
            layout=self.layout,
            gap_watch=self.gap_watch,
            draft=self.draft_training,
            before_update=lambda: self._probe(batch.num_sequences, measurements),
        )
        return self._counted(step.run(batch).beside(taught))

    def _model(self, model: ModelRole) -> Decoder:
        if model == "policy":
            return self.decoder
        if self.reference is None:
            raise RunError(
                "the loss needs a reference model, and none was loaded",
                fix="set model.ref_load, or switch the KL term off",
            )
        return self.reference

    def _make_decoder(self) -> Decoder:
        decoder = self.layout.make_decoder(self.spec, self.dtype)
        decoder.use_numerics(self._numerics)
        return decoder

    def _make_optimizer(self, module: nn.Module) -> MasterAdamW:
        return MasterAdamW(dict(module.named_parameters()), self.settings.optimizer, self.layout.total_norm)

    def _make_draft(self) -> MtpDraft | None:
        if self.spec.mtp is None:
            return None
        draft = self.layout.make_draft(self.spec, self.dtype)
        draft.use_numerics(self._numerics)
        return draft

    def _make_draft_training(self) -> DraftTraining | None:
        if not self.settings.train_mtp:
            return None
        assert self.draft is not None, "a model without MTP layers cannot train them"
        settings, optimizer = self.settings, self._make_optimizer(self.draft)
        return DraftTraining(
            self.draft, optimizer, settings.mtp_training_steps, settings.mtp_loss_scaling_factor
        )

    def _make_critic(self) -> Critic | None:
        settings = self.settings
        if settings.critic is None:
            return None
        course = CriticCourse(self.spec, settings, settings.critic)
        return Critic(course, self.dtype, self.device, self.layout, self.ranks, self._numerics)

    @property
    def _critic_tensors(self) -> TrainerTensors | None:
        critic = self.critic
        if critic is None:
            return None
        own = critic.optimizer
        return TrainerTensors(critic.spec, own.parameters, own, self.dtype, self.layout)

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Of policy and draft, under native names."""
        own = self.optimizer.parameters
        return own if self.draft is None else joint(own, dict(self.draft.named_parameters()))

    @property
    def _tensors(self) -> TrainerTensors:
        drafting = None if self.draft_training is None else self.draft_training.optimizer
        return TrainerTensors(self.spec, self._parameters, self.optimizer, self.dtype, self.layout, drafting)


def _layout(device: torch.device, parallel: DataParallel | None) -> TensorLayout:
    if parallel is None:
        return WholeTensors(device)
    # FSDP2 takes as long to import as the rest of torch; one process never needs it.
    from miles.training.native.sharded_tensors import ShardedTensors

    return ShardedTensors(parallel)
