"""A network of its own for a test: what listens there on every interface is reached by nobody else."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network namespace with loopback alone; skips where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        try:
            yield
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0, "back in the network of the other tests"
    finally:
        os.close(before)
