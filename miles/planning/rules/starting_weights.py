"""Rules on what trainer and engine start from: plain weights here, those of the engine's format there."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.critic import trains_critic
from miles.planning.findings import Found, Severity
from miles.planning.formats import QUANTISED
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject


@rule(
    "PRC4",
    Severity.ERROR,
    title="the trainer would start from quantised weights",
    cause="a trainer starts from plain weights, and so does its reference; quantised ones have lost what "
    "training changes",
    fix="point --hf-checkpoint to the bf16 checkpoint it was made from; where that is lost: "
    "miles convert DIR DIR-bf16 --to bf16",
)
def trainer_starts_quantised(subject: Subject) -> Iterator[Found]:
    config, checkpoint = subject.config, subject.facts.checkpoint
    if subject.facts.load_quantisation is not None:
        yield Found(f"{config.model.load} is {subject.facts.load_quantisation}", "model.load")
    if checkpoint.quantisation is None:
        return
    name = checkpoint.name.rstrip("/")
    # Servers start from --hf-checkpoint, and may need it as it is.
    serves = subject.starts_servers and checkpoint.quantisation.method == subject.rollout_format
    lost = f"where that is lost: miles convert {name} {name}-bf16 --to bf16"
    if config.model.load is None:
        told = "point {} to the bf16 checkpoint it was made from; " + lost
        yield Found(
            f"{checkpoint.name} is {checkpoint.quantisation}",
            "model.hf_checkpoint",
            told.format("--load" if serves else "--hf-checkpoint"),
        )
    if subject.needs_reference and config.model.ref_load is None and config.model.load is not None:
        yield Found(
            f"the reference is {checkpoint.name}, which is {checkpoint.quantisation}",
            "model.ref_load",
            f"point --ref-load to the bf16 checkpoint it was made from; {lost}",
        )


@rule(
    "CRT2",
    Severity.ERROR,
    title="the critic's checkpoint does not fit the policy",
    cause="a critic is built in the policy's form: the same layers, widths and vocabulary, in plain weights",
    fix="point --critic-load to a checkpoint of that form, or leave it out to start from the policy",
)
def critic_misfit(subject: Subject) -> Iterator[Found]:
    critic = subject.facts.critic
    if critic is not None and critic.problem and trains_critic(subject.config):
        yield Found(f"{critic.name}: {critic.problem}", "critic.critic_load")


@rule(
    "PRC16",
    Severity.ERROR,
    title="the servers would start from a checkpoint in another format",
    cause="an SGLang server takes the format of its weights from the checkpoint that it starts from; "
    "tensors of another format do not fit it",
    fix="convert it, --hf-checkpoint DIR-FORMAT, and let the trainer start from the plain one: --load DIR",
)
def servers_start_in_another_format(subject: Subject) -> Iterator[Found]:
    checkpoint, wanted = subject.facts.checkpoint, subject.config.precision.rollout_format
    if not subject.starts_servers or checkpoint.state in ("unset", "missing"):
        return
    if wanted in QUANTISED and checkpoint.quantisation is None:
        name = checkpoint.name.rstrip("/")
        yield Found(
            f"rollout_format {wanted}, {checkpoint.name} holds plain weights",
            "precision.rollout_format",
            f"miles convert {name} {name}-{wanted} --for RUN, then "
            f"--hf-checkpoint {name}-{wanted} --load {name}",
        )
