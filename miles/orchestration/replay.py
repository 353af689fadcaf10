"""One kept step run again through a trainer and an engine: who differs from the record, and where first.

Three log-probs of every trained token are compared: the recorded one, the trainer's on the kept weights, and
that of an engine that reads the sample again on the same weights, prompt at once and response token by token.
The engine decides its routes; the trainer replays the recorded ones where the run does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.arch import ArchSpec, load_spec
from miles.config import ResolvedConfig
from miles.data.batch import TrainBatch, pack
from miles.errors import RunError
from miles.models.hidden_states import Difference, Stages, first_difference, hidden_states, joined
from miles.models.logprob import token_log_probs
from miles.orchestration import assemble, workers
from miles.orchestration.capsule import Capsule, read_capsule
from miles.orchestration.continuation import plan_continuation
from miles.orchestration.decode_kernel import decode_library
from miles.planning import Plan
from miles.rollout.native.engine import NativeEngine
from miles.training.native.forward import forward, make_router
from miles.training.native.micro_batches import make_micro_batch
from miles.training.native.trainer import NativeTrainer
from miles.weights.hf import read_hf


@dataclass(frozen=True)
class Gap:
    """|a - b| over tokens, in nats."""

    tokens: int
    differing: int
    mean: float
    max: float


@dataclass(frozen=True)
class Token:
    """The first token on which two sides differ: its sample in the step and its place in the sequence."""

    sample: int
    position: int
    recorded: float
    trainer: float
    engine: float | None


@dataclass(frozen=True)
class Replay:
    """What came out. `gaps` by pair of sides; `difference` is None where both sides read the sample alike."""

    step: int
    numerics: dict[str, str]
    gaps: dict[str, Gap]
    token: Token | None
    difference: Difference | None
    weight_versions: list[int]

    @property
    def agrees(self) -> bool:
        """Every token has the same bits on every side."""
        return all(gap.differing == 0 for gap in self.gaps.values())

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.agrees:
            return "recorded, trainer and engine agree on every bit"
        if self.difference is not None:
            return f"trainer and engine part in {self.difference.stage}"
        return (
            "on the kept weights trainer and engine agree on this sample: the run's engine had other "
            "weights, or other requests beside it made the difference"
        )


def replay(
    run_dir: Path,
    step: int | None,
    *,
    sets: Sequence[str] = (),
    engine_sets: Sequence[str] = (),
    perturb: str | None = None,
    most_samples: int = 16,
) -> Replay:
    """Run a kept step again (None: the newest).

    Args:
        sets: changes of the run's configuration for both sides, `engine_sets`: for the engine alone.
        perturb: published name of a weight that the engine gets one ulp up, to see that it is found.
        most_samples: samples that the engine reads again, those farthest from the record first.

    Raises: RunError for a step that was not kept; ConfigError and PlanRefused for the changes.
    """
    capsule = read_capsule(run_dir, step)
    resolved, plan = plan_continuation(run_dir, sets)
    engine_resolved, engine_plan = plan_continuation(run_dir, [*sets, *engine_sets])
    for side in (plan, engine_plan):
        _require_native(side)
    workers.settle_process(plan.threads.count)
    spec = load_spec(capsule.model)
    trainer = _trainer(resolved, plan, spec, capsule)
    engine = _engine(engine_resolved, engine_plan, spec, trainer, perturb)
    batch = pack(capsule.samples, resolved.config.reward.reward_key)
    return _compare(capsule, batch, trainer, engine, most_samples)


def _require_native(plan: Plan) -> None:
    if (plan.engine, plan.trainer) != ("native", "native"):
        raise RunError(
            f"a step of {plan.engine} engines and a {plan.trainer} trainer cannot run here",
            why="both sides have to be in this process",
            fix="--set rollout.backend=native --set training.backend=native",
        )


def _trainer(resolved: ResolvedConfig, plan: Plan, spec: ArchSpec, capsule: Capsule) -> NativeTrainer:
    trainer = NativeTrainer(
        spec,
        assemble.trainer_settings(resolved.config, plan, spec),
        dtype=assemble.DTYPES[plan.dtype],
        device=plan.device,
        numerics=assemble.numerics(plan, spec),
    )
    trainer.load_weights(read_hf(capsule.model))
    return trainer


def _engine(
    resolved: ResolvedConfig, plan: Plan, spec: ArchSpec, trainer: NativeTrainer, perturb: str | None
) -> NativeEngine:
    # Fast numerics promise no bits: their engine reads again in torch, where its stages are at hand.
    library = decode_library(plan) if plan.numerics == "exact" else None
    settings = assemble.engine_settings(resolved.config, plan, assemble.numerics(plan, spec), library)
    engine = NativeEngine(spec, settings)
    weights = dict(trainer.named_weights())
    if perturb is not None:
        if perturb not in weights:
            raise RunError(f"the model has no weight {perturb}", fix=f"one it has: {next(iter(weights))}")
        weights[perturb] = torch.nextafter(weights[perturb], torch.full_like(weights[perturb], torch.inf))
    asyncio.run(engine.receive_weights(weights.items(), version=0))
    return engine


def _compare(
    capsule: Capsule, batch: TrainBatch, trainer: NativeTrainer, engine: NativeEngine, most_samples: int
) -> Replay:
    recorded = batch.rollout_log_probs
    if recorded is None:
        raise RunError(f"the samples of step {capsule.step} carry no log-probs", where=str(capsule.model))
    ours = trainer.log_probs(batch).log_probs
    seen = (batch.loss_mask > 0) & ~np.isnan(recorded)
    read = _farthest(batch, np.where(seen, np.abs(ours - recorded), 0.0))[:most_samples]
    theirs = np.full_like(ours, np.nan)
    for sequence in read:
        theirs[_rows(batch, sequence)] = _read_again(batch, sequence, engine, trainer)
    both = seen & ~np.isnan(theirs)
    gaps = {
        "trainer - recorded": _gap(ours[seen], recorded[seen]),
        "engine again - recorded": _gap(theirs[both], recorded[both]),
        "trainer - engine again": _gap(ours[both], theirs[both]),
    }
    row = _first(seen & (ours != recorded), both & (ours != theirs))
    token, difference = None, None
    if row is not None:
        sequence = int((batch.cu_seqlens <= row).sum()) - 1
        start = int(batch.cu_seqlens[sequence])
        again = None if np.isnan(theirs[row]) else float(theirs[row])
        token = Token(
            int(batch.sample_index[sequence]), row - start + 1, float(recorded[row]), float(ours[row]), again
        )
        difference = first_difference(
            _trainer_stages(batch, sequence, trainer), _engine_stages(batch, sequence, engine)
        )
    versions = sorted({version for sample in capsule.samples for version, _ in sample.weight_versions})
    numerics = {"trainer": _describe(trainer), "engine": _describe(engine)}
    return Replay(capsule.step, numerics, gaps, token, difference, versions)


def _describe(side: NativeTrainer | NativeEngine) -> str:
    if isinstance(side, NativeEngine):
        return f"{side.settings.numerics.name}, {str(side.settings.dtype).removeprefix('torch.')}"
    return f"{side.decoder.numerics.name}, {str(side.dtype).removeprefix('torch.')}"


def _gap(one: np.ndarray, other: np.ndarray) -> Gap:
    gap = np.abs(one.astype(np.float64) - other)
    return Gap(
        len(gap), int((one != other).sum()), float(gap.mean()) if len(gap) else 0.0, float(gap.max(initial=0))
    )


def _farthest(batch: TrainBatch, gap_T: np.ndarray) -> list[int]:
    """Sequences, the one with the largest gap first, others in their order."""
    largest = np.maximum.reduceat(gap_T, batch.cu_seqlens[:-1])
    return [int(i) for i in np.argsort(-largest, kind="stable")]


def _first(*masks: np.ndarray) -> int | None:
    """The first row of the first mask that has one."""
    return next((int(mask.argmax()) for mask in masks if mask.any()), None)


def _rows(batch: TrainBatch, sequence: int) -> slice:
    return slice(*(int(end) for end in batch.cu_seqlens[sequence : sequence + 2]))


def _engine_stages(batch: TrainBatch, sequence: int, engine: NativeEngine) -> Stages:
    rows = _rows(batch, sequence)
    prompt = int((batch.loss_mask[rows] > 0).argmax()) + 1
    return engine.rescore(batch.tokens[rows].tolist(), prompt)


@torch.no_grad()
def _read_again(batch: TrainBatch, sequence: int, engine: NativeEngine, trainer: NativeTrainer) -> np.ndarray:
    """The engine's log-probs of a sequence's rows."""
    hidden = _engine_stages(batch, sequence, engine)["final norm"]
    decoder = engine.decoder
    targets: Tensor = torch.from_numpy(batch.targets[_rows(batch, sequence)]).long().to(hidden.device)
    temperature = trainer.settings.algorithm.temperature
    log_probs, _ = token_log_probs(
        hidden,
        decoder.head_weight,
        targets,
        temperature,
        linear=decoder.numerics.linear,
        softcap=decoder.spec.logit_softcap,
        log_softmax=decoder.numerics.log_softmax,
    )
    return log_probs.float().cpu().numpy()


@torch.no_grad()
def _trainer_stages(batch: TrainBatch, sequence: int, trainer: NativeTrainer) -> Stages:
    micro_batch = make_micro_batch(batch, np.array([sequence]), trainer.device)
    router = make_router(micro_batch, replay=trainer.settings.replay_routes)
    with hidden_states(trainer.decoder) as seen:
        forward(trainer.decoder, micro_batch, router, trainer.settings.algorithm.temperature, False)
    return joined(seen)


def as_lines(result: Replay) -> Iterator[str]:
    """The report for a terminal."""
    yield f"step {result.step}, sampled by weight version {', '.join(map(str, result.weight_versions))}"
    yield "  ".join(f"{side}: {text}" for side, text in result.numerics.items())
    for name, gap in result.gaps.items():
        yield (
            f"{name:<24} {gap.differing} of {gap.tokens} tokens differ, "
            f"mean {gap.mean:.3e}, max {gap.max:.3e}"
        )
    if (token := result.token) is not None:
        again = "-" if token.engine is None else f"{token.engine:.9g}"
        yield (
            f"first token: sample {token.sample}, position {token.position}: recorded {token.recorded:.9g}, "
            f"trainer {token.trainer:.9g}, engine again {again}"
        )
    if (found := result.difference) is not None:
        where = "outside the layers" if found.layer is None else f"layer {found.layer}"
        yield (
            f"first difference: {found.stage} ({where}), at position {found.token} of the sample, "
            f"{found.elements} elements, max {found.max_abs:.3e}"
        )
    yield result.verdict


def as_dict(result: Replay) -> dict[str, Any]:
    """The report as JSON."""
    found = result.difference
    return {
        "step": result.step,
        "agrees": result.agrees,
        "verdict": result.verdict,
        "numerics": result.numerics,
        "weight_versions": result.weight_versions,
        "gaps": {name: vars(gap) for name, gap in result.gaps.items()},
        "first_token": None if result.token is None else vars(result.token),
        "first_difference": None if found is None else vars(found) | {"module": found.module},
    }
