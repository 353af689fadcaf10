"""The environment that runs SGLang servers: its Python and the version in it; nothing of it is run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miles.config import RunConfig

ENVIRONMENT = ".venv-sglang"
"""What `make sglang-cpu` makes."""


@dataclass(frozen=True)
class ServerFacts:
    """`version` of SGLang beside that Python; None where it has none."""

    python: str
    version: str | None
    own: bool = False
    """It is the environment of miles itself, which SGLang then shares with our torch."""


def read_server(config: RunConfig) -> ServerFacts | None:
    """The environment that the run file names, else the one that lies at hand; None where there is none."""
    if config.engine.server_python is not None:
        python = Path(config.engine.server_python).expanduser()
        return ServerFacts(str(python), _sglang_beside(python))
    for root in (Path.cwd(), Path(__file__).parents[3]):
        python = root / ENVIRONMENT / "bin" / "python"
        if python.is_file():
            return ServerFacts(str(python), _sglang_beside(python))
    try:
        return ServerFacts(sys.executable, version("sglang"), own=True)
    except PackageNotFoundError:
        return None


def _sglang_beside(python: Path) -> str | None:
    """From the name of its metadata directory. A link is not followed: it leads out of the environment."""
    found = sorted(python.parent.parent.glob("lib/python3.*/site-packages/sglang-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else None
