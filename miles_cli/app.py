"""The command tree: a static table of verbs, of which only the invoked one is imported.

A module `miles_cli.commands.<name>` exposes `app`, a `typer.Typer`. An app with one command and no callback
is a verb by itself (`miles train`); any other is a group of verbs (`miles runs ls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import typer

from miles._version import __version__
from miles.environment import get

EXIT_CODES = (
    "Exit codes: 0 ok · 1 the run or the command failed · 2 usage or configuration error · 3 preflight "
    "refused · 4 cluster, backend or environment unavailable · 5 diagnose found a critical condition · 8 "
    "still running · 130 interrupted · 143 terminated."
)


@dataclass(frozen=True)
class Verb:
    """One row of the top-level help."""

    name: str
    panel: str
    summary: str


VERBS = (
    Verb("init", "Start", "Make a run file: a few questions, a plan, and a file that says why."),
    Verb("train", "Start", "Train a policy: from a profile to a curve. `--dry-run` prints the plan."),
    Verb("convert", "Start", "Make a checkpoint from another one: other number formats, MTP layers."),
    Verb("watch", "Observe", "Look at a run: its curves, phases and alerts."),
    Verb("export", "Observe", "Write a run's metrics for TensorBoard, a data frame or Prometheus."),
    Verb("runs", "Observe", "List, show, compare, change, stop and resume runs."),
    Verb("diagnose", "Repair", "Name the cause of what a run shows, with evidence and a fix."),
    Verb("replay", "Repair", "Run one kept step again on both sides; name the first layer that differs."),
    Verb("profiles", "Config", "List, show and check the profiles that runs are built from."),
    Verb(
        "plan", "Config", "Explain preflight rules; compute the memory of a layout; list GPUs and features."
    ),
    Verb("data", "Config", "Show prompt data as a run will read it."),
)


def build(argv: Sequence[str]) -> typer.Typer:
    """The Typer tree for this command line: the invoked verb is real, the others only carry their help."""
    root = typer.Typer(
        name="miles",
        help="Reinforcement-learning post-training for large language models, Mixture-of-Experts first.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    root.callback()(_root_options)
    invoked = _invoked(argv)
    for verb in VERBS:
        if verb.name == invoked:
            _mount(root, verb, import_module(f"miles_cli.commands.{verb.name}").app)
        else:
            root.command(verb.name, help=verb.summary, rich_help_panel=verb.panel)(_not_invoked)
    return root


def _invoked(argv: Sequence[str]) -> str | None:
    """The verb on the command line, or on the one that a shell is completing."""
    completing = get("COMP_WORDS") or get("_TYPER_COMPLETE_ARGS")
    words = completing.split()[1:] if completing else argv
    return next((word for word in words if not word.startswith("-")), None)


def _mount(root: typer.Typer, verb: Verb, app: typer.Typer) -> None:
    single = len(app.registered_commands) == 1 and not app.registered_groups and not app.registered_callback
    if not single:
        root.add_typer(
            app, name=verb.name, help=verb.summary, rich_help_panel=verb.panel, no_args_is_help=True
        )
        return
    command = app.registered_commands[0]
    command.name, command.rich_help_panel = verb.name, verb.panel
    root.registered_commands.append(command)


def _not_invoked() -> None:
    raise AssertionError("a verb that was not on the command line was called")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"miles {__version__}")
        raise typer.Exit


def _root_options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of the program itself."""
