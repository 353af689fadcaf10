"""Real SGLang servers for tests: one that many share, and the certainty that none is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from e2e_support import PATIENCE_S

from miles.data.sample import Sample, SampleStatus
from miles.data.turns import Reading, continued
from miles.planning.facts.server import ENVIRONMENT
from miles.rollout.engine import GenerateOutput, GenerateRequest
from miles.rollout.sglang.command import ServerOptions
from miles.rollout.sglang.server import ServerProcess

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ENVIRONMENT / "bin" / "python"
CONTEXT = 192
"""Tokens of the longest request to a shared server."""

TRAIN = (
    *("train", "--profile", "quickstart", "--rollout-backend", "sglang", "--server-python", str(PYTHON)),
    *("--eval-prompt-data", "sort", "builtin:sort/test@[0:64]"),
)
ATTACHED = ("--rollout-max-context-len", str(CONTEXT), "--rollout-external-engine-addrs")
"""In front of the address of a shared server."""

T = TypeVar("T")


def settle(scenario: Awaitable[T]) -> T:
    """The result of a coroutine."""

    async def bounded() -> T:
        return await asyncio.wait_for(scenario, PATIENCE_S)

    return asyncio.run(bounded())


def sample_of(index: int, request: GenerateRequest, output: GenerateOutput) -> Sample:
    """What a trainer learns from: two samples a group, one of them rewarded."""
    prompt = Sample(prompt="", tokens=list(request.input_ids), group_index=index // 2, index=index)
    sample = continued(
        prompt,
        Reading(
            token_ids=output.output_ids,
            log_probs=output.log_probs,
            routes=output.routed_experts,
            weight_versions=output.weight_versions,
        ),
    )
    sample.status, sample.reward = SampleStatus.TRUNCATED, float(index % 2)
    return sample


@contextmanager
def serving(checkpoint: Path, log: Path, more: Mapping[str, Any] | None = None) -> Iterator[ServerProcess]:
    """A server of the quickstart's model, for as many requests at once as a step of it has."""
    args = {
        "model_path": str(checkpoint),
        "dtype": "float32",
        "context_length": CONTEXT + 2,
        "max_total_tokens": 256 * (CONTEXT + 16),
        "max_running_requests": 256,
        "skip_tokenizer_init": True,
        "enable_return_routed_experts": True,
        "enable_metrics": True,
        **(more or {}),
    }
    started = ServerProcess(ServerOptions(python=PYTHON, args=args, log=log))
    try:
        settle(started.wait_ready(PATIENCE_S))
        yield started
    finally:
        started.kill()


def server_processes() -> set[int]:
    """Every process of a server: its workers carry a name, its first one the interpreter."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        words = process.info["cmdline"] or [""]
        ours = process.info["name"].startswith("sglang::") or words[0] in (str(PYTHON), "sglang::")
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return found


def assert_ended(before: set[int]) -> None:
    """Nothing of a server that a test started runs any more."""
    deadline = time.monotonic() + PATIENCE_S
    while left := server_processes() - before:
        assert time.monotonic() < deadline, f"servers were left behind: {left}"
        time.sleep(0.2)
