"""`miles convert`: a checkpoint made from another one, in another number format or with MTP layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
FORMATS, EXCEPTIONS, FILES = "Formats", "Exceptions", "Run"


def _complete_format(incomplete: str) -> list[str]:
    from miles_cli.convert_options import MEGATRON, TARGETS

    return [name for name in (*TARGETS, *MEGATRON) if name.startswith(incomplete)]


@app.command(epilog=EPILOG)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Directory of a checkpoint: Hugging Face (plain, FP8, MXFP8, NVFP4, INT4, INT8), torch DCP, "
            "a step of a run's checkpoints, or Megatron's torch_dist.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Directory to make; it must not exist yet.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="bf16, fp16, fp32 · fp8 (blocks of 128x128), fp8_channel, fp8_tensor, mxfp8, nvfp4, int4, "
            "int8 · dcp (torch's distributed checkpoint), native (a step of a run), torch_dist (Megatron's, "
            "bit for bit). Left out: as it is.",
            autocompletion=_complete_format,
            rich_help_panel=FORMATS,
        ),
    ] = None,
    for_run: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUN",
            help="The format and the exceptions of a profile, a run file or a run.",
            rich_help_panel=FORMATS,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="INT4: weights that share a scale; 32.", rich_help_panel=FORMATS
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="INT4: with zero points.", rich_help_panel=FORMATS)
    ] = False,
    fp8_block_scale: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|pow2",
            help="FP8 in blocks: scales for Hopper (fp32, the default), or powers of two for Blackwell.",
            rich_help_panel=FORMATS,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bf16|fp16|fp32",
            help="Of the tensors that a quantised format leaves alone, and of all in dcp; default: theirs.",
            rich_help_panel=FORMATS,
        ),
    ] = None,
    layers_at_start: Annotated[
        int,
        typer.Option(
            "--num-layers-at-start-in-bf16",
            metavar="N",
            min=0,
            show_default=False,
            help="First layers that are not quantised.",
            rich_help_panel=EXCEPTIONS,
        ),
    ] = 0,
    layers_at_end: Annotated[
        int,
        typer.Option(
            "--num-layers-at-end-in-bf16",
            metavar="N",
            min=0,
            show_default=False,
            help="Last layers that are not quantised.",
            rich_help_panel=EXCEPTIONS,
        ),
    ] = 0,
    kept: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-high-precision-layers-hf",
            metavar="NAME",
            help="A name, or a part of names, that is not quantised; may be given again.",
            rich_help_panel=EXCEPTIONS,
        ),
    ] = None,
    mtp_num_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="MTP layers that the target has; those the source lacks are random.",
            rich_help_panel="MTP layers",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of random MTP layers; 0.", rich_help_panel="MTP layers")
    ] = None,
    origin: Annotated[
        Path | None,
        typer.Option(
            "--origin-hf-dir",
            metavar="DIR",
            help="Where config.json and the tokenizer are, if not in SOURCE.",
            rich_help_panel=FILES,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file, as 5GB or 800MB; 5GB.", rich_help_panel=FILES),
    ] = None,
    no_save_optim: Annotated[
        bool,
        typer.Option(
            "--no-save-optim",
            help="dcp: leave out the optimizer's state of a step of a run.",
            rich_help_panel=FILES,
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Weights at work at a time; one for each core.", rich_help_panel=FILES
        ),
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Do not read back what was written: no errors in the manifest.",
            rich_help_panel=FILES,
        ),
    ] = False,
    check_logits: Annotated[
        bool,
        typer.Option(
            "--check-logits",
            help="Run both models on random tokens and compare their predictions; needs memory for one.",
            rich_help_panel=FILES,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=FILES),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=FILES)
    ] = False,
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
