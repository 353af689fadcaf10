"""TrainBatch: samples packed into flat numpy arrays, row by row.

Legend: T rows of the whole batch, N sequences, Lm MoE layers, k experts per token. A sample of n tokens gives
n - 1 rows: row t has input token t, target token t + 1, position t and the route that token t took. Whatever
speaks about a response token lives on the row whose target it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain

import numpy as np

from miles.data.sample import Sample, validate_samples
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
    "teacher_log_probs",
    "values",
    "returns",
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
    """float32 [N], shaped where rewards are; NaN where absent."""
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
    teacher_log_probs: np.ndarray | None = None
    """float32 [T], log-probs of the targets under the teacher of a distillation."""
    values: np.ndarray | None = None
    """float32 [T], a critic's value of the state in which the target is chosen, before this rollout's
    updates."""
    returns: np.ndarray | None = None
    """float32 [T], what the critic is taught."""
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
    "teacher_log_probs": np.float32,
    "values": np.float32,
    "returns": np.float32,
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
    validate_samples(samples)
    num_rows = np.array([s.num_rows for s in samples])
    if (num_rows < 1).any():
        where = f"sample {samples[int(num_rows.argmin())].index}"
        raise DataError("a sample of fewer than two tokens has no row to train", where=where)
    cu_seqlens = np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int32)
    starts = cu_seqlens[:-1].astype(np.int64)
    positions = np.arange(cu_seqlens[-1]) - np.repeat(starts, num_rows)
    # Row t has token t and target t + 1: the last token of a sample is no input, the first one no target.
    ids = np.fromiter(chain.from_iterable(s.tokens for s in samples), np.int64, int((num_rows + 1).sum()))
    firsts = starts + np.arange(len(samples))
    responses = _Responses.of(samples, positions, num_rows)
    batch = TrainBatch(
        tokens=np.delete(ids, firsts + num_rows),
        targets=np.delete(ids, firsts),
        positions=positions,
        cu_seqlens=cu_seqlens,
        loss_mask=responses.loss_mask(),
        rollout_log_probs=responses.log_probs(),
        rewards=np.array([_trained_reward(s, reward_key) for s in samples], dtype=np.float32),
        response_lengths=np.array([s.response_length for s in samples], dtype=np.int32),
        sample_index=_ids([s.index for s in samples]),
        group_index=_ids([s.group_index for s in samples]),
        rollout_ids=_ids([s.rollout_id for s in samples]),
        routes=_route_rows(samples),
        teacher_log_probs=responses.teacher_log_probs(),
        weight_versions=responses.weight_versions(),
    )
    batch.validate()
    return batch


@dataclass(frozen=True)
class _Responses:
    """What speaks about response tokens, one sample after another, and the rows whose targets they are."""

    samples: Sequence[Sample]
    rows_T: np.ndarray
    """bool [T]."""

    @classmethod
    def of(cls, samples: Sequence[Sample], positions: np.ndarray, num_rows: np.ndarray) -> _Responses:
        first = np.array([s.prompt_length - 1 for s in samples])
        return cls(samples, positions >= np.repeat(first, num_rows))

    def loss_mask(self) -> np.ndarray:
        if all(s.loss_mask is None and not s.remove_sample for s in self.samples):
            return self.rows_T.astype(np.float32)
        return self._spread([_loss_mask(s) for s in self.samples], np.zeros(len(self.rows_T), np.float32))

    def log_probs(self) -> np.ndarray:
        parts = [
            np.full(s.response_length, np.nan, np.float32)
            if s.rollout_log_probs is None
            else s.rollout_log_probs
            for s in self.samples
        ]
        return self._spread(parts, np.full(len(self.rows_T), np.nan, np.float32))

    def teacher_log_probs(self) -> np.ndarray | None:
        """None where a sample has none."""
        parts = [s.teacher_log_probs for s in self.samples if s.teacher_log_probs is not None]
        if len(parts) < len(self.samples):
            return None
        return self._spread(parts, np.full(len(self.rows_T), np.nan, np.float32))

    def weight_versions(self) -> np.ndarray | None:
        """None when no sample has any."""
        if not any(s.weight_versions for s in self.samples):
            return None
        rows = np.full(len(self.rows_T), -1, np.int64)
        if all(len(s.weight_versions) == 1 for s in self.samples):
            whole = [s.weight_versions[0][0] for s in self.samples]
            return self._spread([np.repeat(whole, [s.response_length for s in self.samples])], rows)
        versions, counts = [], []
        for sample in self.samples:
            spans = sample.weight_versions or [(-1, 0)]
            ends = [*(first for _, first in spans[1:]), sample.response_length]
            versions += [version for version, _ in spans]
            counts += [end - first for end, (_, first) in zip(ends, spans, strict=True)]
        return self._spread([np.repeat(versions, counts)], rows)

    def _spread(self, parts: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
        rows[self.rows_T] = np.concatenate(parts)
        return rows


def _loss_mask(sample: Sample) -> np.ndarray:
    if sample.remove_sample:
        return np.zeros(sample.response_length, np.float32)
    if sample.loss_mask is None:
        return np.ones(sample.response_length, np.float32)
    return np.array(sample.loss_mask, np.float32)


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


def _ids(values: list[int | None]) -> np.ndarray:
    return np.array([-1 if v is None else v for v in values], dtype=np.int64)


def _trained_reward(sample: Sample, reward_key: str | None) -> float:
    value = sample.reward_value(reward_key) if sample.shaped_reward is None else sample.shaped_reward
    return float("nan") if value is None else value
