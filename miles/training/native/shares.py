"""Which rank trains on which sequences: every sequence on exactly one, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `lengths` in `size` shares of nearly equal totals; a share may be empty.

    The longest sequence goes first, each to the share with the fewest tokens so far (R. L. Graham, "Bounds
    on multiprocessing timing anomalies", 1969): no share exceeds 4/3 of the best possible largest one.
    Indices ascend inside a share.
    """
    if size == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(size)]
    totals = [0] * size
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(size), key=totals.__getitem__)
        shares[lightest].append(index)
        totals[lightest] += lengths[index]
    return [sorted(share) for share in shares]
