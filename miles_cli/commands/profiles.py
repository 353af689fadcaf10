"""`miles profiles`: the profiles that runs are built from, with the origin of every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from miles.errors import ConfigError, MilesError

if TYPE_CHECKING:
    from miles.config import FieldInfo
    from miles.config.files import ConfigFile

app = typer.Typer(help="List, show and check the profiles that runs are built from.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _complete(incomplete: str) -> list[str]:
    """Names for shell completion."""
    from miles.config.shipped import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


def _complete_source(incomplete: str) -> list[str]:
    """Profiles, then runs, for shell completion."""
    from miles_cli.commands.runs import complete_run

    return [*_complete(incomplete), *complete_run(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    """Keys of the run file for shell completion."""
    from miles.config import fields

    return [field.dotted for field in fields() if field.dotted.startswith(incomplete)]


Source = Annotated[
    str,
    typer.Argument(
        help="A shipped profile, a TOML file, a run's directory or its id.", autocompletion=_complete_source
    ),
]

Profile = Annotated[
    str,
    typer.Argument(
        help="A shipped profile, or the path of a TOML file (./my.toml).", autocompletion=_complete
    ),
]


@app.command("ls")
def list_profiles(as_json: Json = False) -> None:
    """List shipped profiles: the recipes, then the layers they are made of."""
    from miles.config.shipped import shipped_names

    files = {name: _shipped_file(name) for name in shipped_names()}
    if as_json:
        rows = [
            {
                "name": name,
                "description": file.description,
                "extends": list(file.extends),
                "layer": "/" in name,
            }
            for name, file in files.items()
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    width = max(len(name) for name in files)
    for name, file in files.items():
        typer.echo(f"{name:<{width}}  {file.description}")
    typer.echo("A name with / is a layer for `extends`. Next: miles profiles show NAME", err=True)


@app.command("show")
def show(
    profile: Profile,
    everything: Annotated[
        bool, typer.Option("--all", help="Show settings at their default as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a profile resolved, with the file and line each value comes from."""
    from miles.config import dump_toml, resolve, to_json

    resolved = resolve(profile)
    typer.echo(to_json(resolved) if as_json else dump_toml(resolved, defaults=everything), nl=False)


@app.command("validate")
def validate(
    profiles: Annotated[
        list[str] | None,
        typer.Argument(
            help="Profiles or TOML files; default: all that are shipped.", autocompletion=_complete
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check profiles: keys, types, and settings that contradict each other."""
    from miles.config import resolve
    from miles.config.shipped import shipped_names

    problems: list[MilesError] = []
    for name in profiles or shipped_names():
        try:
            resolve(name)
        except ConfigError as error:
            problems += [problem for problem in error.problems if str(problem) not in map(str, problems)]
            continue
        if not as_json:
            typer.echo(f"ok  {name}")
    if problems:
        raise ConfigError(*problems)
    if as_json:
        typer.echo(json.dumps({"valid": list(profiles or shipped_names())}))


@app.command(
    "explain",
    epilog="--json: [{key, value, origin, default, flag, type, help}]; with --precision {rollout, training, "
    "plain, first_layers, last_layers, kept, tensors: [{name, role, storage, compute, reason}]}.",
    context_settings={"ignore_unknown_options": True},
)
def explain(
    source: Source,
    key: Annotated[
        str | None,
        typer.Argument(
            help="section.name, a name, a section or a flag; default: every setting not at its default. "
            "With --precision a part of tensor names; default: every tensor.",
            autocompletion=_complete_key,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Explain settings at their default as well.")
    ] = False,
    precision: Annotated[
        bool,
        typer.Option("--precision", help="Show how each tensor of the model is stored and computed with."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say where each value comes from (default, file and line, flag, rule) and what it means."""
    from miles_cli.config_source import load_config
    from miles_cli.render.config_text import setting_dict, setting_lines
    from miles_cli.render.json_text import json_text

    resolved = load_config(source)
    if precision:
        from miles_cli.render.precision_text import precision_dict, precision_lines, tensor_precisions

        policy, tensors = tensor_precisions(resolved, key)
        shown = json_text(precision_dict(policy, tensors)) if as_json else None
        typer.echo(shown or "\n".join(precision_lines(policy, tensors)))
        return
    wanted = _wanted(key)
    if key is None and not everything:
        wanted = [field for field in wanted if str(resolved.origin(field.dotted)) != "default"]
    if as_json:
        typer.echo(json_text([setting_dict(resolved, field) for field in wanted]))
        return
    for field in wanted:
        for line in setting_lines(resolved, field):
            typer.echo(line)


def _wanted(key: str | None) -> list[FieldInfo]:
    """The settings that a key, a name, a section or a flag means. Raises ConfigError with a suggestion."""
    from miles.config import fields, find_flag, find_key
    from miles.config.lookup import closest_flag, closest_key, closest_section
    from miles.config.suggest import did_you_mean

    if key is None:
        return list(fields())
    if key.startswith("--"):
        flag = find_flag(key)
        found, near = [flag[0]] if flag else [], closest_flag(key)
    else:
        exact = find_key(key)
        named = [field for field in fields() if key in (field.name, field.section)]
        found, near = [exact] if exact else named, closest_key(key) or closest_section(key)
    if not found:
        fix = did_you_mean(near, "`miles train --list-flags` lists them")
        raise ConfigError(MilesError(f"there is no setting {key!r}", fix=fix))
    return found


@app.command(
    "diff",
    epilog="Exit code 0 whether they differ or not. --json: {left, right, differences: [{key, left: {value, "
    "origin}, right}]}.",
)
def diff(left: Source, right: Source, as_json: Json = False) -> None:
    """Name every setting in which two configurations differ, and where each value comes from."""
    from miles_cli.config_source import load_config
    from miles_cli.render.config_text import difference_lines, differences
    from miles_cli.render.json_text import json_text

    found = differences(load_config(left), load_config(right))
    if as_json:
        rows = [item.as_dict() for item in found]
        typer.echo(json_text({"left": left, "right": right, "differences": rows}))
        return
    for line in difference_lines(found, left, right):
        typer.echo(line)
    if not found:
        typer.echo("No setting differs.", err=True)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run file, for editors: `#:schema FILE` in the first line of a TOML file."""
    from miles.config.reference import schema_text

    typer.echo(schema_text(), nl=False)


def _shipped_file(name: str) -> ConfigFile:
    from miles.config.files import read_file
    from miles.config.origin import OriginKind
    from miles.config.shipped import shipped_root

    path: Path = shipped_root() / f"{name}.toml"
    return read_file(path, f"profiles/{name}.toml", OriginKind.PROFILE)
