"""The accelerators a run is planned for: a table of GPU kinds, and the words that name a cluster of them.

>>> parse_hardware("2x8xB200").num_gpus
16
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from miles.errors import ConfigError, MilesError

TABLE = Path(__file__).with_name("gpus.toml")

Generation = Literal["cpu", "sm80", "sm90", "sm100"]
GENERATIONS: tuple[Generation, ...] = ("cpu", "sm80", "sm90", "sm100")
"""The columns of the capability matrix: no GPU, Ampere and Ada, Hopper, Blackwell."""

GIB = 1024**3

GPUS_PER_NODE = 8
"""GPUs of a node where a cluster is named by its total alone."""

GRAMMAR = "[NODESx]GPUSxKIND[-MEMORYGB], as in 16xH100, 2x8xB200, 8xA100-80GB, 1xL40S; or cpu"


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU. Peaks are dense, in TFLOP/s; None where the format has no tensor cores."""

    name: str
    memory_bytes: int
    sm: int
    bf16_tflops: int | None = None
    fp8_tflops: int | None = None
    fp4_tflops: int | None = None

    @property
    def generation(self) -> Generation:
        """The newest generation that its compute capability reaches."""
        if self.sm >= 100:
            return "sm100"
        return "sm90" if self.sm >= 90 else "sm80"


@dataclass(frozen=True)
class Hardware:
    """Equal nodes of equal GPUs; `kind` None means no GPU."""

    nodes: int
    gpus_per_node: int
    kind: GpuKind | None

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node if self.kind else 0

    @property
    def generation(self) -> Generation:
        return self.kind.generation if self.kind else "cpu"

    def __str__(self) -> str:
        if self.kind is None:
            return "cpu"
        nodes = f"{self.nodes} nodes of {self.gpus_per_node}" if self.nodes > 1 else f"{self.gpus_per_node}"
        return f"{nodes} {self.kind.name} ({self.kind.memory_bytes / GIB:.1f} GiB each)"


CPU = Hardware(nodes=1, gpus_per_node=0, kind=None)


@cache
def gpu_kinds() -> Mapping[str, GpuKind]:
    """The shipped table by name."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _kind(name, row) for name, row in rows.items()}


def _kind(name: str, row: Mapping[str, float]) -> GpuKind:
    peaks = {key: int(value) for key, value in row.items() if key.endswith("_tflops")}
    return GpuKind(name, int(row["memory_gib"] * GIB), int(row["sm"]), **peaks)


def parse_hardware(text: str, named_by: str = "--assume-hardware") -> Hardware:
    """The cluster that a text names; a total above 8 is nodes of 8. `named_by`: the flag that gave it.

    Raises:
        ConfigError: for words outside the grammar, an unknown kind, GPUs that fill no whole nodes.
    """
    if text.lower() == "cpu":
        return CPU
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z][\w-]*)", text)
    if match is None or "0" in (match[1], match[2]):
        raise _refused(named_by, f"{text!r} does not name hardware", f"write {GRAMMAR}")
    kind = find_kind(match[3])
    if kind is None:
        near = get_close_matches(match[3].upper(), gpu_kinds(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise _refused(named_by, f"unknown GPU {match[3]!r}", f"{hint}known: {', '.join(gpu_kinds())}")
    gpus = int(match[2])
    if match[1]:
        return Hardware(int(match[1]), gpus, kind)
    if gpus <= GPUS_PER_NODE:
        return Hardware(1, gpus, kind)
    if gpus % GPUS_PER_NODE:
        raise _refused(
            named_by,
            f"{gpus} GPUs are no whole nodes of {GPUS_PER_NODE}",
            f"say how many nodes: NODESxGPUSx{kind.name}",
        )
    return Hardware(gpus // GPUS_PER_NODE, GPUS_PER_NODE, kind)


def find_kind(name: str) -> GpuKind | None:
    """A kind by name in any case, with its memory or without: `h100`, `A100-80GB`, `A100-40GB`."""
    by_upper = {known.upper(): kind for known, kind in gpu_kinds().items()}
    upper = name.upper()
    if upper in by_upper:
        return by_upper[upper]
    base, _, memory = upper.rpartition("-")
    if base in by_upper and (size := re.fullmatch(r"(\d+)GB?", memory)):
        kind = by_upper[base]
        # The box says 80 GB where the driver reports 79.6 GiB; 10 % apart is another card.
        return kind if abs(int(size[1]) * GIB / kind.memory_bytes - 1) < 0.1 else None
    return None


def detect_kind(driver_name: str, memory_bytes: int, sm: int | None) -> GpuKind:
    """The kind that a driver's name (`NVIDIA H100 80GB HBM3`) belongs to, with the memory it really has.

    A GPU that the table lacks is judged by its compute capability; unknown too, it counts as Ampere.
    """
    words = set(re.split(r"[\s_-]+", driver_name.upper()))
    matches = [kind for name, kind in gpu_kinds().items() if name.upper() in words]
    if not matches:
        return GpuKind(driver_name, memory_bytes, sm or 80)
    known = max(matches, key=lambda kind: len(kind.name))
    return GpuKind(
        known.name, memory_bytes, sm or known.sm, known.bf16_tflops, known.fp8_tflops, known.fp4_tflops
    )


def _refused(where: str, what: str, fix: str) -> ConfigError:
    return ConfigError(MilesError(what, where=where, fix=fix))
