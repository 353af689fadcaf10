"""Esc and the next key in one packet, as a slow line or a busy machine delivers them, are two keys.

Textual takes them for Alt and that key; no action of the dashboard has an Alt key.
"""

from __future__ import annotations

from textual.events import Event, Key

SOON_S = 0.05
"""What Esc closes is closed by then, so that the next key reaches what is under it."""

_ALT = "alt+"


def parted(event: Event) -> tuple[Key, Key] | None:
    """Esc and the key that came with it, or None when `event` is anything else."""
    if not isinstance(event, Key) or not event.key.startswith(_ALT) or event.character is None:
        return None
    key = event.character if event.key.startswith(f"{_ALT}shift+") else event.key.removeprefix(_ALT)
    return Key("escape", "\x1b"), Key(key, event.character)
