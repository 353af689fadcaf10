"""The questions as options of a command: a signature for Typer, made from the table."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import typer

from miles_cli.init.questions import QUESTIONS, Kind, Question, Value

_TYPES: dict[Kind, Any] = {
    Kind.TEXT: str | None,
    Kind.INT: int | None,
    Kind.FLOAT: float | None,
    Kind.SWITCH: bool | None,
}


def with_questions(function: Callable[..., None]) -> Callable[..., None]:
    """The function with one option per question; they arrive in its `**answers`, None where not given."""
    own = [p for p in signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]

    def command(**options: Any) -> None:
        function(**options)

    parameters = [*own, *map(_option, QUESTIONS)]
    command.__doc__ = function.__doc__
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(question: Question) -> Parameter:
    names = [question.flag]
    if question.kind is Kind.SWITCH:
        names = [f"{question.flag}/--no-{question.flag.removeprefix('--')}"]
    option = typer.Option(
        *names,
        help=question.help.replace("[", "\\["),
        rich_help_panel=question.group,
        show_default=False,
        autocompletion=_completion(question),
    )
    return Parameter(
        question.id, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_TYPES[question.kind], option]
    )


def _completion(question: Question) -> Callable[[str], list[str]] | None:
    if question.id == "profile":
        return _profiles
    if question.id == "rm_type":
        return _rewards
    return None


def _profiles(incomplete: str) -> list[str]:
    from miles.config.shipped import shipped_names

    done, comma, word = incomplete.rpartition(",")
    return [done + comma + name for name in shipped_names() if name.startswith(word)]


def _rewards(incomplete: str) -> list[str]:
    from miles_cli.init.suggest_data import reward_choices

    return [name for name in reward_choices() if name.startswith(incomplete)]


def given_answers(options: dict[str, Any]) -> dict[str, Value]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None}
