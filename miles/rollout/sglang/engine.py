"""The SGLang engine: the engine protocol over one running server, whoever started it.

>>> engine = SglangEngine(HttpClient("http://127.0.0.1:30000"), spec, SglangSettings(max_context_len=4096))
>>> await engine.receive_weights(trainer.named_weights(), version=1)
>>> outputs = await engine.generate([GenerateRequest(input_ids=[1, 2], sampling=params, sample_key=0)])
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from miles.arch.spec import ArchSpec
from miles.errors import RunError
from miles.http_client import ConnectionLost, HttpClient
from miles.rollout.engine import EngineHealth, GenerateOutput, GenerateRequest, RequestRefused
from miles.rollout.sglang.continuation import joined, rest_of
from miles.rollout.sglang.contract import BrokenContract, RouteShape, group_body, read_answer
from miles.rollout.sglang.control import Control, MemoryTag, PauseMode, UpdateFailed
from miles.rollout.sglang.weight_payload import Announced, Meeting, with_tied_head

BUCKET_BYTES = 512 * 1024**2
BAD_REQUEST = range(400, 500)


@dataclass(frozen=True, kw_only=True)
class SglangSettings:
    """What the client must know of its server.

    Attributes:
        max_context_len: most tokens of one request, prompt and response together.
        return_routed_experts: ask for routes where a request does; the server was started for it.
        tensor_parallel_size: GPUs of the server, each of which is sent the weights.
        bucket_bytes: most bytes of weights in one request.
        pause_mode: what becomes of running requests when weights change: they end ("abort"), go on with a
            cache computed anew ("retract"), or with the one they have ("in_place").
        repacks: the server holds weights in another form than they are published in (`Control`).
    """

    max_context_len: int
    return_routed_experts: bool = True
    tensor_parallel_size: int = 1
    bucket_bytes: int = BUCKET_BYTES
    pause_mode: PauseMode = "retract"
    repacks: bool = False


@dataclass(eq=False)
class _Call:
    """One `generate` in flight. `answered`: no HTTP request of it is open."""

    name: str
    group: int | None
    count: int
    parts: int = 0
    rids: list[str] = field(default_factory=list)
    cut_off: bool = False
    aborted: bool = False
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answered.set()


class SglangEngine:
    """One server behind the protocol of `miles.rollout.engine.Engine`.

    Requests of one call travel together and share their prompt's prefix. Every method may raise
    ConnectionLost when the server is gone.
    """

    def __init__(self, http: HttpClient, spec: ArchSpec, settings: SglangSettings) -> None:
        self.http, self.settings = http, settings
        self.control = Control(http, settings.tensor_parallel_size, settings.repacks)
        self._vocab_size, self._tied = spec.vocab_size, spec.tie_word_embeddings
        self._routes = RouteShape.of(spec) if settings.return_routed_experts else None
        self._numbers = itertools.count()
        self._running: dict[str, _Call] = {}
        self._steady, self._changing = asyncio.Event(), asyncio.Event()
        """One of them is set: weights do not change, or they do."""
        self._set_steady(True)
        self._released: set[MemoryTag] = set()
        self.sent_bytes = 0
        """Of the weights of the last update."""
        self._arriving = 0
        """Bytes of a broadcast so far."""
        self._in_session: bool | None = None
        """Whether the server has an update session open for a broadcast; None before its first bucket."""
        self._version: int | None = None
        self._broken = ""
        self._paused = False

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        """Answer all requests, in their order; see the protocol. What new weights cut off goes on under them.

        Raises: BrokenContract when the server leaves out what was asked for; UpdateFailed when it has no
        weights of one version.
        """
        for request in requests:
            self._refuse_unfit(request)
        if not requests:
            return []
        # The hyphen ends the name: call-1- is no prefix of call-12-.
        call = _Call(f"call-{next(self._numbers)}-", requests[0].group, len(requests))
        self._running[call.name] = call
        try:
            outputs = await self._ask(call, requests)
            while call.cut_off and not call.aborted:
                call.cut_off = False
                cut = [i for i, output in enumerate(outputs) if output.finish_reason == "abort"]
                if not cut:
                    break
                rest = await self._ask(call, [rest_of(requests[i], outputs[i]) for i in cut])
                for i, newer in zip(cut, rest, strict=True):
                    outputs[i] = joined(outputs[i], newer)
            return outputs
        finally:
            del self._running[call.name]

    async def _ask(self, call: _Call, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        """One HTTP request, between two updates of the weights."""
        while not self._steady.is_set():
            await self._steady.wait()
        if self._broken:
            raise UpdateFailed("the SGLang engine cannot generate", where=self.http.url, why=self._broken)
        call.parts += 1
        call.rids = rids = [f"{call.name}{call.parts}-{i}-" for i in range(len(requests))]
        call.answered.clear()
        try:
            body = group_body(requests, rids, routes=self._routes is not None)
            response = await self.http.post("/generate", body)
        finally:
            call.answered.set()
        if response.status in BAD_REQUEST:
            raise RequestRefused("the SGLang server refused a request", self.http.url, response.complaint())
        if not response.ok:
            raise ConnectionLost(f"{self.http.url} failed", why=f"{response.status}: {response.complaint()}")
        return self._read(requests, response.json())

    def _read(self, requests: Sequence[GenerateRequest], answers: object) -> list[GenerateOutput]:
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise BrokenContract(
                f"{len(requests)} requests were sent together, the answer is no list of as many"
            )
        return [
            read_answer(
                request, answer, self._routes if request.return_routed_experts else None, self._version
            )
            for request, answer in zip(requests, answers, strict=True)
        ]

    async def abort(self, groups: Collection[int] | None = None) -> int:
        """End the requests of these groups (None: all) with what they have; returns how many."""
        chosen = [call for call in self._running.values() if groups is None or call.group in groups]
        for call in chosen:
            call.aborted = True
        # The server's front end drops an abort of a name that it does not know, so each is named in full.
        rids = [rid for call in chosen for rid in call.rids]
        await asyncio.gather(*(self.control.abort(rid) for rid in rids))
        return sum(call.count for call in chosen)

    async def pause(self) -> None:
        """Stop between two steps; requests in flight keep their cache."""
        await self.control.pause("in_place")
        self._paused = True

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.control.resume()
        self._paused = False

    async def flush_cache(self) -> None:
        """Forget cached prefixes."""
        await self.control.flush_cache()

    async def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send every weight by its published name, while nothing decodes.

        When that fails the engine serves nothing until weights arrive whole. Raises: UpdateFailed.
        """
        bucket, sent = self.settings.bucket_bytes, with_tied_head(weights) if self._tied else weights
        await self._update(
            version, lambda: self.control.update_from_tensors(sent, version, bucket, self._forgets)
        )

    async def join_broadcast(self, meeting: Meeting, rank: int) -> None:
        """Join a process group, from this rank on: between `begin_broadcast` and the first bucket, for the
        server does nothing else until all have come. Raises: UpdateFailed.
        """
        try:
            await self.control.join_group(meeting, rank)
        except RunError as refused:
            raise UpdateFailed("the process group was not joined", self.http.url, refused.why) from refused

    async def begin_broadcast(self, version: int) -> None:
        """Stop decoding for weights that come through a process group, bucket by bucket.

        Requests wait until some version has come whole, also over broadcasts that break off, or for `retire`.
        """
        self._broken = f"receiving weight version {version} failed half way"
        self._set_steady(False)
        await self._stop_decoding()
        self._in_session, self._arriving = None, 0

    async def take_broadcast(self, group: str, announced: Announced, version: int, timeout: float) -> None:
        """Load one bucket that the group brings. Raises: UpdateFailed."""
        if self._in_session is None:
            self._in_session = await self.control.open_update()
        await self.control.update_from_group(group, announced, version, self._forgets, timeout)
        self._arriving += announced.nbytes

    async def end_broadcast(self, version: int) -> None:
        """The weights are whole: go on. Raises: UpdateFailed when the server says otherwise."""
        await self.control.close_update(version, bool(self._in_session))
        self._in_session, self.sent_bytes = None, self._arriving
        await self._arrived(version)
        self._set_steady(True)

    async def leave_broadcast(self, group: str) -> None:
        """Leave a process group. Weights that did not arrive whole are not served."""
        in_session, self._in_session = self._in_session, None
        await self.control.leave_group(group)
        if in_session:
            await self.control.close_update(-1, in_session)

    async def receive_checkpoint(self, checkpoint: Path, version: int) -> None:
        """Let the server read its weights from a directory. Raises: UpdateFailed."""
        await self._update(version, lambda: self.control.update_from_disk(checkpoint, version, self._forgets))

    def retire(self) -> None:
        """It is not asked any more: requests that wait for its weights are told so."""
        self._broken = self._broken or "it was given up"
        self._set_steady(True)

    async def release(self, tags: Sequence[MemoryTag]) -> None:
        """Give GPU memory to a trainer on the same GPUs; nothing may be decoding."""
        assert not self._running, "a rollout ends before the trainer's turn"
        self._released.update(tags)
        await self.control.release_memory(tags)
        if "weights" in tags:
            self._broken = "its weights were given up for the trainer's turn"

    async def reclaim(self, tags: Sequence[MemoryTag]) -> None:
        """Take GPU memory back, empty."""
        await self.control.resume_memory(tags)
        self._released.difference_update(tags)

    async def begin_handles(self, version: int) -> bool:
        """Begin an update by handles, between turns; whether this server has update sessions."""
        self._broken = f"receiving weight version {version} failed half way"
        return await self.control.open_update()

    async def take_handles(self, payloads: Sequence[str], version: int, last: bool) -> None:
        """One bucket, a payload for each GPU. Raises: UpdateFailed."""
        await self.control.give_handles(payloads, version, last)

    async def end_handles(self, version: int, in_session: bool) -> None:
        """The weights are whole. Raises: UpdateFailed when the server says otherwise."""
        await self.control.close_update(version, in_session)
        await self._told(version)
        self._version, self._broken = version, ""

    @property
    def _forgets(self) -> bool:
        """Whether the keys and values of older weights are thrown away."""
        return self.settings.pause_mode != "in_place"

    async def _update(self, version: int, transfer: Callable[[], Awaitable[int]]) -> None:
        self._broken = f"receiving weight version {version} failed half way"
        self._set_steady(False)
        try:
            await self._stop_decoding()
            self.sent_bytes = await transfer()
            await self._arrived(version)
        finally:
            self._set_steady(True)

    async def _arrived(self, version: int) -> None:
        """Every weight of this version is there: decode again."""
        await self._told(version)
        await self.control.resume()
        self._version, self._broken = version, ""

    async def _told(self, version: int) -> None:
        """Raises: UpdateFailed when the server names another version than it was sent."""
        told = await self.control.weight_version()
        if told != version:
            what = f"the server says it has weight version {told}"
            raise UpdateFailed(what, self.http.url, f"{version} was sent")

    async def _stop_decoding(self) -> None:
        """Pause. Running requests stay as they are ("in_place"), or end: for good, or to go on afterwards."""
        asked = [call for call in self._running.values() if not call.answered.is_set()]
        if self.settings.pause_mode == "in_place":
            await self.control.pause("in_place")
            return
        for call in asked:
            call.cut_off = self.settings.pause_mode == "retract"
        await self.control.pause("abort")
        # A server forgets its cache only when nothing is left in it.
        await asyncio.gather(*(call.answered.wait() for call in asked))

    def health(self) -> EngineHealth:
        """What this client knows; `check` asks the server."""
        return EngineHealth(
            ok=not self._broken,
            reason=self._broken,
            weight_version=self._version,
            running=sum(call.count for call in self._running.values()),
            waiting=0,
            paused=self._paused,
        )

    async def check(self) -> EngineHealth:
        """Health after the server answered. Raises: ConnectionLost when it does not.

        A server proves it by a token of its own. One that may not decode now is not asked: it would say 503.
        """
        if self._paused or self._released or self._broken:
            return self.health()
        asked = asyncio.ensure_future(self.http.get("/health"))
        changing = asyncio.ensure_future(self._changing.wait())
        try:
            await asyncio.wait((asked, changing), return_when=asyncio.FIRST_COMPLETED)
            if not changing.done() and not (response := asked.result()).ok:
                raise ConnectionLost(f"{self.http.url} is not well", why=f"/health gave {response.status}")
        finally:
            asked.cancel()
            changing.cancel()
        return self.health()

    def _set_steady(self, steady: bool) -> None:
        now, then = (self._steady, self._changing) if steady else (self._changing, self._steady)
        then.clear()
        now.set()

    async def measurements(self) -> list[dict[str, float]]:
        """The server's own gauges and counters, under SGLang's names; empty where they are off."""
        return [await self.control.gauges()]

    def _refuse_unfit(self, request: GenerateRequest) -> None:
        """What a server would answer with an error, or clip: said before anything is sent."""
        prompt, new = request.input_ids, request.sampling.max_new_tokens
        where = f"request with sample key {request.sample_key}"
        if not prompt:
            raise RequestRefused("an empty prompt", where=where, why="the first token needs one before it")
        if len(prompt) + new > self.settings.max_context_len:
            raise RequestRefused(
                f"{len(prompt)} prompt tokens and {new} new ones make {len(prompt) + new}",
                where=where,
                why=f"a request holds at most {self.settings.max_context_len} tokens",
                fix="lower --rollout-max-response-len or raise --rollout-max-context-len",
            )
        outside = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise RequestRefused(
                f"input_ids holds {outside}",
                where=where,
                why=f"the vocabulary has ids 0 to {self._vocab_size - 1}",
            )
