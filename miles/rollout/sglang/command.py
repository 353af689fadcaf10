"""The command line and environment of one SGLang server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).with_name("scripts")
CPU_SERVER = _SCRIPTS / "cpu_server.py"
"""Starts a server on a machine without CUDA; the server's own Python runs it."""
LEASH = _SCRIPTS / "leash.py"
"""Starts a program that ends when we end."""

CPU_ARGS: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.2,
    # A scheduler that waits for requests in a busy loop takes a core from the trainer beside it.
    "sleep_on_idle": True,
}
"""What a server needs to run without CUDA; an explicit argument wins."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What one server is told.

    Attributes:
        python: interpreter of the environment that has SGLang.
        args: SGLang's arguments by their own names in snake case; True is a bare switch, False is left out.
        log: file that takes everything the server prints.
        environment: variables beside those of this process.
    """

    python: Path
    args: Mapping[str, Any]
    log: Path
    on_cpu: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def command_line(options: ServerOptions, host: str, port: int, meeting_port: int) -> list[str]:
    """What to execute; the words after the leash are SGLang's own launch command.

    `meeting_port`: where the processes of the server meet.
    """
    ours = {"nccl_port": meeting_port, **(CPU_ARGS if options.on_cpu else {})}
    args = {**ours, **options.args, "host": host, "port": port}
    start = [str(CPU_SERVER)] if options.on_cpu else ["-m", "sglang.launch_server"]
    python, parent = str(options.python), str(os.getpid())
    return [python, str(LEASH), parent, python, *start, *argument_words(args)]


def argument_words(args: Mapping[str, Any]) -> list[str]:
    """`--name value` for each argument, in their order."""
    words: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list | tuple):
            words += [str(item) for item in value]
        elif isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words
