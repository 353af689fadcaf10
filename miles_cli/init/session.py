"""One `miles init`: check the target, hold the interview, refuse or write, and say what comes next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from miles.config import resolve
from miles.errors import ConfigError, MilesError
from miles.planning import PlanRefused
from miles.planning.findings import finding_lines
from miles_cli.init.answers import as_text, parse
from miles_cli.init.interview import Interview, choices, hold
from miles_cli.init.local_world import LocalWorld
from miles_cli.init.preview import Preview, fact_lines, preview
from miles_cli.init.questions import BY_ID, Question, Value
from miles_cli.init.reward_trial import RewardTrial, try_reward
from miles_cli.init.run_file import command, extends
from miles_cli.init.schema_file import write_schema
from miles_cli.init.world import DataLook
from miles_cli.outline_view import outline_lines
from miles_cli.plan_view import plan_lines
from miles_cli.render.json_text import json_text


class Session:
    """What every skin shares; the skins only collect answers."""

    def __init__(self, target: Path, force: bool, write_anyway: bool, test_reward: bool) -> None:
        self.target, self.force, self.write_anyway = target, force, write_anyway
        self.test_reward = test_reward
        self.world = LocalWorld(target)
        self._trials: dict[tuple[str | None, str | None, DataLook | None], RewardTrial] = {}

    def check_target(self) -> None:
        """Refuse to overwrite. Raises MilesError."""
        if self.target.is_dir():
            raise _usage("is a directory", str(self.target), "name a file: miles init run.toml")
        if self.target.exists() and not self.force:
            fix = "name another file, or add --force to replace it"
            raise _usage("the file is there already", str(self.target), fix)
        if self.target.suffix != ".toml":
            raise _usage("a run file ends in .toml", str(self.target), f"miles init {self.target}.toml")
        if not self.target.absolute().parent.is_dir():
            raise _usage("its directory does not exist", str(self.target), f"mkdir -p {self.target.parent}")

    def checked(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """The answers of the flags. Raises ConfigError with every one that is none."""
        problems: list[MilesError] = []
        answers: dict[str, Value] = {}
        for name, value in given.items():
            question = BY_ID[name]
            try:
                answers[name] = parse(question, as_text(value), choices(name, self.hold({}).scene))
            except MilesError as error:
                problems.append(error)
        if problems:
            raise ConfigError(*problems)
        self.require_profile(str(answers.get("profile", "")))
        return answers

    def hold(self, given: Mapping[str, Value]) -> Interview:
        """The interview with these answers."""
        return hold(self.world, given)

    def preview(self, interview: Interview) -> Preview:
        """What these answers would make."""
        return preview(self.world, interview, self.target, write_schema())

    def trial(self, seen: Preview) -> RewardTrial:
        """The reward on two rows."""
        if not self.test_reward or seen.resolved is None:
            return RewardTrial(None, ("not made",))
        reward, data = seen.resolved.config.reward, seen.interview.scene.data
        key = (reward.rm_type, reward.custom_rm_path, data)
        if key not in self._trials:
            self._trials[key] = try_reward(seen.resolved.config, data)
        return self._trials[key]

    def require_every_answer(self, given: Mapping[str, Value]) -> None:
        """Without a terminal and without --yes, every question needs its flag. Raises ConfigError."""
        interview = self.hold(given)
        open_questions = [answer.question for answer in interview.answers if not answer.given]
        if open_questions or interview.missing:
            raise ConfigError(
                _unanswered([*interview.missing, *open_questions], interview, "no terminal to ask in")
            )

    def finish(self, given: Mapping[str, Value], as_json: bool = False, report: bool = True) -> None:
        """Write the run file and say what comes next; `report` tells the plan before.

        Raises ConfigError for a missing answer, PlanRefused when preflight refuses the run and nobody said
        to write it all the same.
        """
        interview = self.hold(given)
        self._refuse_unanswered(interview)
        seen = self.preview(interview)
        if seen.problems:
            raise ConfigError(*seen.problems)
        trial = self.trial(seen)
        if report and not as_json:
            for line in self.report(seen, trial):
                print(line)
        self._refuse_failed(seen, trial)
        for line in finding_lines(seen.findings) if report else ():
            print(line, file=sys.stderr)
        self._write(seen.text)
        self._say_what_is_next(seen, trial, as_json)

    def require_profile(self, names: str) -> None:
        """Raises ConfigError when one of the profiles is not there or is wrong."""
        for name in extends({"profile": names}):
            resolve(name)

    def _refuse_unanswered(self, interview: Interview) -> None:
        problems = [
            MilesError(
                f"{question.title} was answered, but is not asked here",
                where=question.flag,
                why="the answer would have no effect on this run",
                fix="leave it out",
            )
            for question in interview.unused
        ]
        if interview.missing:
            unanswered = _unanswered(list(interview.missing), interview, "it cannot be guessed")
            problems += list(_unreadable(interview)) or [unanswered]
        if problems:
            raise ConfigError(*problems)

    def _refuse_failed(self, seen: Preview, trial: RewardTrial) -> None:
        if self.write_anyway:
            return
        if seen.errors:
            raise PlanRefused(*seen.findings, outline=seen.outline)
        if seen.unreachable is not None:
            raise seen.unreachable
        if trial.passed is False:
            raise ConfigError(
                MilesError(
                    "the reward does not tell an expected answer from an empty one",
                    why="; ".join(trial.lines),
                    fix="check the reward and --label-key, or write the file all the same: --write-anyway",
                )
            )

    def report(self, seen: Preview, trial: RewardTrial) -> Iterator[str]:
        """Facts, the reward's verdict and the plan."""
        yield from fact_lines(seen.interview)
        yield f"reward: {trial}"
        yield ""
        if seen.plan is not None:
            yield from plan_lines(seen.plan)
        elif seen.outline is not None:
            yield from outline_lines(seen.outline)
        yield ""

    def _write(self, text: str) -> None:
        """Write the file; without --force never over one that appeared meanwhile."""
        try:
            with self.target.open("w" if self.force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            self.check_target()
        except OSError as error:
            raise _usage(
                f"cannot be written: {error.strerror}", str(self.target), "name another file"
            ) from error

    def _say_what_is_next(self, seen: Preview, trial: RewardTrial, as_json: bool) -> None:
        again = command(seen.interview, str(self.target))
        following = f"miles train --config {shlex.quote(str(self.target))}"
        if as_json:
            written = {"written": True, "path": str(self.target), "command": again, "next": following}
            reward = {"passed": trial.passed, "lines": trial.lines}
            print(json_text({**written, **seen.as_dict(), "reward": reward}))
            return
        print(f"wrote  {self.target}")
        print(f"again  {again}")
        print(f"next   {following}")


def _usage(what: str, where: str, fix: str) -> ConfigError:
    return ConfigError(MilesError(what, where=where, fix=fix))


def _unreadable(interview: Interview) -> Iterator[MilesError]:
    """What was named and cannot be read: nothing can be suggested from it."""
    scene = interview.scene
    if scene.checkpoint is not None and scene.checkpoint.facts.state == "missing":
        told = f"{scene.checkpoint.facts.name} {scene.checkpoint.facts.problem}"
        yield MilesError(told, where="--hf-checkpoint", fix="name a directory with config.json and weights")
    if scene.columns is not None and scene.columns.problem:
        fix = "name a JSONL or Parquet file of prompts"
        yield MilesError(scene.columns.problem, where="--prompt-data", fix=fix)


def _unanswered(questions: list[Question], interview: Interview, why: str) -> MilesError:
    """One message that names every flag that is missing."""
    flags = " ".join(question.flag for question in questions)
    guessable = not interview.missing
    lines = [f"{question.flag}: {question.help}" for question in interview.missing]
    columns = interview.scene.columns
    if columns is not None and any(question.id.endswith("_key") for question in interview.missing):
        lines.append(f"the columns of {columns.path} are {', '.join(columns.names)}")
    return MilesError(
        f"answers are missing: {flags}",
        why="; ".join([why, *lines]),
        fix="give these flags" + (", or take what is suggested with --yes" if guessable else ""),
    )
