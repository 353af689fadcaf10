"""`miles replay`: one kept step of a run, run again."""

from __future__ import annotations

from typing import Annotated

import typer

from miles.errors import ExitCode
from miles_cli.commands.runs import Json, RunName, RunsDir, find_run

app = typer.Typer()

EPILOG = (
    "Exit codes: 0 done · 1 no such run or step · 2 bad setting · 3 the settings cannot run here · 5 exact "
    "numerics, and some token differs. --json: {step, agrees, verdict, numerics, weight_versions, gaps: "
    "{sides: {tokens, differing, mean, max}}, first_token, first_difference}."
)


@app.command(epilog=EPILOG)
def replay(
    run: RunName = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="A step that was kept; default: the newest.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting for both sides."),
    ] = None,
    engine_sets: Annotated[
        list[str] | None,
        typer.Option("--engine-set", metavar="KEY=VALUE", help="Change a setting for the engine alone."),
    ] = None,
    perturb: Annotated[
        str | None,
        typer.Option(
            "--perturb", metavar="WEIGHT", help="Give the engine this weight one ulp up: is it found?"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Samples that the engine reads again, the farthest first.")
    ] = 16,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Run a step that `--capsule-interval` kept again; name the first token and layer that differ."""
    path = find_run(run, runs_dir)
    from miles.orchestration.capsule import read_capsule

    read_capsule(path, step)
    from miles.orchestration.replay import as_dict, as_lines
    from miles.orchestration.replay import replay as run_again
    from miles_cli.render.json_text import json_text

    result = run_again(
        path, step, sets=sets or (), engine_sets=engine_sets or (), perturb=perturb, most_samples=samples
    )
    typer.echo(json_text(as_dict(result)) if as_json else "\n".join(as_lines(result)))
    promised = all(text.startswith("exact") for text in result.numerics.values())
    raise typer.Exit(ExitCode.CRITICAL if promised and not result.agrees else ExitCode.OK)
