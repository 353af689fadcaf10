"""How a sample grows: sampled tokens, tool output, and several readings of one prefix merged into one record.

Every reading of an engine covers all tokens before its last one, so a continued sample gets routes for rows
that it already has. A row keeps the first route that was recorded for it: where its target was sampled, that
is the route the target's log-prob was computed with. A newer reading fills the rows that have none, such as
those of tool output.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from miles.data.sample import Sample, SampleStatus
from miles.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an engine made of a sample's tokens so far.

    Attributes:
        token_ids: sampled after them; may be empty when the request was aborted.
        log_probs: float32 [len(token_ids)].
        routes: int16 [all tokens - 1, MoE layers, top-k], rows of the sample's tokens included; None when
            not recorded.
        weight_versions: spans (version, first token) over `token_ids`.
    """

    token_ids: Sequence[int]
    log_probs: np.ndarray
    routes: np.ndarray | None
    weight_versions: Sequence[tuple[int, int]]


def continued(sample: Sample, reading: Reading) -> Sample:
    """A copy of the sample with the sampled tokens behind it; response text and status are left to the
    caller.

    Raises DataError when the routes do not have one row per token but the last, or those of another model.
    """
    added, so_far = len(reading.token_ids), sample.response_length
    grown = copy(sample)
    grown.tokens = [*sample.tokens, *reading.token_ids]
    grown.response_length = so_far + added
    if sample.loss_mask is not None:
        grown.loss_mask = [*sample.loss_mask, *[1] * added]
    grown.rollout_log_probs = (
        np.concatenate([_log_probs(sample), reading.log_probs]) if so_far else reading.log_probs
    )
    grown.rollout_routed_experts = _merged_routes(sample, reading.routes, len(grown.tokens) - 1)
    grown.weight_versions = _merged_spans(sample, reading.weight_versions)
    return grown


def with_tool_output(sample: Sample, token_ids: Sequence[int]) -> Sample:
    """A copy with tokens that the policy did not sample: no loss, no log-prob, no routes yet."""
    added = len(token_ids)
    mask = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
    routes = sample.rollout_routed_experts
    if routes is not None:
        routes = np.concatenate([routes, np.full((added, *routes.shape[1:]), -1, dtype=np.int16)])
    unsampled = np.full(added, np.nan, dtype=np.float32)
    return replace(
        sample,
        tokens=[*sample.tokens, *token_ids],
        response_length=sample.response_length + added,
        loss_mask=[*mask, *[0] * added],
        rollout_log_probs=np.concatenate([_log_probs(sample), unsampled]),
        rollout_routed_experts=routes,
    )


def without_loss_so_far(sample: Sample) -> Sample:
    """A copy whose response tokens, of older weights, stay context and are not trained on."""
    return replace(sample, loss_mask=[0] * sample.response_length)


def tool_outputs(sample: Sample) -> int:
    """How many times tool output follows sampled tokens."""
    return int((np.diff(_unsampled(sample).astype(np.int8), prepend=0) == 1).sum())


def last_turn(sample: Sample) -> list[int]:
    """The ids sampled since the last tool output."""
    unsampled = np.flatnonzero(_unsampled(sample))
    first = int(unsampled[-1]) + 1 if len(unsampled) else 0
    return sample.tokens[sample.prompt_length + first :]


def spoken(sample: Sample, ids: list[int]) -> list[int]:
    """What the last ids of the sample say: a stop token that ended it says nothing itself, the tokens of a
    stop string do."""
    by_token = sample.status is SampleStatus.COMPLETED and sample.stop_string is None
    return ids[:-1] if by_token else ids


def _log_probs(sample: Sample) -> np.ndarray:
    """float32 [response_length]; NaN where nothing was recorded."""
    if sample.rollout_log_probs is not None:
        return sample.rollout_log_probs
    return np.full(sample.response_length, np.nan, dtype=np.float32)


def _unsampled(sample: Sample) -> np.ndarray:
    return np.isnan(_log_probs(sample))


def _merged_routes(sample: Sample, newer: np.ndarray | None, num_rows: int) -> np.ndarray | None:
    """A row keeps the route under which its log-prob was taken. Rows that are only context any more
    (`without_loss_so_far`) take the route on which what follows was sampled: that of the latest reading.
    """
    older = sample.rollout_routed_experts
    if newer is not None and (newer.ndim != 3 or len(newer) != num_rows):
        raise DataError(
            f"routes of shape {newer.shape} for {num_rows + 1} tokens",
            where=f"sample {sample.index} (group {sample.group_index})",
            why="an engine reports one row per token but the last, prompt included",
        )
    if older is None:
        return newer
    merged = np.full((num_rows, *older.shape[1:]), -1, dtype=np.int16) if newer is None else newer.copy()
    if merged.shape[1:] != older.shape[1:]:
        raise DataError(
            f"routes of shape {merged.shape[1:]} continue routes of shape {older.shape[1:]}",
            where=f"sample {sample.index} (group {sample.group_index})",
            why="routes are [rows, MoE layers, top-k] of one model",
        )
    context = bool(sample.loss_mask) and not any(sample.loss_mask or ())
    latest = merged[: len(older)]
    kept = latest[:, :1, :1] < 0 if context else older[:, :1, :1] >= 0
    merged[: len(older)] = np.where(kept, older, latest)
    return merged


def _merged_spans(sample: Sample, newer: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans over the whole response. Tool output before the first sampled token counts to its version."""
    if not sample.weight_versions and len(newer) == 1:
        return [(newer[0][0], 0)]
    spans = list(sample.weight_versions)
    for version, start in newer:
        if not spans:
            spans.append((version, 0))
        elif spans[-1][0] != version:
            spans.append((version, sample.response_length + start))
    return spans
