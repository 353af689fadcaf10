"""What must be in the environment before ray is imported, and the import itself."""

from __future__ import annotations

import secrets
from types import ModuleType

from miles import environment
from miles.errors import Unavailable
from miles.planning.facts.cluster import token


def load_ray() -> ModuleType:
    """Import ray. Raises: Unavailable with the line that installs it."""
    environment.export_default("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise Unavailable(
            "the ray executor needs ray",
            why=f"{error.name} is not installed",
            fix="pip install 'miles[ray]', or take --executor inline where one process is enough",
        ) from None
    return ray


def prepare_private_runtime() -> None:
    """A runtime of our own: a token of its own, and no port beyond loopback.

    Ray would otherwise write a token into the user's home, and listen on every interface.
    """
    environment.export_default("RAY_AUTH_MODE", "token")
    environment.export_default("RAY_AUTH_TOKEN", secrets.token_hex(24))
    environment.export("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def prepare_client() -> None:
    """Somebody else's cluster: Ray sends the token only when the mode says so before the import."""
    if token() is not None:
        environment.export_default("RAY_AUTH_MODE", "token")
