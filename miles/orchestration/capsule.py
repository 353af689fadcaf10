"""One step of a run kept whole, so that it can be run again: every sample, and the weights it starts from.

capsules/step-000002/{capsule.json, samples.jsonl, trainer/model/…}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from miles.data.sample import Sample
from miles.errors import RunError
from miles.record import RunLayout

TRAINER_DIR = "trainer"


@dataclass(frozen=True)
class Capsule:
    """What the trainer was given at a step. `model`: a checkpoint directory with its weights before it."""

    step: int
    samples: list[Sample]
    model: Path


async def write_capsule(
    run_dir: Path, step: int, samples: Sequence[Sample], save: Callable[[Path], Awaitable[None]]
) -> Path:
    """Keep a step through a temporary directory. `save` writes the trainer's weights into a directory.

    Raises: RunError when the disk refuses.
    """
    target = RunLayout(run_dir).capsule(step)
    partial = target.with_name(f".partial-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / TRAINER_DIR).mkdir(parents=True)
        with open(partial / "samples.jsonl", "w") as file:
            file.writelines(json.dumps(sample.to_dict()) + "\n" for sample in samples)
        (partial / "capsule.json").write_text(json.dumps({"step": step, "samples": len(samples)}) + "\n")
        await save(partial / TRAINER_DIR)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"step {step} could not be kept",
            where=str(target),
            why=str(error.strerror),
            fix="free some space, or leave --capsule-interval out",
        ) from error
    return target


def read_capsule(run_dir: Path, step: int | None) -> Capsule:
    """The kept step of a run; None: the newest. Raises RunError with the steps there are."""
    layout = RunLayout(run_dir)
    kept = kept_steps(run_dir)
    if not kept:
        raise RunError(
            "the run kept no step whole",
            where=str(layout.capsules_dir),
            why="a step is run again from all its samples and the weights before it",
            fix="train with --capsule-interval 1, or go on with it: miles runs resume RUN "
            "--set debug.capsule_interval=1",
        )
    step = kept[-1] if step is None else step
    if step not in kept:
        raise RunError(
            f"step {step} was not kept",
            where=str(layout.capsules_dir),
            fix=f"steps that were: {', '.join(map(str, kept))}",
        )
    path = layout.capsule(step)
    model = path / TRAINER_DIR / "model"
    if not any(model.glob("*.safetensors")):
        raise RunError(f"the weights of step {step} are gone", where=str(model), fix="replay another step")
    try:
        lines = (path / "samples.jsonl").read_text().splitlines()
        samples = [Sample.from_dict(json.loads(line)) for line in lines]
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"the samples of step {step} cannot be read", where=str(path), why=str(error)
        ) from error
    return Capsule(step, samples, model)


def kept_steps(run_dir: Path) -> list[int]:
    """The steps of a run that can be run again, ascending."""
    found = RunLayout(run_dir).capsules_dir.glob("step-*/capsule.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)
