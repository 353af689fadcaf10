"""From the words of `miles plan memory` to an outline: a few flags, planned for assumed hardware."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from miles.arch.specs import shipped_names
from miles.config import ResolvedConfig, parse_flags, resolve
from miles.errors import ConfigError, MilesError
from miles.planning import collect_facts
from miles.planning.hardware import Hardware, parse_hardware
from miles.planning.outline import Outline, make_outline
from miles.planning.scale import nearest_that_fits
from miles.planning.subject import Subject

SIZES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}

PRECISIONS = {
    "fp32": "--dtype fp32",
    "bf16": "--dtype bf16",
    "fp8": "--dtype bf16 --fp8-format e4m3 --fp8-recipe blockwise --rollout-format fp8",
    "mxfp8": "--dtype bf16 --fp8-format e4m3 --fp8-recipe mxfp8 --rollout-format mxfp8",
    "nvfp4": "--dtype bf16 --fp4-format e2m1 --fp4-recipe nvfp4 --rollout-format nvfp4",
    "int4": "--dtype bf16 --int4-qat --rollout-format int4",
}

USUAL = (
    "--train-backend megatron --rollout-backend sglang --n-samples-per-prompt 8 --rollout-max-response-len "
    "8192 --rollout-max-context-len 10240 --use-dynamic-batch-size --max-tokens-per-gpu 10240 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    "--use-distributed-optimizer --accumulate-allreduce-grads-in-fp32"
)
"""What cluster profiles set; flags on the command line come after and win."""


def memory_outline(
    model: str, gpus: str, precision: str, layout: str | None, colocate: bool, flags: Sequence[str]
) -> Outline:
    """The outline of a run of this model. Raises: ConfigError for words that cannot be read."""
    hardware = parse_hardware(gpus, "--hardware")
    if hardware.kind is None:
        raise _refused("--hardware", f"{gpus!r} has no GPU", "name GPUs, as in 8xH100")
    words = _words(model, hardware, precision, colocate)
    subject = _subject([*words, *_layout_words(layout or ""), *flags], hardware)
    if layout is None:
        subject = _with_layout_that_fits(subject, words, flags, hardware)
    outline = make_outline(subject)
    if outline is None:
        fix = f"take one of {', '.join(shipped_names())}, or a checkpoint directory"
        raise _refused(model, subject.facts.checkpoint.spec_problem or "no such model", fix)
    return outline


def _words(model: str, hardware: Hardware, precision: str, colocate: bool) -> list[str]:
    if model.startswith("-"):
        raise _refused(
            model,
            "the model comes first, then flags",
            "miles plan memory qwen3-30b-a3b …; that of a profile: miles train --profile NAME --dry-run",
        )
    if precision not in PRECISIONS:
        raise _refused(
            "--precision", f"{precision!r} is not a precision", f"take one of {', '.join(PRECISIONS)}"
        )
    named = f"--model-name {model}" if model in shipped_names() and not Path(model).is_dir() else ""
    engine = min(hardware.gpus_per_node, 8)
    place = (
        f"--actor-num-nodes {hardware.nodes} --actor-num-gpus-per-node {hardware.gpus_per_node} "
        f"--num-gpus-per-node {hardware.gpus_per_node} --rollout-batch-size {hardware.num_gpus} "
        f"--rollout-num-gpus-per-engine {engine} --sglang-expert-parallel-size {engine}"
    )
    share = "--colocate" if colocate else f"--rollout-num-gpus {hardware.num_gpus}"
    words = f"{named or f'--hf-checkpoint {model}'} {USUAL} {place} {share} {PRECISIONS[precision]}"
    return words.split()


def _layout_words(layout: str) -> list[str]:
    """`tp4,ep8` as flags; tensor parallelism brings sequence parallelism."""
    words: list[str] = []
    for size in filter(None, layout.split(",")):
        match = re.fullmatch(r"(tp|pp|cp|ep|etp)([1-9]\d*)", size.strip())
        if match is None:
            raise _refused("--layout", f"{size!r} is not a size", "write tp4,pp1,cp1,ep8,etp1")
        words += [SIZES[match[1]], match[2]]
        if match[1] == "tp" and int(match[2]) > 1:
            words.append("--sequence-parallel")
    return words


def _subject(words: Sequence[str], hardware: Hardware) -> Subject:
    resolved: ResolvedConfig = resolve(flags=parse_flags(words))
    return Subject(resolved, collect_facts(resolved.config, assume=hardware))


def _with_layout_that_fits(
    subject: Subject, words: Sequence[str], flags: Sequence[str], hardware: Hardware
) -> Subject:
    """The same run at the layout nearest to no parallelism that fits; as it is where none does."""
    if subject.scale_request is None or subject.scale is None:
        return subject
    near = nearest_that_fits(subject.scale_request, subject.scale.layout)
    return subject if near is None else _subject([*words, *near.flags.split(), *flags], hardware)


def _refused(where: str, what: str, fix: str) -> ConfigError:
    return ConfigError(MilesError(what, where=where, fix=fix))
