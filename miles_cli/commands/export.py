"""`miles export`: a recorded run in another system's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miles.errors import ConfigError, MilesError
from miles_cli.commands.runs import Json, RunName, RunsDir, find_run

app = typer.Typer()

FORMATS = ("tensorboard", "parquet", "csv", "openmetrics", "wandb", "mlflow")
EPILOG = (
    "An earlier export to the same place is replaced; MLflow gets a run of its own each time. Exit codes: 0 "
    "written · 1 no such run · 2 unknown format · 4 the tracker's package is not installed. --json: {run_id, "
    "to, files}."
)


def _complete_format(incomplete: str) -> list[str]:
    return [name for name in FORMATS if name.startswith(incomplete)]


@app.command(epilog=EPILOG)
def export(
    run: RunName = None,
    to: Annotated[
        str, typer.Option(help=f"One of {', '.join(FORMATS)}.", autocompletion=_complete_format)
    ] = "tensorboard",
    out: Annotated[
        Path | None, typer.Option(help="Directory to write to; default: exports/ in the run.")
    ] = None,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Write a run's metrics for TensorBoard, a data frame, Prometheus, W&B or MLflow."""
    if to not in FORMATS:
        raise ConfigError(
            MilesError(f"{to!r} is no export format", where="--to", fix=f"choose one of {', '.join(FORMATS)}")
        )
    run_dir = find_run(run, runs_dir)

    from miles.exporters import export_run
    from miles_cli.render.json_text import json_text

    files = export_run(run_dir, to, out)
    if as_json:
        typer.echo(json_text({"run_id": run_dir.resolve().name, "to": to, "files": [str(f) for f in files]}))
        return
    for path in files:
        typer.echo(path)
    if to == "tensorboard":
        typer.echo(f"Next: tensorboard --logdir {files[0].parent.parent}", err=True)
