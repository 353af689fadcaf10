"""Built-in verifiers by the name that `--rm-type` gives them."""

from __future__ import annotations

import difflib

from miles.errors import ConfigError, MilesError
from miles.rewards.answer_line import answer_line
from miles.rewards.boxed import boxed
from miles.rewards.choice import choice
from miles.rewards.exact import exact
from miles.rewards.math_answer import MathVerifier
from miles.rewards.outcome import Verifier
from miles.rewards.random_reward import random_reward
from miles.rewards.remote import RemoteReward
from miles.rewards.thought import after_thinking
from miles.rewards.words import words_f1

PLAIN: dict[str, Verifier] = {
    "exact": exact,
    "random": random_reward,
    "dapo": answer_line,
    "f1": words_f1,
    "gpqa": choice,
}
BUILT_IN = (*PLAIN, "math", "deepscaler", "remote_rm")
WITHOUT_LABEL = ("random", "remote_rm")
"""Verifiers that need no expected answer."""
BOXED_PREFIX = "boxed_"


def built_in_verifier(rm_type: str, rm_url: str | None = None) -> Verifier:
    """One of `BUILT_IN`, or `boxed_<name>`. Raises ConfigError for any other name, and for a reward server
    without an address.
    """
    name = rm_type.removeprefix(BOXED_PREFIX)
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise ConfigError(
            MilesError(
                f"no built-in verifier is called {rm_type!r}",
                where="--rm-type",
                why=f"there is: {', '.join(BUILT_IN)}, each also with the prefix {BOXED_PREFIX}",
                fix=f"--rm-type {near[0]}" if near else "--custom-rm-path path/to/file.py:function",
            )
        )
    verifier = PLAIN[name] if name in PLAIN else _made(name, rm_url)
    return boxed(verifier) if rm_type.startswith(BOXED_PREFIX) else verifier


def _made(name: str, rm_url: str | None) -> Verifier:
    """A verifier that has processes or connections of its own."""
    if name == "math":
        return MathVerifier()
    if name == "deepscaler":
        return after_thinking(MathVerifier())
    if rm_url is None:
        raise ConfigError(MilesError("remote_rm has no server", where="--rm-type", fix="add --rm-url URL"))
    return RemoteReward(rm_url)
