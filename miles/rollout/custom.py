"""The generation hook: a user's `async (args, sample, sampling_params) -> Sample` makes one response.

`args` generates and appends; how turns, tools and environments follow one another is the function's business.

>>> async def twice(args, sample, sampling_params):
...     sample = await args.generate(sample, sampling_params)
...     if sample.status is not SampleStatus.COMPLETED:
...         return sample
...     return await args.generate(args.with_tool_output(sample, "Check your answer."), sampling_params)
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from miles.data.hooks import Hook, HookError, blame, hook_name, hook_place
from miles.data.sample import Sample, SampleStatus
from miles.data.turns import with_tool_output
from miles.errors import MilesError
from miles.rollout.engine import GenerationClient
from miles.rollout.generate import Detokenize, GenerationSettings, fill, request_for, resumed, unfinished

Encode = Callable[[str], list[int]]
"""Text inside a response to token ids, without special tokens around it."""


@dataclass(frozen=True)
class Surroundings:
    """What all responses of a run are made with. `config`: the run file."""

    config: Any
    engine: GenerationClient
    encode: Encode
    decode: Detokenize


class GenerateArgs:
    """What a generation function is given as `args`: one per sample and rollout.

    Attributes:
        config: the run file.
        encode: text to ids; `decode`: ids to text.
    """

    def __init__(
        self, surroundings: Surroundings, settings: GenerationSettings, rollout_id: int, member: int
    ) -> None:
        self.config = surroundings.config
        self.encode, self.decode = surroundings.encode, surroundings.decode
        self._engine, self._settings = surroundings.engine, settings
        self._rollout_id, self._member = rollout_id, member
        self._cut_off = False

    async def generate(self, sample: Sample, sampling_params: Mapping[str, Any] | None = None) -> Sample:
        """A copy of the sample with one more turn of the policy: tokens, log-probs, weight versions, and the
        routes of the whole prefix. Status: COMPLETED when the turn ended itself, TRUNCATED at a limit,
        ABORTED when the rollout ends (return it at once: a later rollout may go on with it).

        `sampling_params`: changes to the run's own, under their names, but for the temperature, at which the
        trainer compares log-probs; `max_new_tokens` limits this turn.
        """
        if self._cut_off:
            raise HookError(
                "generation went on after the sample was aborted",
                why="the rollout is over; an aborted sample is returned as it is",
                fix="return the sample when its status is SampleStatus.ABORTED",
            )
        settings = self._for_turn(sample, sampling_params or {})
        request = request_for(sample, self._member, settings, self._rollout_id)
        (output,) = await self._engine.generate([request])
        self._cut_off = output.finish_reason == "abort"
        return fill(sample, asdict(request.sampling), output, self.decode)

    def with_tool_output(self, sample: Sample, text: str) -> Sample:
        """A copy of the sample with a tool's words behind it: context that is not trained on.

        Where they leave no room for another token the sample stays as it was, and is TRUNCATED.
        """
        ids = self.encode(text)
        settings = self._settings
        left = min(
            settings.max_context_len - len(sample.tokens),
            settings.sampling.max_new_tokens - sample.response_length,
        )
        if len(ids) >= left:
            return replace(sample, status=SampleStatus.TRUNCATED)
        longer = with_tool_output(sample, ids)
        longer.response = self.decode(longer.tokens[longer.prompt_length :])
        return longer

    def _for_turn(self, sample: Sample, changes: Mapping[str, Any]) -> GenerationSettings:
        """The settings under which `request_for` counts over the whole response."""
        own = self._settings.sampling
        if "stop" in changes:
            stop = changes["stop"] or ()
            changes = {**changes, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        unknown = set(changes) - set(asdict(own))
        if unknown:
            raise HookError(
                f"unknown sampling parameters: {', '.join(sorted(unknown))}",
                why=f"there is: {', '.join(asdict(own))}",
            )
        if changes.get("temperature", own.temperature) != own.temperature:
            raise HookError(
                f"a turn at temperature {changes['temperature']:g} in a run at {own.temperature:g}",
                why="the trainer computes log-probs at one temperature",
                fix="set --rollout-temperature, for all turns",
            )
        sampling = replace(own, **changes)
        if "max_new_tokens" in changes:
            of_turn = sample.response_length + sampling.max_new_tokens
            sampling = replace(sampling, max_new_tokens=min(of_turn, own.max_new_tokens))
        return replace(self._settings, sampling=sampling)


async def generate_group_with(
    hook: Hook,
    group: Sequence[Sample],
    surroundings: Surroundings,
    settings: GenerationSettings,
    rollout_id: int,
) -> list[Sample]:
    """Let the hook make every missing response of a prompt group, all of them at once.

    Raises:
        HookError: it failed, or returned no sample that can be trained on.
    """
    params = asdict(settings.sampling)

    async def one(member: int, sample: Sample) -> Sample:
        if not unfinished(sample):
            return sample
        given = replace(resumed(sample, settings), metadata=dict(sample.metadata))
        args = GenerateArgs(surroundings, settings, rollout_id, member)
        return _checked(await _call(hook, args, given, dict(params)), sample, hook)

    return list(await asyncio.gather(*(one(member, sample) for member, sample in enumerate(group))))


async def _call(hook: Hook, *given: Any) -> Any:
    """Call the hook; the engine's own refusals stay what they are, everything else is the user's."""
    try:
        result = hook(*given)
        return await result if inspect.isawaitable(result) else result
    except MilesError:
        raise
    except Exception as error:  # User code may raise anything, and all of it is theirs to see.
        raise blame(error, hook) from error


def _checked(result: Any, sample: Sample, hook: Hook) -> Sample:
    """The returned sample, which must be a continuation of the given one."""
    if not isinstance(result, Sample):
        problem = f"returned {type(result).__name__}, not a Sample"
    elif result.status is SampleStatus.PENDING:
        problem = "returned a pending sample"
    elif (result.group_index, result.index) != (sample.group_index, sample.index):
        problem = "returned another sample than the one it was given"
    elif result.tokens[: sample.prompt_length] != sample.tokens[: sample.prompt_length]:
        problem = "changed the prompt of its sample"
    else:
        result.validate()
        return result
    raise HookError(
        f"{hook_name(hook)} {problem}",
        where=hook_place(hook),
        why="a generation function returns its sample with a response: async (args, sample, sampling_params)",
    )
