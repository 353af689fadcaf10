"""Ports that the run will listen on and that another program has."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from miles.config import RunConfig


def taken_ports(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """(setting, port) of every port that the run file names and that cannot be bound on this machine."""
    return tuple((setting, port) for setting, port in _named(config) if port and not _is_free(port))


def _named(config: RunConfig) -> Iterator[tuple[str, int]]:
    if config.record.use_prometheus:
        yield "record.prometheus_port", config.record.prometheus_port
    if config.rollout.backend == "sglang":
        for name in ("port", "nccl_port"):
            port = config.sglang.server_args().get(name)
            if isinstance(port, int):
                yield f"sglang.{name}", port


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers after its end does not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
