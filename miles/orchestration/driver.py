"""The driver: holds the parts of the ring together and keeps the run's books at every step boundary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from miles.data.held_groups import read_groups, write_groups
from miles.data.sample import Sample
from miles.data.source import PromptSource
from miles.diagnosis.live import SAMPLING_SETTINGS
from miles.diagnosis.monitor import Monitor
from miles.errors import RunError
from miles.orchestration.ahead import Ahead
from miles.orchestration.capsule import write_capsule
from miles.orchestration.checkpoints import CheckpointStore, LoopState
from miles.orchestration.observer import Observer
from miles.orchestration.rollout_worker import StepRollout
from miles.orchestration.saves import Saved, Saves
from miles.orchestration.supervisor import STOP_AFTER_SKIPPED_STEPS, Supervisor
from miles.orchestration.turns import NoTurns, Turns
from miles.orchestration.watch import Watch
from miles.orchestration.weight_sync import WeightSync
from miles.record import Inbox, RecordWriter, Request, events
from miles.training.native.gap_watch import ALIGNMENT_BROKEN
from miles.training.trainer import TrainResult

TRAINER_DIR = "trainer"
"""Where the trainer's part of a checkpoint lies."""
EVAL_VERSION = "rollout/weight_version/eval"
HELD_GROUPS = "held_groups.jsonl"
"""Unfinished groups of a checkpoint, where there are any."""


class RolloutSide(Protocol):
    """What the loop asks of whoever brings samples."""

    @property
    def prompts(self) -> PromptSource: ...

    async def collect(self, step: int) -> StepRollout: ...

    async def evaluate(self) -> dict[str, float]: ...

    async def set_knobs(self, patch: Mapping[str, float]) -> None: ...


class TrainSide(Protocol):
    """What the loop asks of whoever trains, in this process or in another."""

    async def train(self, samples: Sequence[Sample]) -> TrainResult: ...

    async def update_reference(self) -> None: ...

    async def set_knobs(self, patch: Mapping[str, float]) -> None: ...

    async def save(self, directory: Path, *, optimizer: bool = True) -> None: ...

    async def saved(self, *, wait: bool) -> bool: ...

    async def load(self, directory: Path) -> None: ...


