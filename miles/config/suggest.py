"""Did you mean: the nearest name to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None when none is alike."""
    from difflib import get_close_matches  # only mistakes pay for this import

    return next(iter(get_close_matches(word, list(candidates), n=1, cutoff=0.6)), None)


def did_you_mean(name: str | None, otherwise: str = "") -> str:
    """The `fix` line of an error: the suggestion, or something else to do."""
    return f"did you mean {name}?" if name else otherwise
