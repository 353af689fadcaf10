"""Built-in verifiers by the name that `--rm-type` gives them."""

from __future__ import annotations

import difflib

from miles.errors import ConfigError, MilesError
from miles.rewards.boxed import boxed
from miles.rewards.exact import exact
from miles.rewards.math_answer import MathVerifier
from miles.rewards.outcome import Verifier
from miles.rewards.random_reward import random_reward

BUILT_IN = ("exact", "math", "random")
BOXED_PREFIX = "boxed_"


def built_in_verifier(rm_type: str) -> Verifier:
    """One of `BUILT_IN`, or `boxed_<name>`. Raises ConfigError for any other name."""
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
    plain: dict[str, Verifier] = {"exact": exact, "random": random_reward}
    verifier: Verifier = plain[name] if name in plain else MathVerifier()
    return boxed(verifier) if rm_type.startswith(BOXED_PREFIX) else verifier