class Stream(Protocol):
    """A rollout side that samples without pause, from step to step."""

    def serve(self, version: int) -> None:
        """The engines serve `version` from now on."""

    def flowing(self, step: int, last_step: int) -> AbstractAsyncContextManager[None]:
        """Samples while its body runs; `step` is given the first batch."""

    def waiting(self) -> list[list[Sample]]:
        """Groups that were drawn and not given to a step: prompts alone, or finished."""


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps."""

    num_rollout: int
    save_interval: int | None = None
    eval_interval: int | None = None
    eval_before_train: bool = True
    sample_records_per_step: int = 8
    save_optimizer: bool = True
    save_beside: bool = False
    """Checkpoints are written while the run goes on."""
    capsule_interval: int | None = None
    ref_update_interval: int | None = None
    update_weights_interval: int = 1


@dataclass
class Driver:
    """Everything the loop needs. `state` is what a checkpoint of the driver holds."""

    schedule: Schedule
    rollout: RolloutSide
    trainer: TrainSide
    weight_sync: WeightSync | None
    record: RecordWriter
    inbox: Inbox
    store: CheckpointStore
    supervisor: Supervisor
    observer: Observer
    monitor: Monitor
    state: LoopState = field(default_factory=LoopState)
    ahead: Ahead = field(default_factory=Ahead)
    turns: Turns = field(default_factory=NoTurns)
    stream: Stream | None = None
    """The rollout side again, where it samples without pause."""
    watch: Watch | None = None
    """What goes on beside the loop, where something does."""
    version: int | None = None
    """Of the weights that the engines serve: the step that made them."""
    _saves: Saves = field(init=False)
    _step_started: float = field(default_factory=time.perf_counter)
    _phase_seconds: dict[str, float] = field(default_factory=dict)
    _first_step: int | None = None
    _held: list[list[Sample]] = field(default_factory=list)
    """Groups drawn by the cursor of `state` and not trained on."""

    def __post_init__(self) -> None:
        self._saves = Saves(self.store, self.trainer, self.schedule.save_beside)

    async def begin(self) -> None:
        """Before the first step: where the untrained policy stands."""
        if self.state.step == 0:
            await self.evaluate(step=0)

    @property
    def complete(self) -> bool:
        """Whether every step is made."""
        return self.state.step >= self.schedule.num_rollout

    def next_step(self) -> int | None:
        """The number of the step to do now, or None when the run is over."""
        if self.supervisor.stop_status is not None or self.complete:
            return None
        self._step_started = time.perf_counter()
        self._phase_seconds = {}
        if self._first_step is None:
            self._first_step = self.state.step + 1
        return self.state.step + 1

    async def collect(self, step: int) -> StepRollout:
        """The samples of a step: those that were sampled ahead, else new ones."""
        sampled = self.ahead.take()
        if sampled is not None:
            return sampled
        with self.phase("rollout", step):
            return await self.rollout.collect(step)

    def sampling_ahead(self, step: int) -> AbstractAsyncContextManager[None]:
        """Sample for `step` while the body runs, when there is such a step."""
        return nullcontext() if step > self.schedule.num_rollout else self.ahead.beside(self.collect(step))

    def sampling(self) -> AbstractAsyncContextManager[None]:
        """Sample without pause while the body runs."""
        assert self.stream is not None, "the schedule asks for a rollout side that samples without pause"
        return self.stream.flowing(self.state.step + 1, self.schedule.num_rollout)

    async def train(self, step: int, rollout: StepRollout) -> TrainResult:
        """Learn from the samples of a step, after keeping the step where that is asked for."""
        await self.turns.to_training()
        if self._due(step, self.schedule.capsule_interval):
            with self.phase("capsule", step):
                await self._keep_step(step, rollout.samples)
        with self.phase("train", step):
            update = await self.trainer.train(rollout.samples)
            if self._due(step, self.schedule.ref_update_interval):
                await self.trainer.update_reference()
            return update

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Record a phase of the step."""
        started = time.perf_counter()
        with self.record.phase(name, step):
            yield
        self._phase_seconds[name] = time.perf_counter() - started

    async def hand_over_weights(self, step: int) -> None:
        """Give the engine the weights of this step, as version `step`."""
        if self.weight_sync is not None:
            await self.turns.to_update()
            await self.weight_sync.send(version=step)
            self.version = step
            if self.stream is not None:
                self.stream.serve(step)
            await self.turns.to_rollout()

    async def update_weights(self, step: int) -> None:
        """Hand over what the step has learnt, where that is due."""
        if self._due(step, self.schedule.update_weights_interval):
            with self.phase("update_weights", step):
                await self.hand_over_weights(step)

    async def evaluate(self, step: int) -> None:
        """Measure the weights that the engines serve on the held-out sets and record it under `step`."""
        if step == 0 and not self.schedule.eval_before_train:
            return
        with self.record.phase("eval", step):
            metrics = await self.rollout.evaluate()
        if metrics:
            if self.version is not None:
                metrics[EVAL_VERSION] = float(self.version)
            self.record.metrics(step, metrics)
            self.observer.on_event("eval", {"step": step, **metrics})

    async def finish_step(self, step: int, rollout: StepRollout, update: TrainResult) -> None:
        """Record the step, look for trouble, evaluate and save when due, and hear who wants a stop."""
        seconds = time.perf_counter() - self._step_started
        metrics = {**rollout.metrics, **update.metrics, **self._perf(rollout, seconds)}
        self.record.metrics(step, metrics)
        self.record.samples(step, self._shown(rollout))
        self._keep_state(step, seconds, skipped=bool(update.metrics.get("train/step_skipped")))
        self._report_events(step, update)
        self.observer.on_step({"step": step, "total": self.schedule.num_rollout, "metrics": metrics})
        if self._due(step, self.schedule.eval_interval) or step == self.schedule.num_rollout:
            await self.evaluate(step)
        self._look_for_trouble(step)
        self._assert_alignment(step, update)
        await self.finish_saving(wait=False)
        await self._hear_requests()
        await self._save_when_due(step)

    def _perf(self, rollout: StepRollout, seconds: float) -> dict[str, float]:
        perf = {"perf/step_time": seconds}
        if "update_weights" in self._phase_seconds and self.weight_sync is not None:
            perf["perf/update_weights_time"] = self._phase_seconds["update_weights"]
        waited = self.ahead.waited if self.stream is None else self._phase_seconds.get("rollout")
        if waited is not None:
            perf["perf/wait_time_ratio"] = waited / seconds
        tokens = sum(len(sample.tokens) for sample in rollout.samples)
        return perf | {"perf/tokens_per_sec": tokens / seconds}

    def _shown(self, rollout: StepRollout) -> list[dict[str, Any]]:
        shown = rollout.samples[: self.schedule.sample_records_per_step]
        return [sample.to_dict(routes=False) for sample in shown]

    def _keep_state(self, step: int, seconds: float, skipped: bool) -> None:
        self.state = replace(
            self.state,
            step=step,
            prompt_cursor=self.rollout.prompts.state(),
            seconds=self.state.seconds + seconds,
            skipped_in_a_row=self.state.skipped_in_a_row + 1 if skipped else 0,
        )
        # Of the same moment as the cursor: a stream goes on drawing.
        self._held = [*self.rollout.prompts.held, *(self.stream.waiting() if self.stream else ())]

    def _report_events(self, step: int, update: TrainResult) -> None:
        for event in update.events:
            fields = {name: value for name, value in event.items() if name not in ("kind", "step")}
            self.record.event(event["kind"], step=step, **fields)
            self.observer.on_event(event["kind"], {"step": step, **fields})
        if update.stop or self.state.skipped_in_a_row >= STOP_AFTER_SKIPPED_STEPS:
            raise RunError(
                f"the run was stopped at step {step}: non-finite values",
                why=f"{max(self.state.skipped_in_a_row, 1)} optimizer step(s) in a row had to be skipped",
                fix="miles diagnose names the first tensor and what to change",
            )

    def _assert_alignment(self, step: int, update: TrainResult) -> None:
        """A run that promises the engine's bits and breaks the promise at once has no use going on."""
        broken = next((event for event in update.events if event["kind"] == ALIGNMENT_BROKEN), None)
        if broken is None or step != self._first_step:
            return
        raise RunError(
            f"true on-policy mode does not hold: {broken['tokens']} log-probs of the first step differ",
            where=broken["stage"] or "",
            why=broken.get("why") or f"the first difference is in {broken['stage']}",
            fix="miles diagnose has the evidence; leave --true-on-policy-mode out to go on without it",
        )

    def _look_for_trouble(self, step: int) -> None:
        for finding in self.monitor.check(step):
            self.observer.on_event("alert", {"step": step, **finding.as_dict()})

    async def _hear_requests(self) -> None:
        for request in self.inbox.pending():
            if request.action == "stop":
                self.supervisor.request_stop("stopped")
                self.inbox.acknowledge(request)
            elif request.action == "save":
                await self.save()
                await self.finish_saving()
                self.inbox.acknowledge(request)
            elif request.action == "set":
                await self._change_settings(request)

    async def _change_settings(self, request: Request) -> None:
        """Apply a patch of live settings, and say in the record what became of it."""
        step = self.state.step
        try:
            await self._set_knobs(request.patch)
        except RunError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            self.inbox.acknowledge(request, "refused", step=step, patch=request.patch, why=why, fix=error.fix)
            return
        self.inbox.acknowledge(request, step=step, patch=request.patch)

    async def _set_knobs(self, patch: Mapping[str, float]) -> None:
        """Set what one side of the ring owns: all of the patch takes effect, or a RunError is raised."""
        sampling = {key: value for key, value in patch.items() if key in SAMPLING_SETTINGS}
        if not sampling:
            await self.trainer.set_knobs(patch)
        elif len(sampling) < len(patch):
            raise RunError("settings of the trainer and of the engine are changed one after the other")
        else:
            await self.rollout.set_knobs(sampling)
            self.state = replace(self.state, sampling_knobs=self.state.sampling_knobs | sampling)

    async def _save_when_due(self, step: int) -> None:
        last = step == self.schedule.num_rollout or self.supervisor.stop_status is not None
        if last or self._due(step, self.schedule.save_interval):
            await self.save()
        if last:
            await self.finish_saving()

    async def save(self) -> None:
        """Write a checkpoint of the current step, once. Whoever shares the trainer's GPUs makes room for it
        meanwhile.
        """
        step = self.state.step
        if self._saves.has(step):
            return
        await self.finish_saving()

        async def save() -> None:
            self._tell_saved(await self._saves.save(self.state, self._write_checkpoint))

        with self.record.phase("save", step):
            await self.turns.saving(save)

    async def finish_saving(self, *, wait: bool = True) -> None:
        """Complete the checkpoint that is on its way, if there is one; without `wait`, if it can be."""
        self._tell_saved(await self._saves.settled(wait=wait))

    def _tell_saved(self, saved: Saved | None) -> None:
        if saved is None:
            return
        fields: dict[str, Any] = {"step": saved.step, "path": str(saved.path), "blocked_s": saved.blocked}
        if saved.background is not None:
            fields["background_s"] = saved.background
        self.record.event("checkpoint", **fields)
        self.observer.on_event("checkpoint", fields)

    async def restore(self, state: LoopState, checkpoint: Path, patch: Mapping[str, float]) -> None:
        """Stand where the checkpoint was written, with the trainer's live settings of `patch` on top."""
        self.state = state
        self.rollout.prompts.load_state(state.prompt_cursor)
        self.rollout.prompts.put_back(read_groups(checkpoint / HELD_GROUPS))
        self.ahead.read(checkpoint)
        await self.trainer.load(checkpoint / TRAINER_DIR)
        await self.trainer.set_knobs(patch)
        if state.sampling_knobs:
            await self.rollout.set_knobs(state.sampling_knobs)
        if state.step % self.schedule.update_weights_interval:
            # No checkpoint holds the older weights that the engines had.
            fields = {"step": state.step, "interval": self.schedule.update_weights_interval}
            self.record.event(events.RESUMED_BETWEEN_UPDATES, **fields)
            self.observer.on_event(events.RESUMED_BETWEEN_UPDATES, fields)

    async def _keep_step(self, step: int, samples: Sequence[Sample]) -> None:
        run_dir = self.record.layout.root
        await write_capsule(run_dir, step, samples, lambda to: self.trainer.save(to, optimizer=False))

    async def _write_checkpoint(self, directory: Path) -> None:
        trainer = directory / TRAINER_DIR
        trainer.mkdir()
        await self.trainer.save(trainer, optimizer=self.schedule.save_optimizer)
        if self._held:
            write_groups(directory / HELD_GROUPS, self._held)
        self.ahead.write(directory)

    @staticmethod
    def _due(step: int, interval: int | None) -> bool:
        return interval is not None and step % interval == 0
