"""`miles train`: from a profile, a run file and flags to a plan, and from the plan to a curve."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from miles import environment
from miles.errors import ConfigError, MilesError
from miles_cli import train_arguments as args
from miles_cli.commands.runs import AskedBy, Json
from miles_cli.completion import SettingsCommand

if TYPE_CHECKING:
    from miles.config import ResolvedConfig
    from miles.orchestration.lineage import Lineage
    from miles.planning import Plan
    from miles.planning.hardware import Hardware
    from miles.planning.rehearsal import Change

app = typer.Typer()

HELP = """Train a policy: from a profile to a curve.

Every setting of a run file is a flag too, under its name in slime, miles or Megatron:
`miles train --profile quickstart --lr 2e-4 --n-samples-per-prompt 16`. `--list-flags` lists them.
"""

EPILOG = (
    "Order: profile < run file < flags < --set. --dry-run --json prints {plan, config}, or {error} with its "
    "findings and outline; a run under --json prints one object {step, total, metrics} per step, and "
    "{run_dir, summary} last."
)


@app.command(
    cls=SettingsCommand,
    help=HELP,
    epilog=EPILOG,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    profile: args.Profile = None,
    config: args.RunFile = None,
    sets: args.Sets = None,
    dry_run: args.DryRun = False,
    as_json: Json = False,
    quiet: args.Quiet = False,
    assume_hardware: args.AssumeHardware = None,
    rehearse: args.Rehearse = False,
    explain: args.Explain = None,
    watch: args.Watch = False,
    parent: args.Parent = None,
    asked_by: AskedBy = "cli",
    list_flags: args.ListFlags = False,
) -> None:
    from miles.config import parse_flags, resolve
    from miles_cli.train_start import lineage_of, parent_dir, refuse_beside_watch

    if list_flags:
        _print_flags()
        return
    if explain:
        _explain(explain, as_json)
        return
    if watch:
        refuse_beside_watch({"--dry-run": dry_run, "--json": as_json, "--quiet": quiet})
    copied = parent_dir(parent, profile, config)
    config = copied / "config.toml" if copied else config
    resolved = resolve(profile, config, parse_flags(context.args), sets or (), named_by="--profile")
    changes: tuple[Change, ...] = ()
    if rehearse:
        from miles.orchestration.rehearsal import rehearse as rehearsed

        resolved, changes = rehearsed(resolved)
    if dry_run:
        _dry_run(resolved, assume_hardware, as_json, changes)
        return
    if assume_hardware:
        raise ConfigError(
            MilesError(
                "a run needs real hardware", where="--assume-hardware", fix="add --dry-run to plan only"
            )
        )
    plan = _plan(resolved, rehearsal=changes)
    if rehearse and not (as_json or quiet):
        _print_plan(resolved, plan, as_json=False)
    if watch:
        from miles_cli.train_watch import train_and_watch

        runs_dir = resolved.config.run.runs_dir or environment.runs_dir()
        raise typer.Exit(train_and_watch([w for w in sys.argv[1:] if w != "--watch"], Path(runs_dir)))
    raise typer.Exit(_run(resolved, plan, as_json, quiet, lineage_of(resolved, copied, asked_by)))


def _plan(
    resolved: ResolvedConfig, assume: Hardware | None = None, rehearsal: tuple[Change, ...] = ()
) -> Plan:
    from miles.planning import collect_facts, make_plan

    return replace(make_plan(resolved, collect_facts(resolved.config, assume=assume)), rehearsal=rehearsal)


def _explain(rule_id: str, as_json: bool) -> None:
    from miles_cli.rule_view import find_rule, rule_dict, rule_lines

    rule = find_rule(rule_id)
    typer.echo(json.dumps(rule_dict(rule)) if as_json else "\n".join(rule_lines(rule)))


def _dry_run(
    resolved: ResolvedConfig, assume: str | None, as_json: bool, rehearsal: tuple[Change, ...]
) -> None:
    """Print the plan; of a refused one the arithmetic on GPUs, before the refusal."""
    from miles.planning import PlanRefused
    from miles.planning.hardware import parse_hardware
    from miles_cli.outline_view import outline_lines

    try:
        plan = _plan(resolved, parse_hardware(assume) if assume else None, rehearsal)
    except PlanRefused as refusal:
        if refusal.outline is not None and not as_json:
            typer.echo("\n".join(outline_lines(refusal.outline)))
        raise
    _print_plan(resolved, plan, as_json)


def _print_plan(resolved: ResolvedConfig, plan: Plan, as_json: bool) -> None:
    from miles.config import to_json
    from miles.planning.findings import finding_lines
    from miles_cli.plan_view import plan_lines

    if as_json:
        typer.echo(json.dumps({"plan": plan.as_dict(), "config": json.loads(to_json(resolved))}))
        return
    for line in (*plan_lines(plan), *finding_lines(plan.findings)):
        typer.echo(line)


def _run(resolved: ResolvedConfig, plan: Plan, as_json: bool, quiet: bool, lineage: Lineage) -> int:
    from miles_cli.session import conduct, prepare

    if resolved.config.cluster.address is not None:
        from miles.orchestration.submission import submit

        return conduct(lambda observer: submit(resolved, plan, observer), as_json, quiet)

    prepare(plan)

    from miles.orchestration.launch import run

    return conduct(lambda observer: run(resolved, plan, observer=observer, lineage=lineage), as_json, quiet)


def _print_flags() -> None:
    from miles.config import fields

    section = ""
    for field in fields():
        if field.section != section:
            section = field.section
            typer.echo(f"[{section}]")
        typer.echo(f"  {field.flag} ({field.type}): {' '.join(field.help.split())}")
