"""`miles convert`: a checkpoint made from another one, in another number format or with MTP layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from miles_cli.convert_arguments import (
    AsJson,
    Asymmetric,
    CheckLogits,
    DryRun,
    Dtype,
    ForRun,
    Fp8BlockScale,
    GroupSize,
    Kept,
    LayersAtEnd,
    LayersAtStart,
    MaxShardSize,
    MtpNumLayers,
    NoSaveOptim,
    NoVerify,
    Origin,
    Seed,
    Source,
    Target,
    To,
    Workers,
)

if TYPE_CHECKING:
    from miles.weights.convert import Conversion, Wanted

app = typer.Typer()

EPILOG = (
    "The source is only read. The target appears whole or not at all: run the same command again after a "
    "kill and it goes on where it stopped, to the same bytes. miles_convert.json in the target lists every "
    "file with its SHA-256 and every weight with its error. Exit codes: 0 written · 1 the source cannot be "
    "read, or the target exists · 2 usage · 4 not written yet · 130 interrupted, can go on. --json: "
    "{source, target, architecture, bytes_in, bytes_out, tensors_in, tensors_out, files, weights: [{count, "
    "from, to, how, why}], left_out, fresh_tensors, mtp_num_layers, written, seconds, worst, logits}."
)


@app.command(epilog=EPILOG)
def convert(
    source: Source,
    target: Target,
    to: To = None,
    for_run: ForRun = None,
    group_size: GroupSize = None,
    asymmetric: Asymmetric = False,
    fp8_block_scale: Fp8BlockScale = None,
    dtype: Dtype = None,
    layers_at_start: LayersAtStart = 0,
    layers_at_end: LayersAtEnd = 0,
    kept: Kept = None,
    mtp_num_layers: MtpNumLayers = None,
    seed: Seed = None,
    origin: Origin = None,
    max_shard_size: MaxShardSize = None,
    no_save_optim: NoSaveOptim = False,
    workers: Workers = None,
    no_verify: NoVerify = False,
    check_logits: CheckLogits = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint from another one: in another number format, in other files, or with MTP layers.

    What is quantised follows the precision policy of training: see docs/convert.md.
    """
    from miles_cli.convert_options import Options, options_of_run, wanted_of

    options = Options(
        to=to,
        group_size=group_size,
        asymmetric=asymmetric,
        fp8_block_scale=fp8_block_scale,
        dtype=dtype,
        layers_at_start=layers_at_start,
        layers_at_end=layers_at_end,
        kept=tuple(kept or ()),
        mtp_num_layers=mtp_num_layers,
        seed=seed,
        max_shard_size=max_shard_size,
        no_save_optim=no_save_optim,
    )
    from miles_cli.megatron_convert import concerns_megatron, convert_megatron

    if for_run is None and concerns_megatron(source, options):
        answer = convert_megatron(source, target, origin, options, dry_run)
        _tell(answer, as_json)
        return
    wanted = wanted_of(options if for_run is None else options_of_run(for_run, options))
    plan = _plan(source, target, origin, wanted)
    answer = _carried_out(plan, workers, not no_verify, check_logits, dry_run, as_json)
    if as_json:
        _tell(answer, as_json)


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        typer.echo("\n".join(f"{name}: {value}" for name, value in answer.items()))
        return
    from miles_cli.render.json_text import json_text

    typer.echo(json_text(answer))


def _plan(source: Path, target: Path, origin: Path | None, wanted: Wanted) -> Conversion:
    from miles.weights.convert import open_source, plan_conversion

    return plan_conversion(open_source(source, origin), target, wanted)


def _carried_out(
    plan: Conversion, workers: int | None, verify: bool, check_logits: bool, dry_run: bool, as_json: bool
) -> dict[str, Any]:
    """Print the plan, write the target, print how it went; the answer as JSON-able values."""
    from miles_cli.render.convert_text import plan_dict, plan_lines, result_lines

    if not as_json:
        typer.echo("\n".join(plan_lines(plan)))
    if dry_run:
        return plan_dict(plan) | {"written": False}

    import time

    from miles.weights.convert import check_of_logits, convert, partial_directory
    from miles_cli.convert_progress import ConvertProgress
    from miles_cli.render.convert_text import result_dict

    began = time.monotonic()
    progress = ConvertProgress(sys.stderr)
    try:
        check = check_of_logits(plan) if check_logits else None
        manifest = convert(plan, workers, verify, progress, check, progress.notice)
    except KeyboardInterrupt:
        progress.end()
        kept = partial_directory(plan.target)
        typer.echo(f"interrupted: the same command goes on where this one stopped, in {kept}", err=True)
        raise
    progress.end()
    result = result_dict(manifest, time.monotonic() - began)
    if not as_json:
        typer.echo("\n".join(result_lines(plan, result)))
    return plan_dict(plan) | result
