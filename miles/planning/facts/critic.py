"""Whether a critic's checkpoint fits the policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles.arch import ArchSpec, load_spec, optional_copies, published_tensors
from miles.arch.checkpoint import tensor_problems
from miles.arch.safetensors_header import read_headers
from miles.errors import CheckpointError


@dataclass(frozen=True)
class CriticFacts:
    """A named checkpoint; `problem` says why no critic can start from it, and is empty where one can."""

    name: str
    problem: str = ""


def read_critic_facts(name: str | None, policy: ArchSpec | None) -> CriticFacts | None:
    """Facts of `critic_load` from config and headers; None without one, or without a model that it could be
    compared with.
    """
    if name is None or policy is None or not Path(name).is_dir():
        return None
    try:
        return CriticFacts(name, _misfit(Path(name), policy))
    except CheckpointError as error:
        return CriticFacts(name, str(error))


def _misfit(directory: Path, policy: ArchSpec) -> str:
    """What is missing, too much or of another shape: a language model's head and MTP layers stay behind, and
    a value head may be made."""
    wanted, saved = published_tensors(policy.critic), load_spec(directory)
    spare = {*published_tensors(saved), *optional_copies(saved)} - wanted.keys()
    head = policy.critic.head_name
    found = {head: wanted[head]} | {name: entry.shape for name, entry in read_headers(directory).items()}
    other = saved.other_parts
    kept = {n: shape for n, shape in found.items() if n not in spare and not n.startswith(other)}
    return tensor_problems(wanted, {}, kept)
