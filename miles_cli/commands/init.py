"""`miles init`: from a few answers to a run file that is known to make a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miles_cli.init.options import given_answers, with_questions

if TYPE_CHECKING:
    from miles_cli.init.questions import Value
    from miles_cli.init.session import Session

app = typer.Typer()

EPILOG = (
    "In a terminal this opens a form; --prompts asks line by line; --yes takes every suggestion that no flag "
    "answers. Exit codes: 0 written · 2 an answer is missing or wrong · 3 preflight refuses the run "
    "(--write-anyway writes it) · 130 interrupted; only 0 leaves a file. "
    "--json: {written, path, command, next, answers, missing, plan, findings, reward}."
)


@app.command(epilog=EPILOG)
@with_questions
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="The run file to write.")] = Path("run.toml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take every suggestion; ask nothing.")] = False,
    prompts: Annotated[bool, typer.Option("--prompts", help="Ask line by line, without the form.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    write_anyway: Annotated[
        bool, typer.Option("--write-anyway", help="Write the file even if preflight refuses its run.")
    ] = False,
    no_reward_test: Annotated[
        bool, typer.Option("--no-reward-test", help="Do not score two rows with the reward.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout; asks nothing.")] = False,
    **answers: Any,
) -> None:
    """Make a run file: answers, or suggestions made from this machine, the model and the data."""
    from miles_cli.init.session import Session

    session = Session(path, force, write_anyway, not no_reward_test)
    session.check_target()
    given = session.checked(given_answers(answers))
    if yes or as_json or not sys.stdin.isatty():
        if not yes:
            session.require_every_answer(given)
        session.finish(given, as_json)
    else:
        session.finish(_ask(session, given, prompts), report=False)


def _ask(session: Session, given: dict[str, Value], prompts: bool) -> dict[str, Value]:
    """The answers of a person: in the form, or line by line where it cannot be drawn."""
    from miles_cli.tty import is_interactive

    if prompts or not is_interactive():
        from miles_cli.init.prompts import ask_in_lines

        return ask_in_lines(session, given)
    from miles_cli.init.form import ask_in_form

    return ask_in_form(session, given)
