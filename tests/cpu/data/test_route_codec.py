"""Routes on disk and wire: one byte per id where the experts fit, and back without a difference."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data import route_codec


def routes(highest: int, gaps: bool) -> np.ndarray:
    ids = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    if gaps:
        ids[0] = -1
    ids[3, 2, 1] = highest
    return ids


@pytest.mark.parametrize(
    ("highest", "gaps", "kind"),
    [
        (255, False, "uint8"),
        (256, False, "int16"),
        (127, True, "int8"),
        (128, True, "int16"),
    ],
)
def test_every_form_gives_the_routes_back(highest: int, gaps: bool, kind: str) -> None:
    original = routes(highest, gaps)
    stored = route_codec.compact(original)
    assert stored.dtype == kind
    for back in (route_codec.expand(stored), route_codec.from_json(route_codec.to_json(original))):
        assert back.dtype == np.int16
        np.testing.assert_array_equal(back, original)


def test_a_sample_record_is_half_as_large() -> None:
    small, large = (len(str(route_codec.to_json(routes(highest, False)))) for highest in (200, 300))
    assert small < 0.7 * large


def test_rows_without_any_route_survive() -> None:
    for original in (np.full((3, 2, 2), -1, np.int16), np.zeros((0, 2, 2), np.int16)):
        np.testing.assert_array_equal(route_codec.from_json(route_codec.to_json(original)), original)
