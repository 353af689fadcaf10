"""Shares are balanced and whole; ranks that cannot meet say so."""

from __future__ import annotations

import socket
import time

import pytest

from miles.errors import RunError
from miles.training.native.process_group import LOOPBACK, connect_store, open_store
from miles.training.native.shares import share_out


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_sequence_is_on_exactly_one_rank(size: int) -> None:
    shares = share_out([7, 1, 1, 9, 3, 3, 3], size)
    assert sorted(index for share in shares for index in share) == list(range(7))
    assert len(shares) == size
    assert all(share == sorted(share) for share in shares)


def test_tokens_are_balanced_not_sequences() -> None:
    assert share_out([9, 1, 3, 2, 3], 2) == [[0], [1, 2, 3, 4]]


def test_there_may_be_more_ranks_than_sequences() -> None:
    assert share_out([5, 4], 3) == [[0], [1], []]


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(RunError, match="cannot listen"):
            open_store(port=taken.getsockname()[1])


def test_a_first_rank_that_never_comes_is_not_waited_for_long() -> None:
    with socket.socket() as nobody:
        nobody.bind((LOOPBACK, 0))
        started = time.monotonic()
        with pytest.raises(RunError, match="no store of rank 0"):
            connect_store(LOOPBACK, nobody.getsockname()[1], timeout_s=1)
        assert time.monotonic() - started < 200
