"""Joining and leaving the process group of the ranks that train one model.

>>> store = open_store()                                  # rank 0; tell the others store.port
>>> parallel = join(store, rank=0, size=2)                # every rank, each with a store of its own
>>> trainer = NativeTrainer(spec, settings, parallel=parallel)
>>> parallel.leave()

Rank 0's store carries the addresses of the ranks. It listens where rank 0 is told to, on loopback unless
the ranks are on several machines.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from miles import environment
from miles.data.batch import TrainBatch
from miles.errors import RunError
from miles.training.native.ranks import input_digest
from miles.training.native.state import TrainerState

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 60.0
COLLECTIVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class DataParallel:
    """This process's place among `size` ranks. Implements `training.native.ranks.Ranks`."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.TCPStore
    """Kept alive as long as the group: rank 0's serves the others."""

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        counts = self._gather_equal(torch.tensor([values.numel()], device=self.device)).tolist()
        padded = values.new_zeros(max(counts), device=self.device)
        padded[: values.numel()] = values.detach()
        parts = self._gather_equal(padded).view(self.size, -1)
        kept = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(kept).to(values.device)

    def require_same_input(self, batch: TrainBatch, state: TrainerState) -> None:
        own = torch.tensor([input_digest(batch, state)], dtype=torch.int64, device=self.device)
        digests = self._gather_equal(own).tolist()
        if len(set(digests)) > 1:
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RunError(
                f"ranks {odd} were given another batch, step or other knobs than rank 0",
                why="data-parallel ranks take their share from the same whole rollout batch",
                fix="call every rank with the same arguments, in the same order",
            )

    def leave(self) -> None:
        """Leave the group. Also right when another rank is gone: nothing is exchanged."""
        dist.destroy_process_group()

    def _gather_equal(self, values: Tensor) -> Tensor:
        gathered = values.new_empty(self.size * values.numel())
        dist.all_gather_into_tensor(gathered, values)
        return gathered


def open_store(host: str = LOOPBACK, port: int = 0, timeout_s: float = JOIN_TIMEOUT_S) -> dist.TCPStore:
    """Rank 0's store, listening on `host` alone; port 0 takes a free one (`store.port`).

    Raises RunError when the address cannot be bound.
    """
    listener = socket.socket()
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RunError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            why="the trainer's ranks meet there",
            fix="name a free port, or 0",
        ) from error
    listener.listen()
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect_store(host: str, port: int, timeout_s: float = JOIN_TIMEOUT_S) -> dist.TCPStore:
    """The store of another rank. Raises RunError when rank 0 does not answer in time."""
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        raise _nobody_there(f"no store of rank 0 at {host}:{port}", timeout_s) from error


def join(
    store: dist.TCPStore,
    rank: int,
    size: int,
    device: torch.device | str = "cpu",
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
    backend: str | None = None,
) -> DataParallel:
    """Become rank `rank` of `size`; returns when all have come.

    Args:
        device: this rank's device; its kind chooses the backend (NCCL for CUDA, gloo otherwise).
        timeout_s: a collective that takes longer is an error on every rank.

    Raises RunError when a rank does not come in time.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if store.host == LOOPBACK:
        on_loopback()
    bound: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    try:
        dist.init_process_group(
            backend or ("nccl" if device.type == "cuda" else "gloo"),
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            **bound,
        )
    except dist.DistError as error:
        raise _nobody_there(f"rank {rank} of {size} waited in vain for the other ranks", timeout_s) from error
    return DataParallel(rank, size, device, init_device_mesh(device.type, (size,)), store)


def _nobody_there(what: str, timeout_s: float) -> RunError:
    return RunError(
        what, why=f"no answer within {timeout_s:g} s", fix="look at the log of the rank that is missing"
    )


def on_loopback() -> None:
    """Let gloo talk over loopback, unless the user has named an interface."""
    environment.export_default("GLOO_SOCKET_IFNAME", _loopback_interface())


def off_loopback() -> None:
    """Let gloo talk to other machines again, after `on_loopback`."""
    if environment.get("GLOO_SOCKET_IFNAME") == _loopback_interface():
        environment.take_back("GLOO_SOCKET_IFNAME")


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
