"""A server that speaks the documented contract of SGLang, old or new, over real HTTP on loopback.

It stands in where a test is about the contract of a version that is not installed, or about a server that
misbehaves. Real servers are in `tests/e2e/test_sglang.py`.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist

Answer = tuple[int, Any]


class FakeSglang:
    """`sessions`: weights are refused outside begin/end, as from 0.5.22 on. `hooks`: an older server that was
    patched for training, whose weights are repacked by a call of its own."""

    def __init__(
        self, *, sessions: bool = False, hooks: bool = False, layers: int = 2, top_k: int = 2
    ) -> None:
        self.sessions, self.hooks, self.layers, self.top_k = sessions, hooks, layers, top_k
        self.calls: list[tuple[str, Any]] = []
        self.received: dict[str, torch.Tensor] = {}
        self.buckets: list[list[str]] = []
        self.version = "default"
        self.in_session = False
        self.paused = False
        self.overrides: dict[str, Answer] = {}
        self.drop_fields: set[str] = set()
        self.cut_after: int | None = None
        """Tokens of every response that an abort or a pause then cuts off."""
        self.hang_up_on: set[str] = set()
        self.groups: dict[str, dist.ProcessGroup] = {}
        """Real ones, of gloo, by name."""
        self.met = False
        """Whether it has come to the store of a group."""
        self.generating = asyncio.Event()
        self.finish = asyncio.Event()
        self.finish.set()
        self.health = asyncio.Event()
        """Set when a health check may answer."""
        self.health.set()
        self.asked_rids: set[str] = set()
        self.matched: str | None = None
        """What a response says at its first token."""
        self.has_tokenizer = True
        self.dead = False
        self.dies_on_bucket: int | None = None
        """Buckets of a broadcast that it takes before it dies."""
        self.url = ""

    def die(self) -> None:
        """As a process that is killed: no answer any more, and its end of every connection closed."""
        self.dead = True
        self.groups.clear()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeSglang]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length")), 0)
        body = orjson.loads(await reader.readexactly(length)) if length else None
        self.calls.append((path, body))
        if path == "/update_weights_from_distributed" and len(self.buckets) == self.dies_on_bucket:
            self.die()
        answered = None
        if path not in self.hang_up_on and not self.dead:
            answered = await self._answer(path, body)
        if answered is not None and not self.dead:
            status, answer = answered
            raw = answer if isinstance(answer, bytes) else orjson.dumps(answer)
            # In two chunks, as servers that stream do.
            parts = [part for part in (raw[:5], raw[5:]) if part]
            chunks = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
            head = f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head.encode() + chunks + b"0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def _answer(self, path: str, body: Any) -> Answer:
        if path in self.overrides:
            return self.overrides[path]
        handler = getattr(self, "_on" + path.replace("/", "_"), None)
        missing = (path.endswith("_weight_update") and not self.sessions) or (
            path == "/post_process_weights" and not self.hooks
        )
        if handler is None or missing:
            return 404, {"detail": "Not Found"}
        return await handler(body)

    async def _on_health(self, _: Any) -> Answer:
        await self.health.wait()
        return 200, b""

    async def _on_model_info(self, _: Any) -> Answer:
        return 200, {"weight_version": self.version}

    async def _on_metrics(self, _: Any) -> Answer:
        page = '# HELP x\nsglang:num_running_reqs{tp="0"} 2.0\nsglang:num_running_reqs{tp="1"} 1.0\nother 5\n'
        return 200, (page + 'sglang:latency_bucket{le="1"} 7\n').encode()

    async def _on_pause_generation(self, body: Any) -> Answer:
        self.paused = True
        if body["mode"] == "abort":
            self.finish.set()
        return 200, {"status": "ok"}

    async def _on_continue_generation(self, _: Any) -> Answer:
        self.paused = False
        return 200, {"status": "ok"}

    async def _on_release_memory_occupation(self, _: Any) -> Answer:
        return 200, None

    async def _on_resume_memory_occupation(self, _: Any) -> Answer:
        return 200, None

    async def _on_begin_weight_update(self, _: Any) -> Answer:
        self.in_session = True
        return 200, {"success": True}

    async def _on_end_weight_update(self, _: Any) -> Answer:
        self.in_session = False
        return 200, {"success": True}

    async def _on_post_process_weights(self, _: Any) -> Answer:
        return 200, {"success": True, "message": "Success"}

    async def _on_update_weights_from_tensor(self, body: Any) -> Answer:
        if self.sessions and not self.in_session:
            return 400, {"success": False, "message": "no weight update is open"}
        payload, *_ = body["serialized_named_tensors"]
        bucket = pickle.loads(base64.b64decode(payload))
        self.received |= dict(bucket)
        self.buckets.append([name for name, _ in bucket])
        self.version = body.get("weight_version", self.version)
        return 200, {"success": True, "message": "ok"}

    async def _on_init_weights_update_group(self, body: Any) -> Answer:
        try:
            store = await asyncio.to_thread(_store, body)
            self.met = True
            self.groups[body["group_name"]] = await asyncio.to_thread(_join, body, store)
        except RuntimeError as broken:
            return 400, {"success": False, "message": str(broken).splitlines()[0]}
        return 200, {"success": True}

    async def _on_destroy_weights_update_group(self, body: Any) -> Answer:
        there = self.groups.pop(body["group_name"], None) is not None
        return 200, {"success": there, "message": "" if there else "no such group"}

    async def _on_update_weights_from_distributed(self, body: Any) -> Answer:
        described = zip(body["shapes"], body["dtypes"], strict=True)
        tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in described]
        if group := self.groups.get(body["group_name"]):
            try:
                await asyncio.to_thread(_receive, group, tensors)
            except RuntimeError as broken:
                return 400, {"success": False, "message": str(broken).splitlines()[0]}
        self.buckets.append(body["names"])
        self.received |= dict(zip(body["names"], tensors, strict=True))
        self.version = body.get("weight_version", self.version)
        return 200, {"success": True, "message": "ok"}

    async def _on_update_weights_from_disk(self, body: Any) -> Answer:
        self.version = body["weight_version"]
        return 200, {"success": True, "message": body["model_path"]}

    async def _on_abort_request(self, body: Any) -> Answer:
        self.asked_rids.discard(body["rid"])
        if not self.asked_rids:
            self.finish.set()
        return 200, b""

    async def _on_generate(self, body: Any) -> Answer:
        version = self.version
        for params in body["sampling_params"]:
            if params.get("stop") and not self.has_tokenizer:
                why = f"stop={params['stop']} is unavailable when skip_tokenizer_init=True"
                return 400, {"error": {"message": why}}
        cut, self.cut_after = self.cut_after, None
        self.asked_rids = set(body["rid"])
        self.generating.set()
        await self.finish.wait()
        asked = zip(body["input_ids"], body["sampling_params"], strict=True)
        return 200, [self._sample(ids, params, version, cut) for ids, params in asked]

    def _sample(
        self, ids: list[int], params: dict[str, Any], version: str, cut: int | None
    ) -> dict[str, Any]:
        stops, wanted = params.get("stop_token_ids", []), params["max_new_tokens"]
        matched = self.matched if self.matched in params.get("stop", ()) else None
        stopped = matched is not None or 7 in stops
        output = [7] if stopped else [7] * (wanted if cut is None else cut)
        rows = len(ids) + len(output) - 1
        routes = np.arange(rows * self.layers * self.top_k, dtype="<i4") % 8
        meta = {
            "finish_reason": _finish("abort" if cut else "stop" if stopped else "length", matched or 7),
            "output_token_logprobs": [[-0.5, token, None] for token in output],
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(output)}],
            "cached_tokens": 3,
            "routed_experts": base64.b64encode(routes.tobytes()).decode(),
            "spec_verify_ct": 4,
            "spec_num_correct_drafts": 5,
            "spec_num_proposed_drafts": 8,
            "spec_correct_drafts_histogram": [1, 1, 2],
        }
        return {
            "output_ids": output,
            "meta_info": {k: v for k, v in meta.items() if k not in self.drop_fields},
        }


def _finish(kind: str, matched: str | int) -> dict[str, Any]:
    return {"type": kind, "matched": matched} if kind == "stop" else {"type": kind}


LIMIT = timedelta(seconds=20)


def _store(body: Any) -> dist.Store:
    return dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=LIMIT)


def _join(body: Any, store: dist.Store) -> dist.ProcessGroup:
    """As torch's own helper does it below SGLang's `init_custom_process_group`."""
    name = body["group_name"]
    for prefix in (name, f"{name}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], LIMIT)


def _receive(group: dist.ProcessGroup, tensors: list[torch.Tensor]) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    for work in [group.broadcast([tensor], options) for tensor in tensors]:
        work.wait()
