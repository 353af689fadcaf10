"""The native engine: callers in one event loop, a step loop between them, weights that change between steps.

>>> engine = NativeEngine(spec, EngineSettings(max_context_len=64, seed=42))
>>> await engine.receive_weights(read_hf(checkpoint), version=0)
>>> outputs = await engine.generate([GenerateRequest(input_ids=[1, 2], sampling=params, sample_key=0)])
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from miles.arch.draft_checkpoint import read_draft
from miles.arch.precision import PrecisionPolicy
from miles.arch.spec import ArchSpec
from miles.errors import ConfigError, MilesError, RunError
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.decoder import Decoder
from miles.models.eagle import DraftModel
from miles.models.hidden_states import Stages
from miles.models.mtp import MtpDraft
from miles.models.numerics import FAST, Numerics
from miles.rollout.engine import EngineHealth, GenerateOutput, GenerateRequest, RequestRefused
from miles.rollout.native.batch import ContinuousBatch, Finished
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.fused.runner import FusedRunner
from miles.rollout.native.rescore import rescore
from miles.rollout.native.runner import Runner
from miles.rollout.native.scheduler import Ticket, prefix_key
from miles.rollout.native.stop_strings import Decode
from miles.weights.draft_checkpoint import load_draft
from miles.weights.held_weights import HeldWeights
from miles.weights.native_map import load_published

NO_WEIGHTS = "it has not received weights yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Bounds and numerics of one engine.

    Attributes:
        max_context_len: most tokens of one request, prompt and response together.
        max_running_requests: slots; further requests wait.
        max_prefill_tokens: prompt tokens computed in one step; a longer prompt is read over several.
        max_total_tokens: tokens of all running requests, each at its longest; None: whatever the slots hold.
            Memory is taken for this many, and for one shared or half-read prompt more.
        seed: of every random stream, with the sample keys.
        numerics: how the decoder computes; with the trainer's exact object, log-probs have its bits.
        speculation: guess ahead and verify; None: one token per step.
        decode_library: the compiled decode kernel (see `fused.build`), for fp32 on the CPU, beside torch's
            fast numerics or the compiled exact ones; None: torch decodes.
        precision: how it holds its weights; None, or a plain rollout format: in `dtype`, which it computes in
            whatever it holds.
        keep_expanded: keep the plain numbers of quantised weights between products, beside the stored ones: a
            CPU has no kernel that multiplies the stored ones, and making them for every token costs more
            than the products.
        captured_requests: decode steps of up to so many requests are CUDA graphs; 0: none, as on a CPU.
    """

    max_context_len: int
    seed: int
    max_running_requests: int = 256
    max_prefill_tokens: int = 16384
    max_total_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    numerics: Numerics = FAST
    speculation: SpeculationSettings | None = None
    decode_library: Path | None = None
    precision: PrecisionPolicy | None = None
    keep_expanded: bool = False
    captured_requests: int = 0

    @property
    def slots(self) -> int:
        """Requests that decode at once. A GPU takes the memory of a slot whole, so the bound holds for slots
        there."""
        if self.max_total_tokens is None or torch.device(self.device).type == "cpu":
            return self.max_running_requests
        return min(self.max_running_requests, max(self.max_total_tokens // self.max_context_len, 1))

    @property
    def total_tokens(self) -> int:
        """Tokens of all running requests together."""
        return self.max_total_tokens or self.slots * self.max_context_len


class Call:
    """One `generate` in flight: answers come in one by one, the future is done with the last."""

    def __init__(self, num_requests: int) -> None:
        self.outputs: list[GenerateOutput | None] = [None] * num_requests
        self.missing = num_requests
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(self, index: int, output: GenerateOutput) -> None:
        self.outputs[index] = output
        self.missing -= 1
        if self.missing == 0 and not self.done.done():
            self.done.set_result(None)


class NativeEngine:
    """Continuous batching over one native decoder (protocol: `miles.rollout.engine.Engine`).

    Everything runs in the caller's event loop: a step is one synchronous forward, and whatever else is
    ready runs between two steps. So a weight change never meets a step half way.
    """

    def __init__(self, spec: ArchSpec, settings: EngineSettings, decode: Decode | None = None) -> None:
        """`decode`: ids to text, special tokens included; without it no request may have stop strings."""
        if settings.max_context_len > spec.max_position_embeddings:
            raise ConfigError(
                MilesError(
                    f"the engine is to hold {settings.max_context_len} tokens per request",
                    why=f"the model has {spec.max_position_embeddings} positions",
                    fix=f"--rollout-max-context-len {spec.max_position_embeddings}",
                )
            )
        self.spec, self.settings, self._decode = spec, settings, decode
        self._most_tokens = min(settings.max_context_len, settings.total_tokens)
        self._runner = _make_runner(spec, settings)
        self._external_draft = self._load_draft()
        self._runner.draft = self._external_draft
        self._batch = ContinuousBatch(
            self._runner,
            settings.slots,
            settings.max_context_len,
            settings.max_prefill_tokens,
            settings.total_tokens,
            settings.seed,
            settings.speculation,
            decode,
        )
        self._own: tuple[Decoder, MtpDraft | None] | None = None
        self.held: HeldWeights | None = None
        self._calls: set[Call] = set()
        self._steps: asyncio.Task[None] | None = None
        self._resumed: asyncio.Event | None = None
        self._broken = NO_WEIGHTS
        self._busy_seconds = 0.0

    def _load_draft(self) -> DraftModel | None:
        """The draft that comes as a checkpoint of its own. Raises CheckpointError when it does not fit."""
        speculation, settings = self.settings.speculation, self.settings
        if speculation is None or speculation.draft_model_path is None:
            return None
        found = read_draft(Path(speculation.draft_model_path), self.spec)
        draft = load_draft(found, settings.dtype, settings.device)
        draft.use_numerics(settings.numerics)
        return draft

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        """Answer all requests, in their order; see the protocol."""
        if self._broken:
            raise RunError("the native engine cannot generate", why=self._broken)
        for request in requests:
            self._refuse_unfit(request)
        if not requests:
            return []
        call = Call(len(requests))
        self._calls.add(call)
        self._batch.scheduler.submit(
            [Ticket(request, call, i, prefix_key(request)) for i, request in enumerate(requests)]
        )
        self._ensure_stepping()
        try:
            await call.done
        finally:
            self._calls.discard(call)
            if call.missing:  # the caller was cancelled, or the engine failed
                self._batch.abort(lambda ticket: ticket.owner is call)
        return [output for output in call.outputs if output is not None]

    async def abort(self, groups: Collection[int] | None = None) -> int:
        """End the requests of these groups (None: all) with what they have; returns how many."""

        def chosen(ticket: Ticket) -> bool:
            return groups is None or ticket.request.group in groups

        return self._deliver(self._batch.abort(chosen))

    async def pause(self) -> None:
        """No step runs until `resume`; requests may still be submitted."""
        if self._resumed is None:
            self._resumed = asyncio.Event()

    async def resume(self) -> None:
        """Go on after `pause`."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load every weight by its published name into the engine's own decoder; quantised ones in the
        tensors of their format (`weights.low_precision.as_stored`).

        When loading fails the engine serves nothing until weights arrive whole.
        """
        if self._own is None:
            self._own = self._allocate()
        decoder, draft = self._own
        self._broken = f"receiving weight version {version} failed half way"
        if self.held is None:
            load_published(decoder, weights, draft=draft)
        else:
            self.held.load(weights)
        self._use(decoder, draft, version)

    def _allocate(self) -> tuple[Decoder, MtpDraft | None]:
        """Room for the weights of the policy, and of its MTP layers where it has any."""
        device, dtype, precision = self._runner.device, self.settings.dtype, self.settings.precision
        quantised = precision is not None and not precision.rollout.is_plain
        spec = self.spec if precision is None else precision.layout(self.spec)
        with torch.device("meta" if quantised else device):
            decoder = Decoder(spec, dtype)
            draft = None if self.spec.mtp is None else MtpDraft(self.spec, dtype)
        if precision is not None and quantised:
            self.held = HeldWeights(precision, decoder, draft, dtype, device, self.settings.keep_expanded)
        for part in (decoder, draft):
            if part is not None:
                part.requires_grad_(False)
                part.use_numerics(self.settings.numerics)
        return decoder, draft

    async def share_weights(self, decoder: Decoder, version: int, draft: MtpDraft | None = None) -> None:
        """Serve another owner's decoder without a copy, and guess with its MTP layers. The owner calls again
        whenever it changed the weights, and changes them only between steps of this engine.
        """
        assert decoder.spec == self.spec.policy, "a decoder of another architecture"
        assert decoder.embed.dtype == self.settings.dtype, "shared weights have the engine's dtype"
        assert decoder.numerics == self.settings.numerics, "shared weights are used alike on both sides"
        self._own = self.held = None
        self._use(decoder, draft, version)

    def _use(self, decoder: Decoder, draft: MtpDraft | None, version: int) -> None:
        self._runner.decoder = decoder
        if self._external_draft is None:
            self._runner.draft = draft
        self._batch.set_version(version)
        self._broken = ""

    @property
    def decoder(self) -> Decoder:
        """What it serves. Needs weights."""
        assert self._runner.decoder is not None, "an engine that is asked for its decoder has weights"
        return self._runner.decoder

    def rescore(self, tokens: Sequence[int], prompt_length: int) -> Stages:
        """Read a finished sequence again, alone; see `rescore.rescore`. Needs weights."""
        assert self._runner.decoder is not None, "an engine that sampled has weights"
        settings = self.settings
        return rescore(
            self._runner.decoder, settings.numerics, tokens, prompt_length, settings.decode_library
        )

    async def flush_cache(self) -> None:
        """Forget the prompt kept for requests that wait."""
        self._batch.flush()

    def health(self) -> EngineHealth:
        """Whether the engine can answer, and what it is doing."""
        return EngineHealth(
            ok=not self._broken,
            reason=self._broken,
            weight_version=None if self._runner.decoder is None else self._batch.version,
            running=len(self._batch.scheduler.running),
            waiting=len(self._batch.scheduler.waiting),
            paused=self._resumed is not None,
        )

    async def measurements(self) -> list[dict[str, float]]:
        """`metrics` of this one engine."""
        return [self.metrics()]

    def metrics(self) -> dict[str, float]:
        """Gauges `num_running_requests`, `num_waiting_requests`, `token_usage` (share of cache positions
        filled); totals `generated_tokens`, `prefilled_tokens`, `cached_tokens`, `steps`, `busy_seconds`
        (inside steps); `generated_tokens_per_second` of busy time once there is any; with the decode kernel
        `pack_seconds`, the total of packing weights for it; with speculation the ones of `BreakEven.metrics`.
        """
        counters, scheduler = self._batch.counters, self._batch.scheduler
        metrics = {
            "num_running_requests": float(len(scheduler.running)),
            "num_waiting_requests": float(len(scheduler.waiting)),
            "token_usage": self._batch.cached_positions() / self.settings.total_tokens,
            "generated_tokens": float(counters.generated),
            "prefilled_tokens": float(counters.prefilled),
            "cached_tokens": float(counters.cached),
            "steps": float(counters.steps),
            "busy_seconds": self._busy_seconds,
        }
        if self._busy_seconds > 0:
            metrics["generated_tokens_per_second"] = counters.generated / self._busy_seconds
        if isinstance(self._runner, FusedRunner):
            metrics["pack_seconds"] = self._runner.pack_seconds
        speculation = self._batch.speculation
        return metrics if speculation is None else metrics | speculation.break_even.metrics()

    def _refuse_unfit(self, request: GenerateRequest) -> None:
        """Raise RequestRefused when no batch could ever hold the request."""
        prompt, params, vocab = request.input_ids, request.sampling, self.spec.vocab_size
        total = len(prompt) + params.max_new_tokens
        known = _all_below(prompt, vocab) and _all_below(params.stop_token_ids, vocab)
        readable = self._decode is not None or not params.stop
        if prompt and known and total <= self._most_tokens and readable:
            return
        where = f"request with sample key {request.sample_key}"
        if not readable:
            raise RequestRefused(
                f"stop = {list(params.stop)!r}",
                where=where,
                why="the engine was made without a tokenizer to find it with",
                fix="--rollout-stop, for all turns",
            )
        if not prompt:
            raise RequestRefused("an empty prompt", where=where, why="the first token needs one before it")
        if total > self.settings.max_context_len:
            raise RequestRefused(
                f"{len(prompt)} prompt tokens and {params.max_new_tokens} new ones make {total}",
                where=where,
                why=f"a request holds at most {self.settings.max_context_len} tokens",
                fix="lower --rollout-max-response-len or raise --rollout-max-context-len",
            )
        if total > self.settings.total_tokens:
            raise RequestRefused(
                f"{len(prompt)} prompt tokens and {params.max_new_tokens} new ones make {total}",
                where=where,
                why=f"the KV cache holds {self.settings.total_tokens} tokens",
                fix=f"--sglang-max-total-tokens {total}, or lower --rollout-max-response-len",
            )
        for name, ids in (("input_ids", prompt), ("stop_token_ids", params.stop_token_ids)):
            if not _all_below(ids, vocab):
                outside = next(token for token in ids if not 0 <= token < vocab)
                raise RequestRefused(
                    f"{name} holds {outside}", where=where, why=f"the vocabulary has ids 0 to {vocab - 1}"
                )

    def _ensure_stepping(self) -> None:
        if self._steps is None or self._steps.done():
            self._steps = asyncio.create_task(self._run(), name="native-engine-steps")
            self._steps.add_done_callback(self._on_run_end)

    async def _run(self) -> None:
        """Step while there is work, giving way to the event loop between steps."""
        while self._batch.busy:
            if self._resumed is not None:
                await self._resumed.wait()
                continue
            started = time.perf_counter()
            finished = self._batch.step()
            self._busy_seconds += time.perf_counter() - started
            self._deliver(finished)
            await asyncio.sleep(0)

    def _on_run_end(self, task: asyncio.Task[None]) -> None:
        """A step that failed fails every caller, and the engine until it gets weights again."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self._broken = f"a step failed: {error}"
        self._batch.clear()
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(error)

    def _deliver(self, finished: Sequence[Finished]) -> int:
        for ticket, output in finished:
            assert isinstance(ticket.owner, Call)
            ticket.owner.deliver(ticket.index, output)
        return len(finished)


def _all_below(ids: Sequence[int], vocab: int) -> bool:
    return not ids or 0 <= min(ids) <= max(ids) < vocab


def _make_runner(spec: ArchSpec, settings: EngineSettings) -> Runner | FusedRunner:
    # One slot more than requests: the batch keeps a shared prompt in it.
    slots, context, device = settings.slots + 1, settings.max_context_len, settings.device
    compiled = isinstance(settings.numerics, CompiledExactNumerics)
    if settings.decode_library is None:
        assert not compiled, "compiled exact numerics need the decode kernel"
        guessed = 0 if settings.speculation is None else settings.speculation.num_draft_tokens
        return Runner(
            spec,
            slots,
            context,
            settings.dtype,
            torch.device(device),
            settings.numerics,
            guessed,
            settings.captured_requests,
        )
    assert settings.speculation is None, "the decode kernel guesses nothing"
    assert settings.dtype == torch.float32 and device == "cpu", (
        "the decode kernel computes in fp32 on the CPU"
    )
    assert settings.numerics.name == FAST.name or compiled, (
        "exact numerics in torch have other bits than the decode kernel"
    )
    return FusedRunner(settings.decode_library, spec, slots, context, settings.numerics)
