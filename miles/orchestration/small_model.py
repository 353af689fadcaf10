"""A small model with random weights, as a checkpoint on disk.

usage: python -m miles.orchestration.small_model DESCRIBED TARGET; DESCRIBED holds config.json and tokenizer.

A process of its own: the run that asks for it must set the threads of torch before torch is loaded.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from miles.errors import Unavailable

SEED = 0


def make_small_model(described: Path, target: Path) -> None:
    """Write the checkpoint. Raises Unavailable when its process fails."""
    command = [sys.executable, "-m", __name__, str(described), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Unavailable(
            "the small model could not be made", where=str(target), why=said[-1] if said else ""
        )


def write_small_model(described: Path, target: Path) -> None:
    """The same in this process, which loads torch for it."""
    import torch

    from miles.arch import load_spec
    from miles.models.decoder import Decoder
    from miles.models.mtp import MtpDraft
    from miles.weights.hf import write_hf
    from miles.weights.native_map import to_published

    # A description has no weights of other parts to carry along.
    spec = replace(load_spec(described), other_parts=())
    generator = torch.Generator().manual_seed(SEED)
    model = Decoder(spec, dtype=torch.float32)
    model.init_weights(generator)
    draft = None if spec.mtp is None else MtpDraft(spec, dtype=torch.float32)
    if draft is not None:
        draft.init_weights(generator)
    write_hf(target, spec, to_published(model, draft), described, spec.dtype)


if __name__ == "__main__":
    write_small_model(*map(Path, sys.argv[1:]))
