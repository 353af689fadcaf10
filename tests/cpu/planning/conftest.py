"""A run that preflight has nothing to say about, and the means to change one thing in it."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from miles.arch import ArchSpec
from miles.config import ResolvedConfig, parse_flags, resolve
from miles.planning import Facts
from miles.planning.facts.checkpoint import CheckpointFacts, read_checkpoint
from miles.planning.facts.data import DataFacts
from miles.planning.facts.machine import MachineFacts

GIB = 1024**3

GOOD_FLAGS = """\
--hf-checkpoint /models/small --prompt-data prompts.jsonl --label-key answer --rm-type exact
--rollout-batch-size 32 --n-samples-per-prompt 8 --num-rollout 100 --rollout-max-response-len 64 --lr 4e-4"""


@pytest.fixture
def spec() -> ArchSpec:
    """The built-in MoE: 226,112 parameters, 256 positions."""
    found = read_checkpoint("builtin:sort")[0].spec
    assert found is not None
    return found


@pytest.fixture
def facts(spec: ArchSpec) -> Facts:
    """Facts of a healthy machine, checkpoint and prompt file."""
    prompts = DataFacts(
        name="prompts",
        path="prompts.jsonl",
        setting="data.prompt_data",
        columns=(("data.input_key", "input"), ("data.label_key", "answer")),
        exists=True,
        num_rows=1000,
        keys=frozenset({"input", "answer"}),
        sampled_rows=64,
        prompt_tokens=(20, 30, 40),
    )
    checkpoint = CheckpointFacts(
        "/models/small", "directory", spec=spec, tokenizer_size=spec.vocab_size, has_chat_template=True
    )
    machine = MachineFacts(
        cores=4,
        memory_bytes=16 * GIB,
        memory_available_bytes=8 * GIB,
        disk_path="/",
        disk_free_bytes=50 * GIB,
        gpus=(),
        environment=(),
        shared_memory_bytes=8 * GIB,
        open_files=65536,
        packages=(("psutil", "7.0.0"), ("ray", "2.60.0"), ("torch", "2.13.0")),
    )
    return Facts(machine=machine, checkpoint=checkpoint, prompts=prompts, evals=())


@pytest.fixture
def resolved() -> Callable[..., ResolvedConfig]:
    """The good run with more flags; `without` names flags (each with its value) to leave out."""

    def make(flags: str = "", without: str = "") -> ResolvedConfig:
        words = GOOD_FLAGS.split()
        for flag in without.split():
            del words[words.index(flag) : words.index(flag) + 2]
        return resolve(flags=parse_flags([*words, *shlex.split(flags)]))

    return make
