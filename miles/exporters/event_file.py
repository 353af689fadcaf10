"""TensorBoard's event file: framed records of protobuf messages, written without protobuf or TensorBoard.

Framing is TFRecord's (https://www.tensorflow.org/tutorials/load_data/tfrecord): length as uint64, masked CRC
of those 8 bytes, payload, masked CRC of the payload. Field numbers are those of event.proto and summary.proto
in tensorboard/compat/proto.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EVENT_TIME, _EVENT_STEP, _EVENT_FILE_VERSION, _EVENT_SUMMARY, _EVENT_SESSION_LOG = 1, 2, 3, 5, 7
_SUMMARY_VALUE, _VALUE_TAG, _VALUE_SIMPLE = 1, 1, 2
_SESSION_STATUS, _SESSION_START = 1, 1
FILE_VERSION = b"brain.Event:2"


class EventFile:
    """Appends events to one file. Values are float32 there: larger numbers show as infinite."""

    def __init__(self, path: Path, time: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._write(_double(_EVENT_TIME, time) + _bytes(_EVENT_FILE_VERSION, FILE_VERSION))

    def scalars(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Write the scalars of one step as one event."""
        summary = b"".join(_bytes(_SUMMARY_VALUE, _scalar(tag, value)) for tag, value in values.items())
        self._write(_head(step, time) + _bytes(_EVENT_SUMMARY, summary))

    def session_start(self, step: int, time: float) -> None:
        """Say that the run starts again at `step`: TensorBoard then forgets what it has from there on."""
        session = _integer(_SESSION_STATUS, _SESSION_START)
        self._write(_head(step, time) + _bytes(_EVENT_SESSION_LOG, session))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        self._file.write(length + _checksum(length) + payload + _checksum(payload))


def _head(step: int, time: float) -> bytes:
    return _double(_EVENT_TIME, time) + _integer(_EVENT_STEP, step)


def _scalar(tag: str, value: float) -> bytes:
    return _bytes(_VALUE_TAG, tag.encode()) + _key(_VALUE_SIMPLE, _FIXED32) + _float32(value)


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # finite, but beyond float32
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _double(number: int, value: float) -> bytes:
    return _key(number, _FIXED64) + struct.pack("<d", value)


def _integer(number: int, value: int) -> bytes:
    """An int64 field; a negative number is its two's complement in 64 bits."""
    return _key(number, _VARINT) + _varint(value % (1 << 64))


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        entries.append(byte)
    return tuple(entries)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3720 appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)
