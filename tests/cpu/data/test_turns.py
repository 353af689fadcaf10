"""Samples that grow by turns: what was sampled, what a tool said, and one record of several readings."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.batch import pack
from miles.data.sample import Sample, SampleStatus
from miles.data.turns import (
    Reading,
    continued,
    last_turn,
    tool_outputs,
    with_tool_output,
    without_loss_so_far,
)
from miles.errors import DataError

PROMPT = [10, 11, 12]


def pending() -> Sample:
    return Sample(prompt="p", tokens=list(PROMPT), group_index=0, index=0)


def reading(sample: Sample, ids: list[int], mark: int, version: int = 0) -> Reading:
    """What an engine reports whose every route of this reading is `mark`."""
    rows = len(sample.tokens) + len(ids) - 1
    return Reading(
        token_ids=ids,
        log_probs=np.full(len(ids), -0.1 * (mark + 1), dtype=np.float32),
        routes=np.full((rows, 2, 2), mark, dtype=np.int16),
        weight_versions=[(version, 0)] if ids else [],
    )


def grow(sample: Sample, ids: list[int], mark: int, version: int = 0) -> Sample:
    grown = continued(sample, reading(sample, ids, mark, version))
    grown.status = SampleStatus.ABORTED
    grown.validate()
    return grown


def marks(sample: Sample) -> list[int]:
    assert sample.rollout_routed_experts is not None
    return sample.rollout_routed_experts[:, 0, 0].tolist()


def test_a_first_reading_gives_the_sample_all_that_was_recorded() -> None:
    sample = grow(pending(), [1, 2], mark=0)
    assert sample.tokens == [*PROMPT, 1, 2] and sample.response_length == 2
    assert sample.loss_mask is None and marks(sample) == [0, 0, 0, 0]


def test_a_continued_response_keeps_the_routes_that_its_log_probs_were_computed_with() -> None:
    sample = grow(grow(pending(), [1, 2], mark=0, version=4), [3], mark=1, version=5)
    # Row 4, the token that the first reading sampled last, was first read by the second one.
    assert marks(sample) == [0, 0, 0, 0, 1]
    np.testing.assert_allclose(sample.rollout_log_probs, [-0.1, -0.1, -0.2])
    assert sample.weight_versions == [(4, 0), (5, 2)]


def test_readings_under_one_version_are_one_span() -> None:
    sample = grow(grow(pending(), [1, 2], mark=0, version=4), [3], mark=1, version=4)
    assert sample.weight_versions == [(4, 0)]


def test_tool_output_is_context_without_loss_and_gets_the_routes_of_the_next_reading() -> None:
    first = grow(pending(), [1, 2], mark=0)
    told = with_tool_output(first, [7, 8])
    assert marks(told) == [0, 0, 0, 0, -1, -1], "the last sampled token was never an input either"
    told.validate()
    sample = grow(told, [3, 4], mark=1)
    assert marks(sample) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sample.loss_mask == [1, 1, 0, 0, 1, 1]
    assert sample.rollout_log_probs is not None
    assert np.isnan(sample.rollout_log_probs).tolist() == [False, False, True, True, False, False]
    assert tool_outputs(sample) == 1 and last_turn(sample) == [3, 4]


def test_rows_of_the_batch_follow_the_merged_record() -> None:
    sample = grow(with_tool_output(grow(pending(), [1, 2], 0, version=1), [7, 8]), [3, 4], 1, version=2)
    batch = pack([sample])
    assert batch.loss_mask.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert batch.routes is not None and batch.routes[:, 0, 0].tolist() == marks(sample)
    assert batch.weight_versions is not None
    assert batch.weight_versions.tolist() == [-1, -1, 1, 1, 1, 1, 2, 2]
    comparable = ~np.isnan(batch.newest_rollout_log_probs)
    assert comparable.tolist() == [False] * 6 + [True, True], "older weights are not compared with the newest"


def test_tool_output_before_anything_was_sampled_counts_to_the_first_version() -> None:
    sample = grow(with_tool_output(pending(), [7]), [1], mark=0, version=3)
    assert sample.weight_versions == [(3, 0)] and sample.loss_mask == [0, 1]
    assert tool_outputs(sample) == 1


def test_a_reading_without_routes_leaves_a_gap_and_the_next_one_fills_it() -> None:
    first = grow(pending(), [1, 2], mark=0)
    lost = Reading(token_ids=[3], log_probs=np.float32([-1]), routes=None, weight_versions=[(0, 0)])
    gap = continued(first, lost)
    assert marks(gap) == [0, 0, 0, 0, -1]
    assert marks(grow(gap, [4], mark=2)) == [0, 0, 0, 0, 2, 2]


def test_an_aborted_reading_without_tokens_changes_nothing() -> None:
    first = grow(pending(), [1, 2], mark=0)
    nothing = Reading(token_ids=[], log_probs=np.zeros(0, np.float32), routes=None, weight_versions=[])
    same = continued(first, nothing)
    assert (same.tokens, same.weight_versions, marks(same)) == (first.tokens, [(0, 0)], marks(first))


def test_what_older_weights_sampled_can_be_taken_out_of_the_loss() -> None:
    sample = grow(without_loss_so_far(grow(pending(), [1, 2], mark=0)), [3], mark=1)
    assert sample.loss_mask == [0, 0, 1] and sample.trained_tokens == 1


@pytest.mark.parametrize(
    ("shape", "message"), [((5, 2, 2), "for 7 tokens"), ((6, 3, 2), r"\(3, 2\) continue")]
)
def test_routes_of_other_rows_or_another_model_are_refused(shape, message) -> None:
    first = grow(pending(), [1, 2], mark=0)
    wrong = Reading(
        token_ids=[3, 4],
        log_probs=np.float32([-1, -1]),
        routes=np.zeros(shape, np.int16),
        weight_versions=[(0, 0)],
    )
    with pytest.raises(DataError, match=message):
        continued(first, wrong)


def test_tokens_that_are_only_context_any_more_take_the_routes_of_the_latest_reading() -> None:
    """What follows was sampled on a cache that those routes made."""
    older = without_loss_so_far(grow(pending(), [1, 2], mark=0, version=4))
    assert marks(grow(older, [3], mark=1, version=5)) == [1, 1, 1, 1, 1]
    unrecorded = Reading(
        token_ids=[3], log_probs=np.zeros(1, np.float32), routes=None, weight_versions=[(5, 0)]
    )
    assert marks(continued(older, unrecorded)) == [0, 0, 0, 0, -1]
