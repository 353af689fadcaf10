"""Ray as the environment shows it, without loading it: loading takes longer than the whole interview."""

from __future__ import annotations

import socket
from importlib.util import find_spec

from miles.environment import get
from miles_cli.init.world import DASHBOARD_PORT, RayFacts

PROBE_SECONDS = 0.5


def read_ray() -> RayFacts:
    """Whether Ray is installed, and whether the address in RAY_ADDRESS answers."""
    installed = find_spec("ray") is not None
    address = get("RAY_ADDRESS") or ""
    return RayFacts(installed, address, _answers(address) if address else None)


def _answers(address: str) -> bool | None:
    """Whether something listens at `host:port`, with or without a scheme; None for words such as `auto`."""
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host and not port:
        return None
    if not host:
        if "://" not in address:
            return None
        host, port = port, str(DASHBOARD_PORT)
    if not port.isdigit():
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS):
            return True
    except (OSError, OverflowError):
        return False
