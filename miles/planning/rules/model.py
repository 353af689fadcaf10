"""Rules on the checkpoint: it exists, is whole, and is what its config says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.model_names import differences, model_names
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

SETTING = "model.hf_checkpoint"


@rule(
    "MOD1",
    Severity.ERROR,
    title="no checkpoint",
    cause="a run starts from the weights, the tokenizer and the config.json of a Hugging Face checkpoint",
    fix="set --hf-checkpoint to a directory with config.json, or to builtin:sort",
)
def checkpoint_missing(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.facts.checkpoint
    planned_from_name = subject.facts.assumed is not None and subject.spec is not None
    if planned_from_name and checkpoint.state in ("unset", "missing"):
        return
    if checkpoint.state == "unset":
        yield Found("hf_checkpoint is not set", SETTING)
    elif checkpoint.state == "missing":
        yield Found(f"{checkpoint.name} {checkpoint.problem}", SETTING, _from_hub(checkpoint.name))


def _from_hub(name: str) -> str:
    """What to type for a name of the Hugging Face hub; no run downloads weights by itself."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is None:
        return ""
    directory = name.partition("/")[2]
    return (
        f"a model of the Hugging Face hub is downloaded first: hf download {name} --local-dir {directory}, "
        f"then --hf-checkpoint {directory}"
    )


@rule(
    "MOD2",
    Severity.ERROR,
    title="config.json cannot be used",
    cause="the architecture is read from config.json; nothing else says what the model is",
    fix="name the directory of a checkpoint of a supported family, or mend its config.json",
)
def config_unusable(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.facts.checkpoint
    if checkpoint.state == "directory" and checkpoint.spec is None:
        yield Found(checkpoint.spec_problem, SETTING)


@rule(
    "MOD3",
    Severity.ERROR,
    title="the weight files are missing or damaged",
    cause="the headers of the safetensors files do not fit the files, or the index names files that are not "
    "there",
    fix="download the checkpoint again and compare the sizes of its files",
)
def weights_unreadable(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.facts.checkpoint
    if checkpoint.state == "directory" and checkpoint.weights_problem:
        yield Found(checkpoint.weights_problem, SETTING)


@rule(
    "MOD4",
    Severity.ERROR,
    title="the weights are not those of config.json",
    cause="tensors that the architecture needs are absent or have another shape, so the model would be a "
    "different one from the file it is named after",
    fix="use the config.json that the weights were saved with",
)
def weights_mismatch(subject: Subject) -> Iterator[Found]:
    if subject.facts.checkpoint.shapes_problem:
        yield Found(subject.facts.checkpoint.shapes_problem, SETTING)


@rule(
    "MOD5",
    Severity.ERROR,
    title="the tokenizer cannot be used",
    cause="prompts become token ids through the tokenizer.json of the checkpoint",
    fix="copy tokenizer.json and tokenizer_config.json of the base model into the checkpoint",
)
def tokenizer_missing(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.facts.checkpoint
    if checkpoint.tokenizer_problem:
        yield Found(checkpoint.tokenizer_problem, SETTING)


@rule(
    "MOD6",
    Severity.ERROR,
    title="the tokenizer is larger than the embedding",
    cause="a token id beyond vocab_size has no row in the embedding",
    fix="use the tokenizer that belongs to these weights",
)
def tokenizer_too_large(subject: Subject) -> Iterator[Found]:
    checkpoint = subject.facts.checkpoint
    if (
        checkpoint.spec
        and checkpoint.tokenizer_size
        and checkpoint.tokenizer_size > checkpoint.spec.vocab_size
    ):
        yield Found(
            f"{checkpoint.tokenizer_size} token ids, but vocab_size is {checkpoint.spec.vocab_size}", SETTING
        )


@rule(
    "MOD7",
    Severity.WARNING,
    title="--model-name names another architecture",
    cause="config.json wins over the name, so the name is not what trains",
    fix="leave --model-name out",
)
def name_disagrees(subject: Subject) -> Iterator[Found]:
    spec, name = subject.spec, subject.config.model.model_name
    if spec is None or name is None or name not in model_names():
        return
    if found := differences(spec, name):
        yield Found(f"config.json says {'; '.join(found)}", "model.model_name")


@rule(
    "MOD8",
    Severity.WARNING,
    title="--model-name is not a known model",
    cause="the architecture comes from config.json; an unknown name cannot be compared with it",
    fix="leave --model-name out",
)
def name_unknown(subject: Subject) -> Iterator[Found]:
    name = subject.config.model.model_name
    if name is not None and name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=1)
        yield Found(
            f"{name!r} is not one of {', '.join(model_names())}",
            "model.model_name",
            f"did you mean {near[0]}?" if near else "",
        )


@rule(
    "STP1",
    Severity.ERROR,
    title="no stop token",
    cause="neither config.json nor generation_config.json names an end-of-sequence token, so every response "
    "runs to its limit and is never rewarded for ending",
    fix="set --rollout-stop-token-ids or --rollout-stop, or eos_token_id in config.json",
)
def stop_token_missing(subject: Subject) -> Iterator[Found]:
    spec, config = subject.facts.checkpoint.spec, subject.config
    # Demonstrations end with a token.
    by_text = bool(config.rollout.rollout_stop) and config.algorithm.loss_type != "sft_loss"
    if spec is not None and not (spec.eos_token_ids or config.rollout.rollout_stop_token_ids or by_text):
        yield Found(f"{subject.facts.checkpoint.name} has no eos_token_id", SETTING)


@rule(
    "MTP1",
    Severity.ERROR,
    title="MTP layers are asked for, but the checkpoint has none",
    cause="training or drafting with multi-token-prediction layers starts from their weights, which few "
    "checkpoints have: many are published without, and most converters drop them",
    fix="give the checkpoint fresh ones, which training teaches: miles convert BASE DIR --mtp-num-layers 1",
)
def mtp_weights_missing(subject: Subject) -> Iterator[Found]:
    speculative, checkpoint = subject.config.speculative, subject.facts.checkpoint
    wanted = speculative.mtp_num_layers or 0
    if not wanted or checkpoint.state != "directory":
        return
    spec = checkpoint.spec
    has = spec.mtp_num_layers if spec is not None and spec.mtp is not None else 0
    if not checkpoint.has_mtp_weights or 0 < has < wanted:
        setting = "enable_mtp_training" if speculative.enable_mtp_training else "mtp_num_layers"
        source = checkpoint.name.rstrip("/")
        yield Found(
            f"{checkpoint.name} has {f'MTP weights of {has} layers' if has else 'no MTP weights'}",
            f"speculative.{setting}",
            f"make a copy with fresh ones, which training teaches: miles convert {source} "
            f"{source}-mtp --mtp-num-layers {wanted}; then --hf-checkpoint {source}-mtp",
        )
