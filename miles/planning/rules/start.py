"""Rules on where a run starts and what it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

STEP_DIRECTORY = re.compile(r"(?:^|/)step-(\d+)/?$")


@rule(
    "CKP1",
    Severity.ERROR,
    title="start_rollout_id contradicts the checkpoint",
    cause="the loaded checkpoint says which rollout comes next; another number repeats or leaves out prompts",
    fix="leave --start-rollout-id out",
)
def start_contradicts(subject: Subject) -> Iterator[Found]:
    model = subject.config.model
    match = STEP_DIRECTORY.search(model.load or "")
    if model.start_rollout_id is not None and match and int(match[1]) != model.start_rollout_id:
        yield Found(
            f"start_rollout_id {model.start_rollout_id}, {model.load} ends at {int(match[1])}",
            "model.start_rollout_id",
        )


@rule(
    "CKP2",
    Severity.WARNING,
    title="checkpoints cannot be resumed",
    cause="without optimizer state a run that stops starts its moments from zero, which shows as a jump in "
    "the gap",
    fix="leave --no-save-optim out",
)
def checkpoints_without_optimizer(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.config.checkpoint
    if checkpoint.no_save_optim and checkpoint.save_interval is not None:
        yield Found(
            f"no_save_optim with save_interval {checkpoint.save_interval}", "checkpoint.no_save_optim"
        )


@rule(
    "CKP3",
    Severity.WARNING,
    title="a long run with one checkpoint at its end",
    cause="a run that dies loses everything since the last checkpoint",
    fix="set --save-interval 20",
)
def no_checkpoint_on_the_way(subject: Subject) -> Iterator[Found]:
    if (
        subject.on_gpus
        and subject.config.checkpoint.save_interval is None
        and (subject.num_rollouts or 0) > 1
    ):
        yield Found(f"{subject.num_rollouts} rollouts, saved after the last", "checkpoint.save_interval")


@rule(
    "CKP4",
    Severity.ERROR,
    title="this form of checkpoint is written while the run waits",
    cause="only Megatron's distributed checkpoint, with its optimizer, is written by processes beside the "
    "trainer's ranks; under published names the first rank gathers and writes all of it",
    fix="add --ckpt-format torch_dist, or leave --async-save out",
)
def saved_while_waiting(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.config.checkpoint
    if not checkpoint.async_save or subject.config.training.backend != "megatron":
        return
    if checkpoint.ckpt_format != "torch_dist":
        yield Found(f"async_save with ckpt_format {checkpoint.ckpt_format}", "checkpoint.async_save")
    elif checkpoint.no_save_optim:
        yield Found("async_save with no_save_optim", "checkpoint.async_save", "leave --no-save-optim out")


@rule(
    "ASM1",
    Severity.INFO,
    title="planned for hardware that is not here",
    cause="files, disk, host memory, ports, limits and packages belong to the machine that runs",
    fix="run the same command there without --assume-hardware before the run",
)
def planned_elsewhere(subject: Subject) -> Iterator[Found]:
    if subject.facts.assumed is not None:
        checkpoint = subject.facts.checkpoint
        name = subject.config.model.model_name
        spec = (
            f"; the architecture is the shipped one of {name}"
            if checkpoint.spec is None and subject.spec
            else ""
        )
        yield Found(f"{subject.facts.assumed} assumed{spec}")
