"""The plan as text: what a person checks before a run, in one screen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from miles.planning import Plan
from miles.rollout.sglang.command import argument_words
from miles_cli.outline_view import line, outline_lines, part_lines
from miles_cli.units import binary_bytes, count

ECHOED = "same as "
"""Derivations that only repeat another setting are left out here; `--json` has them."""


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan in lines, without colour."""
    model, batch = plan.model, plan.batch
    yield line("model", " · ".join(filter(None, (model.checkpoint, model.architecture, plan.dtype))))
    weights = f" · weights: {model.weights}" if model.weights else ""
    yield line(
        "",
        f"{model.parameters:,} parameters ({model.active_parameters:,} active), "
        f"{count(model.layers, 'layer')}, {model.moe_layers} of them MoE{weights}",
    )
    yield line(
        "runs on",
        f"{plan.device}, {plan.executor} executor, {_trainer(plan)}, {_engine(plan)}, "
        f"{count(plan.threads.count, 'thread')} per process",
    )
    yield line(
        "rollout",
        f"{plan.num_rollouts} × ({batch.rollout_batch_size} prompts × {batch.n_samples_per_prompt} samples = "
        f"{batch.samples_per_rollout}) · at most {plan.max_response_len} response tokens, "
        f"{plan.max_context_len} in all",
    )
    yield line(
        "training",
        f"{count(plan.optimizer_steps, 'step')} of {batch.global_batch_size} samples · "
        f"{_micro_batches(plan)} · routing replay {'on' if plan.routing_replay else 'off'}",
    )
    if plan.numerics == "exact" and plan.train_kernel is not None and plan.train_kernel.kernel == "fused":
        yield line(
            "numerics", "exact, trainer and engine bit for bit alike: both call the same compiled functions"
        )
    elif plan.numerics == "exact":
        yield line(
            "numerics", "exact, trainer and engine bit for bit alike; found at start-up, cheapest first:"
        )
        yield line(
            "", "blocks of rows, batched or single experts, query rows (miles watch --once shows them)"
        )
    for item in plan.data:
        rows = f"{item.rows:,} rows" if item.rows is not None else "rows not counted"
        longest = f", longest prompt {item.longest_prompt} tokens" if item.longest_prompt is not None else ""
        yield line("data", f"{item.name}: {item.path} · {rows}{longest}")
    if plan.outline is not None:
        yield from outline_lines(plan.outline)
    else:
        yield line("memory", f"{binary_bytes(plan.memory.total_bytes)} estimated")
        yield from part_lines(plan.memory.parts)
    yield from _server_lines(plan)
    yield line("disk", f"{binary_bytes(plan.checkpoint_bytes)} per checkpoint")
    yield line("exports", " ".join(f"{name}={value}" for name, value in plan.exports))
    yield from _rehearsal_lines(plan)
    yield from _derived_lines(plan)


def _rehearsal_lines(plan: Plan) -> Iterator[str]:
    """What is smaller or replaced, with the value of the profile, one line for each reason."""
    label = "rehearsal"
    for why, changes in groupby(plan.rehearsal, key=lambda change: change.why):
        yield line(label, f"{why}:")
        yield from (line("", f"  {change.setting}: {change.old} -> {change.new}") for change in changes)
        label = ""


def _trainer(plan: Plan) -> str:
    kernel = "" if plan.train_kernel is None else f" (train kernel: {plan.train_kernel})"
    return f"{plan.trainer} trainer{kernel}"


def _engine(plan: Plan) -> str:
    rounded = "" if plan.rollout_format == plan.dtype else f" on {plan.rollout_format} weights"
    decoding = "" if plan.decode is None else f" (decode kernel: {plan.decode})"
    return f"{plan.engine} engine{rounded}{decoding}"


def _server_lines(plan: Plan) -> Iterator[str]:
    if plan.server_args is not None:
        words = " ".join(argument_words(plan.server_args))
        yield line("sglang", words if plan.server_python is None else f"{plan.server_python} {words}")


def _micro_batches(plan: Plan) -> str:
    if plan.micro_batch_tokens is not None:
        return f"micro-batches of {plan.micro_batch_tokens} tokens"
    return f"micro-batches of {count(plan.micro_batch_size, 'sample')}"


def _derived_lines(plan: Plan) -> Iterator[str]:
    shown = [row for row in plan.derived if not row.rule.startswith(ECHOED)]
    for index, row in enumerate(shown):
        value = str(row.value).lower() if isinstance(row.value, bool) else row.value
        yield line("derived" if index == 0 else "", f"{row.setting} = {value}  ({row.rule})")
