"""Which unfinished groups go on first: the user's buffer filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from miles.config import RunConfig
from miles.data.hooks import HookError, call_sync, hook_name, hook_place, load_hook
from miles.data.sample import Sample
from miles.data.source import PickHeld, PromptSource

BUFFER_FILTER = "--buffer-filter-path"


def use_buffer_filter(prompts: PromptSource, config: RunConfig, step: Callable[[], int]) -> None:
    """Let the run file's function choose, where it names one. `step`: which rollout draws."""
    path = config.rollout.buffer_filter_path
    if path is not None:
        prompts.pick = _buffer_filter(path, config, step)


def _buffer_filter(path: str, config: RunConfig, step: Callable[[], int]) -> PickHeld:
    """`(args, rollout_id, buffer, num_samples)` returns at most `num_samples` groups of the buffer, as slime
    and miles call it; whether it takes them out of the list that it is given does not matter.
    """
    hook = load_hook(path, BUFFER_FILTER)

    def pick(held: Sequence[list[Sample]], n: int) -> list[list[Sample]]:
        known = {id(group) for group in held}
        picked = call_sync(hook, config, step(), list(held), n)
        if isinstance(picked, list) and len(picked) <= n:
            ids = [id(group) for group in picked]
            if set(ids) <= known and len(set(ids)) == len(ids):
                return picked
        raise HookError(
            f"{hook_name(hook)} did not choose from the buffer",
            where=hook_place(hook),
            why=f"it has to return a list of at most {n} different groups of the {len(held)} it was given",
        )

    return pick
