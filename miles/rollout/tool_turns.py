"""Turns of a policy and a tool: the policy speaks, the tool answers, until the tool has nothing to say.

A generation function for `--custom-generate-function-path`, made from a tool:

>>> # my_tools.py
>>> from miles.rollout.tool_turns import tool_turns
>>> async def calculator(text: str) -> str | None: ...
>>> generate = tool_turns(calculator, max_outputs=4)

and `miles train --custom-generate-function-path my_tools.py:generate`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from miles.data.hooks import HookError, call_hook, hook_name, hook_place
from miles.data.sample import Sample, SampleStatus
from miles.data.turns import last_turn, spoken, tool_outputs
from miles.rollout.custom import GenerateArgs

Tool = Callable[[str], Awaitable[str | None] | str | None]
"""What the policy said in its last turn, to the text it reads next; None ends the response."""
Turns = Callable[[GenerateArgs, Sample, Mapping[str, Any]], Awaitable[Sample]]


def tool_turns(tool: Tool, max_outputs: int) -> Turns:
    """The generation function of a tool that answers at most `max_outputs` times.

    Its whole state is in the sample, so a response that was cut off in any turn can be continued.
    """

    async def generate(args: GenerateArgs, sample: Sample, sampling_params: Mapping[str, Any]) -> Sample:
        while True:
            sample = await args.generate(sample, sampling_params)
            if sample.status is not SampleStatus.COMPLETED or tool_outputs(sample) >= max_outputs:
                return sample
            started = time.perf_counter()
            answer = await call_hook(tool, args.decode(spoken(sample, last_turn(sample))))
            sample.non_generation_time += time.perf_counter() - started
            if answer is None:
                return sample
            if not isinstance(answer, str):
                raise HookError(
                    f"{hook_name(tool)} returned {type(answer).__name__}",
                    where=hook_place(tool),
                    why="a tool returns text, or None when the response is over",
                )
            sample = args.with_tool_output(sample, answer)
            if sample.status is SampleStatus.TRUNCATED:
                return sample

    return generate
