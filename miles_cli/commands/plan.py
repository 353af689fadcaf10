"""`miles plan`: preflight rules explained, the memory of a layout, GPUs and the capability matrix."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(
    help="Explain preflight rules; compute the memory of a layout; list GPUs and features.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

MEMORY_HELP = """The memory of every phase of a step on one GPU, with its arithmetic.

MODEL is a shipped name (qwen3-30b-a3b) or a checkpoint directory. Every flag of `miles train` is taken too:
`miles plan memory qwen3-30b-a3b --hardware 16xH100 --precision fp8 --layout tp4,ep8 --micro-batch-size 2`.
"""


@app.command("rules")
def rules(as_json: Json = False) -> None:
    """List every preflight rule."""
    from miles.planning.rules import REGISTRY
    from miles_cli.rule_view import rule_dict

    rows = sorted(REGISTRY.values(), key=lambda rule: rule.id)
    if as_json:
        typer.echo(json.dumps([rule_dict(rule) for rule in rows], indent=1))
        return
    for rule in rows:
        typer.echo(f"{rule.id:<6} {rule.severity:<8} {rule.title}")
    typer.echo("Next: miles plan explain RULE", err=True)


@app.command("explain")
def explain(
    rule_id: Annotated[str, typer.Argument(metavar="RULE", help="The id of a preflight rule, such as LAY6.")],
    as_json: Json = False,
) -> None:
    """Explain a preflight rule: its cause, its fix, and who ran into it."""
    from miles_cli.rule_view import find_rule, rule_dict, rule_lines

    rule = find_rule(rule_id)
    typer.echo(json.dumps(rule_dict(rule)) if as_json else "\n".join(rule_lines(rule)))


@app.command("hardware")
def hardware(as_json: Json = False) -> None:
    """List the GPUs that `--assume-hardware` knows."""
    from dataclasses import asdict

    from miles.planning.hardware import GIB, GRAMMAR, gpu_kinds

    kinds = list(gpu_kinds().values())
    if as_json:
        typer.echo(json.dumps([asdict(kind) | {"generation": kind.generation} for kind in kinds], indent=1))
        return
    typer.echo(f"{'kind':<10} {'GiB':>6}  {'sm':<6} {'bf16':>6} {'fp8':>6} {'fp4':>6}  dense TFLOP/s")
    for kind in kinds:
        peaks = (kind.bf16_tflops, kind.fp8_tflops, kind.fp4_tflops)
        shown = " ".join(f"{peak or '-':>6}" for peak in peaks)
        typer.echo(f"{kind.name:<10} {kind.memory_bytes / GIB:>6.1f}  sm{kind.sm:<4} {shown}")
    typer.echo(f"--assume-hardware {GRAMMAR}", err=True)


@app.command("features")
def features_table(as_json: Json = False) -> None:
    """Show the matrix feature x backend x hardware of this build."""
    from miles.planning.features import features
    from miles_cli.feature_view import feature_dict, feature_lines

    rows = features().values()
    if as_json:
        typer.echo(json.dumps([feature_dict(row) for row in rows], indent=1))
        return
    typer.echo("\n".join(feature_lines(rows)))


@app.command(
    "memory",
    help=MEMORY_HELP,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def memory(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A shipped model name or a checkpoint directory.")],
    gpus: Annotated[str, typer.Option("--hardware", help="GPUs to plan for, such as 16xH100.")] = "8xH100",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp8, mxfp8, nvfp4 or int4, on both sides.")
    ] = "bf16",
    layout: Annotated[
        str | None, typer.Option(help="Sizes such as tp4,pp1,cp1,ep8,etp1; default: the first that fits.")
    ] = None,
    disaggregated: Annotated[
        bool, typer.Option("--disaggregated", help="Engines on as many GPUs of their own.")
    ] = False,
    as_json: Json = False,
) -> None:
    from miles_cli.memory_view import memory_outline
    from miles_cli.outline_view import outline_lines

    outline = memory_outline(model, gpus, precision, layout, not disaggregated, context.args)
    if as_json:
        typer.echo(json.dumps(outline.as_dict()))
        return
    typer.echo("\n".join(outline_lines(outline)))
