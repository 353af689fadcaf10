"""TrainBatch: samples packed into flat numpy arrays, row by row.

Legend: T rows of the whole batch, N sequences, Lm MoE layers, k experts per token. A sample of n tokens gives
n - 1 rows: row t has input token t, target token t + 1, position t and the route that token t took. Whatever
speaks about a response token lives on the row whose target it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from miles.data.sample import Sample
from miles.errors import DataError

ROW_FIELDS = (
    "tokens",
    "targets",
    "positions",
    "loss_mask",
    "rollout_log_probs",
    "routes",
    "advantages",
    "old_log_probs",
    "ref_log_probs",
    "weight_versions",
)
SEQUENCE_FIELDS = ("rewards", "response_lengths", "sample_index", "group_index", "rollout_ids")


@dataclass(frozen=True)
class TrainBatch:
    """Packed sequences. Optional row arrays are None until they are computed (`dataclasses.replace`)."""

    tokens: np.ndarray
    """int64 [T], inputs."""
    targets: np.ndarray
    """int64 [T], the token after each input."""
    positions: np.ndarray
    """int64 [T], counted from 0 in each sequence."""
    cu_seqlens: np.ndarray
    """int32 [N + 1], row offsets of the sequences."""
    loss_mask: np.ndarray
    """float32 [T], 1 where the target is a response token that is trained on."""
    rollout_log_probs: np.ndarray
    """float32 [T], the engine's log-prob of the target; NaN where absent."""
    rewards: np.ndarray
    """float32 [N]; NaN where absent."""
    response_lengths: np.ndarray
    """int32 [N], response tokens, masked ones included."""
    sample_index: np.ndarray
    """int64 [N]; -1 where absent."""
    group_index: np.ndarray
    """int64 [N]; -1 where absent."""
    rollout_ids: np.ndarray
    """int64 [N], siblings of one execution share it; -1 where absent."""
    routes: np.ndarray | None = None
    """int16 [T, Lm, k], the experts each input token was sent to; -1 where not recorded."""
    advantages: np.ndarray | None = None
    """float32 [T]."""
    old_log_probs: np.ndarray | None = None
    """float32 [T], log-probs of the targets under the policy before this optimizer step."""
    ref_log_probs: np.ndarray | None = None
    """float32 [T], log-probs of the targets under the reference model."""
    weight_versions: np.ndarray | None = None
    """int64 [T], version of the weights that sampled the target; -1 where not recorded."""

    @property
    def num_tokens(self) -> int:
        """Rows T."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each sequence, int32 [N]."""
        return np.diff(self.cu_seqlens)

    @property
    def sequence_ids(self) -> np.ndarray:
        """The sequence each row belongs to, int64 [T]."""
        return np.repeat(np.arange(self.num_sequences, dtype=np.int64), self.lengths)

    @cached_property
    def newest_rollout_log_probs(self) -> np.ndarray:
        """`rollout_log_probs` without those of older weights than the newest in the batch (NaN there): what
        can be compared with the trainer's log-probs under the same weights.
        """
        if self.weight_versions is None:
            return self.rollout_log_probs
        old = self.weight_versions < self.weight_versions.max()
        return np.where(old & (self.weight_versions >= 0), np.float32(np.nan), self.rollout_log_probs)

    def select(self, indices: Sequence[int]) -> TrainBatch:
        """The sequences `indices`, in that order, as a batch of their own."""
        assert len(indices) > 0, "an empty micro-batch"
        order = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[order]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        # Row r of the result is row r - (its new offset) + (its old offset) of this batch.
        rows = np.arange(cu_seqlens[-1]) + np.repeat(self.cu_seqlens[order] - cu_seqlens[:-1], lengths)
        picked: dict[str, np.ndarray | None] = {"cu_seqlens": cu_seqlens}
        for name in ROW_FIELDS:
            array = getattr(self, name)
            picked[name] = None if array is None else array[rows]
        for name in SEQUENCE_FIELDS:
            picked[name] = getattr(self, name)[order]
        return TrainBatch(**picked)  # type: ignore[arg-type]

    def with_rows(self, **arrays: np.ndarray) -> TrainBatch:
        """A copy that also carries the given row arrays, such as advantages or ref_log_probs; validated."""
        assert set(arrays) <= set(ROW_FIELDS), f"not row arrays: {set(arrays) - set(ROW_FIELDS)}"
        batch = replace(self, **arrays)
        batch.validate()
        return batch

    def validate(self) -> None:
        """Assert shapes, dtypes and the row alignment; a broken batch is a bug, not a user's mistake."""
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array is None:
                continue
            assert array.dtype == dtype, f"{name} is {array.dtype}, not {np.dtype(dtype)}"
            expected = {"cu_seqlens": len(self.cu_seqlens)}.get(
                name, self.num_tokens if name in ROW_FIELDS else self.num_sequences
            )
            assert len(array) == expected, f"{name} has {len(array)} entries, not {expected}"
        assert self.cu_seqlens[0] == 0 and self.cu_seqlens[-1] == self.num_tokens, (
            "cu_seqlens must span all rows"
        )
        assert (self.lengths > 0).all(), "a sequence without rows"
        assert self.routes is None or self.routes.ndim == 3, "routes are [T, Lm, k]"
        starts = np.repeat(self.cu_seqlens[:-1].astype(np.int64), self.lengths)
        assert (self.positions == np.arange(self.num_tokens) - starts).all(), "positions must count from 0"
        inside = self.positions[1:] > 0
        assert (self.tokens[1:][inside] == self.targets[:-1][inside]).all(), "targets must be the next inputs"


_DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int64,
    "targets": np.int64,
    "positions": np.int64,
    "cu_seqlens": np.int32,
    "loss_mask": np.float32,
    "rollout_log_probs": np.float32,
    "routes": np.int16,
    "advantages": np.float32,
    "old_log_probs": np.float32,
    "ref_log_probs": np.float32,
    "weight_versions": np.int64,
    "rewards": np.float32,
    "response_lengths": np.int32,
    "sample_index": np.int64,
    "group_index": np.int64,
    "rollout_ids": np.int64,
}
assert set(_DTYPES) == {f.name for f in fields(TrainBatch)}


def pack(samples: Sequence[Sample], reward_key: str | None = None) -> TrainBatch:
    """Pack samples, in order, into one TrainBatch.

    Samples without routes in a batch where others have them get rows of -1 (not recorded). `reward_key`
    selects from dict rewards. Raises DataError for a sample that breaks an invariant, has fewer than two
    tokens, or whose routes differ in layers or top-k.
    """
    if not samples:
        raise DataError("no samples to pack", fix="look at the filter and drop counts of this step")
    for sample in samples:
        sample.validate()
        if sample.num_rows < 1:
            raise DataError(
                "a sample of fewer than two tokens has no row to train", where=f"sample {sample.index}"
            )
    lengths = np.array([s.num_rows for s in samples])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = [np.asarray(s.tokens, dtype=np.int64) for s in samples]
    batch = TrainBatch(
        tokens=np.concatenate([t[:-1] for t in tokens]),
        targets=np.concatenate([t[1:] for t in tokens]),
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        cu_seqlens=cu_seqlens,
        loss_mask=np.concatenate([_loss_mask_rows(s) for s in samples]),
        rollout_log_probs=np.concatenate([_log_prob_rows(s) for s in samples]),
        rewards=np.array([_or_nan(s.reward_value(reward_key)) for s in samples], dtype=np.float32),
        response_lengths=np.array([s.response_length for s in samples], dtype=np.int32),
        sample_index=_ids([s.index for s in samples]),
        group_index=_ids([s.group_index for s in samples]),
        rollout_ids=_ids([s.rollout_id for s in samples]),
        routes=_route_rows(samples),
        weight_versions=_version_rows(samples),
    )
    batch.validate()
    return batch


def response_rows(sample: Sample) -> slice:
    """The rows of a sample whose targets are its response tokens."""
    return slice(sample.prompt_length - 1, sample.num_rows)


def _loss_mask_rows(sample: Sample) -> np.ndarray:
    rows = np.zeros(sample.num_rows, dtype=np.float32)
    if sample.response_length and not sample.remove_sample:
        rows[response_rows(sample)] = 1.0 if sample.loss_mask is None else sample.loss_mask
    return rows


def _log_prob_rows(sample: Sample) -> np.ndarray:
    rows = np.full(sample.num_rows, np.nan, dtype=np.float32)
    if sample.response_length and sample.rollout_log_probs is not None:
        rows[response_rows(sample)] = sample.rollout_log_probs
    return rows


def _route_rows(samples: Sequence[Sample]) -> np.ndarray | None:
    shapes = {s.rollout_routed_experts.shape[1:] for s in samples if s.rollout_routed_experts is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise DataError(
            f"samples of one batch carry routes of different shapes: {sorted(shapes)}",
            why="routes are [rows, MoE layers, top-k] of one model",
        )
    (shape,) = shapes
    return np.concatenate(
        [
            np.full((s.num_rows, *shape), -1, dtype=np.int16)
            if s.rollout_routed_experts is None
            else s.rollout_routed_experts
            for s in samples
        ]
    )


def _version_rows(samples: Sequence[Sample]) -> np.ndarray | None:
    if not any(sample.weight_versions for sample in samples):
        return None
    return np.concatenate([_versions_of(sample) for sample in samples])


def _versions_of(sample: Sample) -> np.ndarray:
    rows = np.full(sample.num_rows, -1, dtype=np.int64)
    response = rows[response_rows(sample)] if sample.response_length else rows[:0]
    for version, first in sample.weight_versions:
        response[first:] = version
    return rows


def _ids(values: list[int | None]) -> np.ndarray:
    return np.array([-1 if v is None else v for v in values], dtype=np.int64)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
