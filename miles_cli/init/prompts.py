"""The interview line by line, for terminals that cannot draw a form: stderr asks, stdin answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from miles.errors import ConfigError, ExitCode, MilesError
from miles.planning.findings import finding_lines
from miles_cli.init.answers import as_text, parse
from miles_cli.init.interview import Interview, choices
from miles_cli.init.questions import QUESTIONS, Question, Value

if TYPE_CHECKING:
    from miles_cli.init.preview import Preview
    from miles_cli.init.reward_trial import RewardTrial
    from miles_cli.init.session import Session

HELP = "enter takes the suggestion in brackets, - is the empty answer, ctrl-c leaves without writing"


def ask_in_lines(session: Session, given: Mapping[str, Value]) -> dict[str, Value]:
    """Ask what the flags have not answered, show the plan, and go on changing answers until it is right."""
    answers = dict(given)
    _say(HELP)
    group = ""
    done = set(answers)
    while question := _next_question(session.hold(answers), done):
        if question.group != group:
            group = question.group
            _say(f"\n{group}")
        _ask(session, question, answers)
        done.add(question.id)
    while not _agreed(session, answers):
        pass
    return answers


def _next_question(interview: Interview, done: set[str]) -> Question | None:
    """The first question that is asked and was not put yet."""
    asked = {answer.question.id for answer in interview.answers} | {q.id for q in interview.missing}
    return next((q for q in QUESTIONS if q.id in asked and q.id not in done), None)


def _ask(session: Session, question: Question, answers: dict[str, Value]) -> None:
    """Put one question until its answer is one; a suggestion that is taken stays a suggestion."""
    answers.pop(question.id, None)
    interview = session.hold(answers)
    suggested, options = interview.answer(question.id), choices(question.id, interview.scene)
    _say(f"  {question.help}")
    if options:
        _say(f"  one of: {', '.join(options)}")
    if suggested is not None:
        _say(f"  suggested: {suggested.why}")
    while True:
        shown = f" [{as_text(suggested.value)}]" if suggested is not None else ""
        typed = _read(f"{question.title}{shown}: ", question)
        if typed == "" and suggested is not None:
            return
        try:
            answers[question.id] = parse(question, "" if typed == "-" else typed, options)
            if question.id == "profile":
                session.require_profile(typed)
            return
        except MilesError as error:
            answers.pop(question.id, None)
            _say(f"  {error}")


def _agreed(session: Session, answers: dict[str, Value]) -> bool:
    """Show what the answers make; whether the person wants it written."""
    interview = session.hold(answers)
    for unused in interview.unused:
        # An earlier answer was changed so that this question is not asked any more.
        answers.pop(unused.id)
    for question in interview.missing:
        _ask(session, question, answers)
    seen = session.preview(session.hold(answers))
    trial = session.trial(seen)
    _say("")
    for line in (
        *session.report(seen, trial),
        *finding_lines(seen.findings),
        *map(str, (*seen.problems, *filter(None, (seen.unreachable,)))),
    ):
        _say(line)
    return _decided(session, seen, trial, answers)


def _decided(session: Session, seen: Preview, trial: RewardTrial, answers: dict[str, Value]) -> bool:
    """Write, leave, or change one answer and look again."""
    refused = bool(seen.errors or seen.problems or seen.unreachable) or trial.passed is False
    if refused:
        _say("This run is refused: change an answer, or write it all the same.")
    names = {answer.question.id: answer.question for answer in seen.interview.answers}
    go_on = "anyway" if refused else "write"
    _say(f"\n{go_on}, quit, or the name of an answer to change: {', '.join(names)}")
    while True:
        word = _read("? " if refused else "? [write] ", None).removeprefix("--").replace("-", "_")
        if word == "quit":
            raise typer.Exit(ExitCode.INTERRUPTED)
        if word in names:
            _ask(session, names[word], answers)
            return False
        if word == "anyway" and refused and not seen.problems:
            session.write_anyway = True
            return True
        if word in ("", "write") and not refused:
            return True
        _say(f"  {word!r} is none of these")


def _read(prompt: str, question: Question | None) -> str:
    """One line from stdin. Raises ConfigError when there is none: nobody is there to answer."""
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        flag = question.flag if question else "--yes"
        raise ConfigError(
            MilesError("the input ended before the last answer", where=flag, fix=f"give {flag}")
        )
    return line.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
