"""Which sequences share a micro-batch: every sequence in exactly one, deterministically."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack sequences into micro-batches of at most `max_tokens` rows, first fit decreasing.

    A sequence longer than the budget gets a micro-batch of its own. Indices ascend inside a micro-batch and
    micro-batches are ordered by their first index, so equal lengths give equal batches on every machine.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in longest_first:
        target = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if target is None:
            bins.append([i])
            room.append(max_tokens - lengths[i])
        else:
            bins[target].append(i)
            room[target] -= lengths[i]
    return sorted(sorted(indices) for indices in bins)


def group_micro_batches(
    lengths: Sequence[int], prompt_lengths: Sequence[int], groups: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """`micro_batches` where the prompt of a group counts once per micro-batch: a group stays together if it
    fits, else it is cut into parts that do.

    Args:
        lengths: rows of each sequence, its prompt included. prompt_lengths: rows of it that its group shares.
        groups: sequences of equal number share a prompt.
    """
    parts: list[list[int]] = []
    rows: list[int] = []
    open_part: dict[int, int] = {}
    for i, group in enumerate(groups):
        own, part = lengths[i] - prompt_lengths[i], open_part.get(group)
        if part is not None and rows[part] + own <= max_tokens:
            parts[part].append(i)
            rows[part] += own
        else:
            open_part[group] = len(parts)
            parts.append([i])
            rows.append(lengths[i])
    bins = micro_batches(rows, max_tokens)
    return sorted(sorted(i for part in found for i in parts[part]) for found in bins)


def fixed_micro_batches(num_sequences: int, micro_batch_size: int) -> list[list[int]]:
    """Consecutive micro-batches of `micro_batch_size` sequences; the last one may be smaller."""
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be positive, got {micro_batch_size}")
    starts = range(0, num_sequences, micro_batch_size)
    return [list(range(s, min(s + micro_batch_size, num_sequences))) for s in starts]
