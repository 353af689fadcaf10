"""The control endpoints of one server: pause, abort, weights, memory, cache, checksum, metrics.

Written against SGLang 0.5.7 to 0.5.23. What changed in between is handled here and nowhere else: an update of
weights is wrapped in a session from 0.5.22 on, and pausing had no mode before 0.5.6.

A server repacks INT4 weights for its kernel (Marlin) once they are loaded; new ones only fit what they were
published in. Sessions put that back and repack at their end. Older servers that were patched for training do
both by `/post_process_weights`; those as released load them once, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from miles.errors import RunError
from miles.http_client import ConnectionLost, HttpClient, Response
from miles.rollout.sglang.contract import read_version
from miles.rollout.sglang.weight_payload import Announced, Meeting, buckets, encode

PauseMode = Literal["abort", "retract", "in_place"]
MemoryTag = Literal["kv_cache", "weights", "cuda_graph"]

CONTROL_S = 120.0
"""Seconds for an answer of a control endpoint; a server that is busy decoding answers between two steps."""
UPDATE_S = 1800.0
"""Seconds for one bucket of weights, or for a checkpoint on disk."""
MISSING = 404
RESTORE = {"restore_weights_before_load": True, "post_process_quantization": False}
REPACK = {"restore_weights_before_load": False, "post_process_quantization": True}
"""What servers that were patched for training before 0.5.22 are told around an update."""


class UpdateFailed(RunError):
    """New weights did not arrive whole: the server must not serve until it has weights of one version."""


class Control:
    """Control endpoints over one client. Every method may raise ConnectionLost.

    repacks: whether the server holds weights in another form than they are published in.
    """

    def __init__(self, http: HttpClient, tensor_parallel_size: int = 1, repacks: bool = False) -> None:
        self._http = http
        self._tensor_parallel_size, self._repacks = tensor_parallel_size, repacks

    async def pause(self, mode: PauseMode) -> None:
        """Stop decoding: running requests end ("abort"), go back to the queue, or stay as they are."""
        await self._command("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._command("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forget every cached prefix; refused while requests run."""
        await self._command("/flush_cache", {})

    async def abort(self, rid: str) -> None:
        """End the request of this name with what it has; none of that name: nothing happens."""
        await self._command("/abort_request", {"rid": rid})

    async def model_info(self) -> dict[str, Any]:
        """Checkpoint, architecture and weight version."""
        return await self._read("/model_info", "/get_model_info")

    async def server_info(self) -> dict[str, Any]:
        """Every server argument, the SGLang version, and gauges of each scheduler."""
        return await self._read("/server_info", "/get_server_info")

    async def weight_version(self) -> int | None:
        """The version that was handed over last; None for weights that the server began with."""
        return read_version((await self.model_info()).get("weight_version"))

    async def update_from_tensors(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        max_bucket_bytes: int,
        flush: bool,
    ) -> int:
        """Replace weights by published names, in buckets; returns how many bytes were sent.

        The version changes with the last bucket. `flush`: forget cached prefixes, which older weights made.
        Raises: UpdateFailed.
        """
        sent = 0
        in_session = await self.open_update()
        for bucket, last in buckets(weights, max_bucket_bytes):
            body = self._bucket_body(encode(bucket), flush and last)
            if last:
                body["weight_version"] = str(version)
            await self._update("/update_weights_from_tensor", body, version)
            sent += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        await self.close_update(version, in_session)
        return sent

    async def open_update(self) -> bool:
        """Begin an update; whether this server has sessions (0.5.22 and newer), for `close_update`.

        Raises: UpdateFailed when the server repacks its weights and cannot put that back.
        """
        response = await self._http.post("/begin_weight_update", {"selector": "all"}, CONTROL_S)
        if response.status != MISSING:
            self._accepted("/begin_weight_update", response)
            return True
        if self._repacks:
            await self._restore()
        return False

    async def give_handles(self, payloads: Sequence[str], version: int, last: bool) -> None:
        """One bucket of an update, a payload for each GPU of the server, in the order of its ranks.

        The version changes with the last bucket. The server has copied the tensors when this returns.
        Raises: UpdateFailed.
        """
        body: dict[str, Any] = {
            "serialized_named_tensors": list(payloads),
            # Its cache is not there yet: it comes back, empty, after the weights.
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if last:
            body["weight_version"] = str(version)
        await self._update("/update_weights_from_tensor", body, version)

    async def close_update(self, version: int, in_session: bool) -> None:
        """End an update that `open_update` began. Raises: UpdateFailed."""
        if in_session:
            await self._update("/end_weight_update", {}, version)
        elif self._repacks:
            await self._update("/post_process_weights", REPACK, version)

    async def join_group(self, meeting: Meeting, rank: int) -> None:
        """Join a process group whose rank 0 waits at this address; returns when all have come.

        `rank`: of the server's first GPU.
        """
        body = {
            "master_address": meeting.host,
            "master_port": meeting.port,
            "rank_offset": rank,
            "world_size": meeting.size,
            "group_name": meeting.name,
            "backend": meeting.backend,
        }
        await self._command("/init_weights_update_group", body)

    async def leave_group(self, name: str) -> None:
        """Leave a group that `join_group` formed."""
        await self._command("/destroy_weights_update_group", {"group_name": name})

    async def update_from_group(
        self, group: str, announced: Announced, version: int, flush: bool, timeout: float
    ) -> None:
        """One bucket of an update, through a group that the server joined; the version comes with the last.

        `flush`: as in `update_from_tensors`. The server has loaded the tensors when this returns.
        Raises: UpdateFailed.
        """
        body: dict[str, Any] = {
            "names": list(announced.names),
            "dtypes": list(announced.dtypes),
            "shapes": [list(shape) for shape in announced.shapes],
            "group_name": group,
            "flush_cache": flush and announced.last,
            "abort_all_requests": False,
        }
        if announced.last:
            body["weight_version"] = str(version)
        await self._update("/update_weights_from_distributed", body, version, timeout)

    async def update_from_disk(self, checkpoint: Path, version: int, flush: bool) -> int:
        """Replace weights by those of a checkpoint that the server can read; returns how many bytes it has.

        Raises: UpdateFailed.
        """
        body = {
            "model_path": str(checkpoint),
            "weight_version": str(version),
            "abort_all_requests": False,
            "flush_cache": flush,
        }
        await self._update("/update_weights_from_disk", body, version)
        return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))

    async def checksum(self) -> str:
        """One number over every weight that the server holds, whatever way they came."""
        said = self._accepted(
            "/weights_checker", await self._http.post("/weights_checker", {"action": "checksum"}, CONTROL_S)
        )
        return str(said.get("per_engine_checksum") or [rank["per_gpu_checksum"] for rank in said["ranks"]])

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give GPU memory back (needs --enable-memory-saver); an idle or paused server only."""
        await self._command("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory again. Weights come back empty: new ones must be handed over."""
        await self._command("/resume_memory_occupation", {"tags": list(tags)})

    async def gauges(self) -> dict[str, float]:
        """The server's own metrics, summed over labels (needs --enable-metrics); empty without them."""
        response = await self._http.get("/metrics", CONTROL_S)
        return dict(_gauges(response.body.decode())) if response.ok else {}

    async def _restore(self) -> None:
        """Have the server make room for weights as they are published."""
        response = await self._http.post("/post_process_weights", RESTORE, CONTROL_S)
        if response.status == MISSING:
            raise UpdateFailed(
                "this server cannot be given packed weights again",
                where=self._http.url,
                why="it repacked those it loaded for its kernel, and has no call that puts that back",
                fix="serve with SGLang 0.5.22 or newer: --server-python PATH/bin/python",
            )
        self._accepted("/post_process_weights", response)

    def _bucket_body(self, payload: str, flush: bool) -> dict[str, Any]:
        return {
            "serialized_named_tensors": [payload] * self._tensor_parallel_size,
            "flush_cache": flush,
            "abort_all_requests": False,
        }

    async def _update(self, path: str, body: dict[str, Any], version: int, timeout: float = UPDATE_S) -> None:
        try:
            response = await self._http.post(path, body, timeout)
        except ConnectionLost as lost:
            raise UpdateFailed(
                f"weight version {version} broke off", where=self._http.url, why=lost.why
            ) from lost
        said = response.json() if response.ok else {}
        if not (isinstance(said, dict) and said.get("success")):
            raise UpdateFailed(
                f"weight version {version} was refused", where=self._http.url, why=response.complaint()
            )

    async def _command(self, path: str, body: dict[str, Any]) -> None:
        self._accepted(path, await self._http.post(path, body, CONTROL_S))

    async def _read(self, path: str, older: str) -> dict[str, Any]:
        response = await self._http.get(path, CONTROL_S)
        if response.status == MISSING:
            response = await self._http.get(older, CONTROL_S)
        return self._accepted(path, response)

    def _accepted(self, path: str, response: Response) -> dict[str, Any]:
        if not response.ok:
            raise RunError(
                f"the SGLang server refused {path}",
                where=self._http.url,
                why=f"status {response.status}: {response.complaint()}",
            )
        said = response.json() if response.body[:1] == b"{" else {}
        if said.get("success") is False:
            raise RunError(f"{path} failed", where=self._http.url, why=str(said.get("message")))
        return said


def _gauges(page: str) -> Iterator[tuple[str, float]]:
    """`sglang:name{labels} value` lines of a Prometheus page; histograms are left out."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("sglang:") or "_bucket{" in line:
            continue
        head, _, value = line.rpartition(" ")
        name = head.partition("{")[0].removeprefix("sglang:")
        found[name] = found.get(name, 0.0) + float(value)
    yield from found.items()
