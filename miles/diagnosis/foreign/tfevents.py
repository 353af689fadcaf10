"""Scalars of a TensorBoard event file, without TensorFlow.

A file is a sequence of TFRecords: length (uint64), masked CRC-32C of the length, payload, masked CRC-32C of
the payload, little-endian. A payload is a protobuf `Event` (tensorflow/core/util/event.proto): wall_time = 1,
step = 2, summary = 5; a `Summary.Value` has tag = 1, simple_value = 2, tensor = 8. Reading stops at the first
record that is torn or damaged: what follows cannot be found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SCALAR_BYTES = 1 << 16
"""Records beyond this hold images, audio or histograms; they are skipped without a checksum."""
_FLOAT, _DOUBLE, _HALF = 1, 2, 19
_UNPACK_FLOAT, _UNPACK_DOUBLE, _UNPACK_LENGTH = struct.Struct("<f"), struct.Struct("<d"), struct.Struct("<Q")
_UNPACK_CRC = struct.Struct("<I")


class Scalar(NamedTuple):
    """One point of one tag; `time` is in seconds since the epoch."""

    time: float
    step: int
    tag: str
    value: float


class Truncated(ValueError):
    """A protobuf message ends inside a field."""


def read_scalars(path: Path) -> Iterator[Scalar]:
    """Every scalar of the file in the order written. Raises OSError."""
    for payload in read_records(path):
        try:
            yield from event_scalars(payload)
        except Truncated:
            return


def read_records(path: Path) -> Iterator[bytes]:
    """Payloads up to the first torn or damaged record; long ones are left out."""
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = _UNPACK_LENGTH.unpack_from(head)
            if masked_crc(head[:8]) != _UNPACK_CRC.unpack_from(head, 8)[0]:
                return
            payload, tail = file.read(length), file.read(4)
            if len(payload) < length or len(tail) < 4:
                return
            if length > SCALAR_BYTES:
                continue
            if masked_crc(payload) != _UNPACK_CRC.unpack(tail)[0]:
                return
            yield payload


def event_scalars(payload: bytes) -> Iterator[Scalar]:
    """Scalars of one Event message."""
    time, step, summaries = 0.0, 0, []
    for number, value in fields(payload):
        if number == 1 and isinstance(value, bytes):
            (time,) = _UNPACK_DOUBLE.unpack(value)
        elif number == 2 and isinstance(value, int):
            step = value
        elif number == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for number, value in fields(summary):
            if number == 1 and isinstance(value, bytes):
                scalar = _scalar(value, time, step)
                if scalar is not None:
                    yield scalar


def _scalar(message: bytes, time: float, step: int) -> Scalar | None:
    tag, number_value = "", None
    for number, value in fields(message):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            tag = value.decode("utf-8", "replace")
        elif number == 2:
            (number_value,) = _UNPACK_FLOAT.unpack(value)
        elif number == 8:
            number_value = _tensor(value)
    return None if number_value is None else Scalar(time, step, tag, number_value)


def _tensor(message: bytes) -> float | None:
    """The value of a TensorProto that holds exactly one float or double; None for any other."""
    kind, content = 0, b""
    for number, value in fields(message):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number in (4, 5, 6) and isinstance(value, bytes):
            content = value
    layout = {_FLOAT: "<f", _DOUBLE: "<d", _HALF: "<e"}.get(kind)
    if layout is None or len(content) != struct.calcsize(layout):
        return None
    return float(struct.unpack(layout, content)[0])


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-size values come as their bytes."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value - (1 << 64) if value >= 1 << 63 else value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise Truncated(f"wire type {kind}")
        if at + size > end:
            raise Truncated
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise Truncated
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and offset as in tensorflow/core/lib/hash/crc32c.h."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
