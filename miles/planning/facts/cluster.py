"""What a running Ray cluster has, asked of its job server over HTTP; ray itself is not loaded."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from miles import environment
from miles.errors import ConfigError, MilesError, Unavailable

PROBE_SECONDS = 2.0
"""A Ray client waits more than 90 s for a dead address; a TCP connection is tried first."""
REQUEST_SECONDS = 60.0


@dataclass(frozen=True)
class ClusterFacts:
    """The living nodes of a cluster, added up."""

    address: str
    ray_version: str
    nodes: int
    cpus: float
    gpus: float


def job_server(address: str, default_port: int) -> str:
    """`cluster.address` as the base URL of a job server: http://host:port.

    Raises: ConfigError for an address of another of Ray's servers.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            MilesError(
                f"cluster.address = {address!r} is not the address of a job server",
                why="a run is submitted over HTTP to the port of Ray's dashboard",
                fix=f"--address http://{parts.hostname or 'HOST'}:{default_port}",
            )
        )
    return f"{parts.scheme}://{parts.hostname}:{parts.port or default_port}"


def probe(url: str) -> None:
    """Raises Unavailable when nothing listens at `url`, after two seconds at most."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise Unavailable(
            "the cluster does not answer",
            where=url,
            why=f"no connection within {PROBE_SECONDS:g} s: {error}",
            fix="check the address (the port of Ray's dashboard, 8265 by default), that the head node is up, "
            "and that its --dashboard-host is reachable from here",
        ) from None


def read_cluster(url: str) -> ClusterFacts:
    """Ask the job server at `url` for its nodes. Raises: Unavailable."""
    probe(url)
    version = get_json(url, "/api/version")
    rows = get_json(url, "/api/v0/nodes?limit=10000&detail=true")["data"]["result"]["result"]
    alive = [row["resources_total"] for row in rows if row["state"] == "ALIVE"]
    if not alive:
        raise Unavailable(
            "the cluster has no living node",
            where=url,
            why="it is starting up or going down",
            fix="try again",
        )
    return ClusterFacts(
        address=url,
        ray_version=str(version.get("ray_version", "unknown")),
        nodes=len(alive),
        cpus=sum(node.get("CPU", 0.0) for node in alive),
        gpus=sum(node.get("GPU", 0.0) for node in alive),
    )


def token() -> str | None:
    """The cluster's access token: RAY_AUTH_TOKEN, else the file that Ray keeps it in."""
    given = environment.get("RAY_AUTH_TOKEN")
    if given:
        return given.strip()
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def auth_headers() -> dict[str, str]:
    """The header that carries the token, where there is one."""
    secret = token()
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def get_json(url: str, path: str) -> Any:
    """GET from the job server. Raises: Unavailable, naming the token when that is what lacks."""
    request = urllib.request.Request(url + path, headers=auth_headers())
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise Unavailable("the cluster refused a request", where=url + path, why=str(error)) from None
        raise Unavailable(
            "the cluster asks for a token" if error.code == 401 else "the cluster refuses the token",
            where=url,
            why=f"{error.code} {error.reason}; Ray keeps its token in ~/.ray/auth_token on the head node",
            fix="export RAY_AUTH_TOKEN=…, or name the file with RAY_AUTH_TOKEN_PATH",
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise Unavailable(
            "this is not a Ray job server", where=url + path, why=str(error), fix="ray[default] runs one"
        ) from None
