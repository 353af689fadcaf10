"""Rules on the precision policy: the checkpoint holds what it says, and every tensor can be held so."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.arch import published_tensors
from miles.arch.precision import PrecisionPolicy
from miles.arch.tensor_roles import decoder_layer
from miles.planning.facts.quantisation import Quantisation
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

SHOWN = 2
"""Names shown before the rest is counted."""


@rule(
    "PRC10",
    Severity.ERROR,
    title="the checkpoint and the precision policy disagree about tensors",
    cause="engine and weight sync follow the policy of the run file; a tensor that the checkpoint holds in "
    "another format than the policy says has one format at the start and another after the first update",
    fix="name the exceptions of the checkpoint in --extra-high-precision-layers-hf, or convert it again: "
    "miles convert BASE DIR --for RUN",
)
def tensors_differ(subject: Subject) -> Iterator[Found]:
    policy, held = _same_format(subject)
    if policy is None or held is None or subject.spec is None or not held.quantised:
        return
    wanted = {
        name for name in published_tensors(policy.layout(subject.spec)) if not policy.storage(name).is_plain
    }
    told = []
    if too_many := [n for n in sorted(held.quantised - wanted) if not _told_elsewhere(n, policy, held)]:
        told.append(f"quantised in the checkpoint, plain by the policy: {_listed(too_many)}")
    if missing := [n for n in sorted(wanted - held.quantised) if _in_quantised_layer(n, held)]:
        told.append(f"plain in the checkpoint, quantised by the policy: {_listed(missing)}")
    if told:
        yield Found("; ".join(told), "precision.extra_high_precision_layers_hf")


@rule(
    "PRC11",
    Severity.ERROR,
    title="the checkpoint's block scales are of another convention than the run's",
    cause="the engine starts from the checkpoint's scales and gets the run's with the first update: the same "
    "weights, rounded differently",
    fix="set --fp8-block-scale to the checkpoint's, or convert it again: miles convert BASE DIR --for RUN",
)
def scales_differ(subject: Subject) -> Iterator[Found]:
    policy, held = _same_format(subject)
    if policy is None or held is None or policy.rollout.name != "fp8" or held.scales is None:
        return
    if held.scales != policy.rollout.scales:
        yield Found(
            f"{held.scales} scales in the checkpoint, {policy.rollout.scales} in the run",
            "precision.fp8_block_scale",
            f"add --fp8-block-scale {held.scales}, or convert the checkpoint again",
        )


@rule(
    "PRC12",
    Severity.ERROR,
    title="groups of this format do not fill the rows of a weight",
    cause="MXFP8, NVFP4 and INT4 cut rows into groups that share a scale; no layout has a shorter last group",
    fix="choose another --rollout-format, or keep these weights plain: --extra-high-precision-layers-hf",
)
def groups_do_not_fill_rows(subject: Subject) -> Iterator[Found]:
    policy, spec = subject.precision, subject.spec
    group = policy.rollout.group if policy else None
    if policy is None or spec is None or group is None:
        return
    bad = [
        (name, shape[-1])
        for name, shape in published_tensors(policy.layout(spec)).items()
        if shape[-1] % group and not policy.storage(name).is_plain
    ]
    if bad:
        name, columns = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        yield Found(
            f"{policy.rollout.name} has groups of {group}, {name}{more} rows of {columns}",
            "precision.rollout_format",
        )


@rule(
    "PRC13",
    Severity.ERROR,
    title="weights that are multiplied as one are kept apart",
    cause="queries, keys and values, gate and up, and the experts of a layer are each one product in trainer "
    "and engine, and a product has one format",
    fix="name all of them in --extra-high-precision-layers-hf, or none",
)
def exceptions_split_products(subject: Subject) -> Iterator[Found]:
    policy, spec = subject.precision, subject.spec
    if policy is None or spec is None or not policy.kept:
        return
    kept: dict[str, str] = {}
    quantised: dict[str, str] = {}
    for name in published_tensors(policy.layout(spec)):
        product = _product(name)
        if not policy.compute(name).is_plain or not policy.storage(name).is_plain:
            quantised.setdefault(product, name)
        elif policy.exception(name):
            kept.setdefault(product, name)
    split = next((product for product in kept if product in quantised), None)
    if split is not None:
        yield Found(
            f"{kept[split]} is kept plain, {quantised[split]} is not",
            "precision.extra_high_precision_layers_hf",
        )


@rule(
    "PRC14",
    Severity.ERROR,
    title="FP8 training without a recipe",
    cause="Megatron's default keeps a history of peaks for each tensor; the native trainer scales blocks by "
    "what they hold",
    fix="add --fp8-recipe blockwise",
)
def recipe_missing(subject: Subject) -> Iterator[Found]:
    config = subject.config
    own = config.training.backend == "native"
    if own and config.precision.fp8_format is not None and config.precision.fp8_recipe is None:
        yield Found(f"fp8_format {config.precision.fp8_format} and no fp8_recipe", "precision.fp8_recipe")


@rule(
    "PRC15",
    Severity.ERROR,
    title="an exception by the name of stacked experts",
    cause="this family publishes all experts of a layer as one tensor; in a quantised format each matrix of "
    "each expert is stored by itself, so that no tensor has this name",
    fix="keep all experts, --extra-high-precision-layers-hf experts., or name gate_proj, up_proj, down_proj",
)
def exceptions_of_stacks(subject: Subject) -> Iterator[Found]:
    policy, spec = subject.precision, subject.spec
    if policy is None or spec is None:
        return
    if lost := policy.lost_exceptions(spec):
        yield Found(", ".join(lost), "precision.extra_high_precision_layers_hf")


@rule(
    "PRC17",
    Severity.ERROR,
    title="exceptions by name that the trainer does not keep",
    cause="the FP8 layers are Transformer Engine's, which keeps whole layers at both ends in bf16 and "
    "nothing else; the engine would hold in bf16 what the trainer rounds",
    fix="keep whole layers: --num-layers-at-start-in-bf16, --num-layers-at-end-in-bf16",
)
def exceptions_by_name_in_megatron(subject: Subject) -> Iterator[Found]:
    config = subject.config
    kept = config.precision.extra_high_precision_layers_hf
    if config.training.backend == "megatron" and config.precision.fp8_format and kept:
        yield Found(", ".join(kept), "precision.extra_high_precision_layers_hf")


_EXPERT = re.compile(r"\.experts\.\d+\.")
_JOINED = re.compile(r"\.(?:[qkv]_proj|gate_proj|up_proj|w1|w3)\.weight$")


def _product(name: str) -> str:
    """What the weights that are multiplied as one have in common."""
    return _JOINED.sub(".joined", _EXPERT.sub(".experts.", name))


def _same_format(subject: Subject) -> tuple[PrecisionPolicy | None, Quantisation | None]:
    """Policy and checkpoint where both are quantised in one format; else another rule has spoken."""
    policy, held = subject.precision, subject.facts.checkpoint.quantisation
    return (policy, held) if policy and held and policy.rollout.name == held.method else (None, None)


def _told_elsewhere(name: str, policy: PrecisionPolicy, held: Quantisation) -> bool:
    """FP6 tells of tensors that every policy keeps, FP7 of whole layers."""
    return name in held.wrongly_quantised or policy.exception(name).startswith("in the")


def _in_quantised_layer(name: str, held: Quantisation) -> bool:
    layer = decoder_layer(name)
    return layer is None or layer in held.low_precision_layers


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
