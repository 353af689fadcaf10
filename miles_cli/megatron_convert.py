"""`miles convert` to and from Megatron's distributed checkpoints, by megatron-core itself."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles.errors import ConfigError, MilesError, Unavailable
from miles_cli.convert_options import MEGATRON, Options


def concerns_megatron(source: Path, options: Options) -> bool:
    """Whether either side is a checkpoint of Megatron."""
    if options.to in MEGATRON:
        return True
    from miles.weights.convert.source import is_megatron

    return is_megatron(source)


def convert_megatron(
    source: Path, target: Path, origin: Path | None, options: Options, dry_run: bool
) -> dict[str, Any]:
    """Hugging Face to `torch_dist` or back, bit for bit; the answer as JSON-able values.

    Raises ConfigError for words without effect, Unavailable without megatron-core, CheckpointError as the
    reader and the writer do.
    """
    from miles.weights.convert.source import is_megatron, model_directory

    if replace(options, to=None) != Options():
        raise ConfigError(
            MilesError(
                "weights of a torch_dist checkpoint are copied as they are",
                where="--to torch_dist" if options.to else str(source),
                fix="leave the other flags out; convert the Hugging Face side for another format",
            )
        )
    backwards = is_megatron(source)
    if backwards and options.to is not None:
        raise ConfigError(
            MilesError(
                f"a checkpoint of Megatron is not converted to {options.to} at once",
                where="--to",
                fix="leave --to out for a Hugging Face checkpoint, and convert that",
            )
        )
    if find_spec("megatron") is None:
        raise Unavailable(
            "megatron-core is not installed",
            where=str(source) if backwards else "--to torch_dist",
            why="it reads and writes its own checkpoints",
            fix="pip install 'miles[megatron]'",
        )
    answer = {
        "source": str(source),
        "target": str(target),
        "format": "hf" if backwards else "torch_dist",
        "written": not dry_run,
    }
    if dry_run:
        return answer
    from miles.training.megatron.torch_dist import hf_to_torch_dist, torch_dist_to_hf

    if backwards:
        return answer | {"tensors": torch_dist_to_hf(source, target, origin)}
    return answer | {"tensors": hf_to_torch_dist(model_directory(source), target)}
