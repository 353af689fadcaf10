"""The protocol that every inference engine obeys: token ids in; token ids, log-probs and routes out.

The vocabulary is SGLang's. Token ids are the only interface: text is made and read on the other side of it,
so that what is trained on is what was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from miles.data.sample import SpecInfo
from miles.errors import MilesError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
WeightSpan = tuple[int, int]
"""(weight version, index of the first output token that it produced)."""


class RequestRefused(MilesError):
    """A generate request that no engine could serve: a bad sampling parameter or too long a context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one response is drawn.

    Attributes:
        max_new_tokens: the response ends with reason "length" after this many tokens.
        temperature: logits are divided by it; 0 means greedy.
        top_p: nucleus mass in (0, 1], measured on the whole distribution at this temperature.
        top_k: keep the k most likely tokens; -1 keeps all. Both limits apply to the same distribution
            (SGLang's "joint" order): a token must pass both.
        stop_token_ids: the response ends with reason "stop" after one of these, and only these: an
            end-of-sequence id of the model has to be among them to stop anything.
        stop: the response ends with reason "stop" at the first token after which its text, special tokens
            included, contains one of these; the tokens stay.
        min_new_tokens: stop ids are not sampled before this many tokens exist; a stop string ends a response
            at any length.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        rules = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "finite and >= 0"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k == -1 or self.top_k >= 1, "top_k", "-1 (off) or at least 1"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                "between 0 and max_new_tokens",
            ),
            (all(token >= 0 for token in self.stop_token_ids), "stop_token_ids", "token ids (>= 0)"),
            (isinstance(self.stop, tuple) and all(self.stop), "stop", "a tuple of texts, none of them empty"),
        )
        for holds, name, rule in rules:
            if not holds:
                raise RequestRefused(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One response to generate.

    Attributes:
        input_ids: the prompt, at least one token id.
        sample_key: names the sample to the random stream: the draw at a position depends on (engine seed,
            sample_key, position) only, never on what else is in the batch. Fits in a signed 64-bit integer.
        group: requests with the same group and the same input_ids share one prefill. None: never shared.
        return_routed_experts: ask for the expert ids of every MoE layer.
        speculative_num_steps: tokens to guess in a row at most (0: plain decoding). None: as the engine does.
        response_so_far: how many of the last input_ids are the beginning of the response itself, where one
            that was cut off goes on: a stop string may have begun in them.
    """

    input_ids: Sequence[int]
    sampling: SamplingParams
    sample_key: int
    group: int | None = None
    return_routed_experts: bool = True
    speculative_num_steps: int | None = None
    response_so_far: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOutput:
    """What one request produced.

    Attributes:
        output_ids: sampled ids, the stop id included when there is one.
        log_probs: float32 [len(output_ids)]: log softmax of the logits at the sampling temperature over the
            whole vocabulary, before top-k, top-p and min_new_tokens; at temperature 1 for greedy requests.
        routed_experts: int16 [len(input_ids) + len(output_ids) - 1, MoE layers, top-k], one row per token
            but the last; None when not asked for, for a dense model, or when the request was aborted before
            it started.
        finish_reason: "stop", "length", or "abort" (partial output kept).
        weight_versions: spans over output_ids, in order. The version that produced token i is that of the
            last span with first index <= i. Empty when there is no output.
        cached_tokens: prompt tokens whose keys and values were not computed for this request.
        spec_info: counters of speculative decoding; None without it.
        stop_string: the one that ended the response; None where a stop id did, or nothing.
    """

    output_ids: list[int]
    log_probs: np.ndarray
    routed_experts: np.ndarray | None
    finish_reason: FinishReason
    weight_versions: list[WeightSpan]
    cached_tokens: int
    spec_info: SpecInfo | None = None
    stop_string: str | None = None


def unstarted() -> GenerateOutput:
    """Of a request that was aborted before it began."""
    return GenerateOutput(
        output_ids=[],
        log_probs=np.zeros(0, dtype=np.float32),
        routed_experts=None,
        finish_reason="abort",
        weight_versions=[],
        cached_tokens=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """`ok` is False when the engine can no longer answer; `reason` says why."""

    ok: bool
    reason: str
    weight_version: int | None
    running: int
    waiting: int
    paused: bool


class GenerationClient(Protocol):
    """What drawing samples needs of an engine, or of several behind one client."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        """Answer all requests, in their order; returns when the last one is complete.

        Raises:
            RequestRefused: a request does not fit the engine; none of the call was started.
        """
        ...

    async def abort(self, groups: Collection[int] | None = None) -> int:
        """End the requests of these groups (None: all) with reason "abort"; returns how many."""
        ...

    async def measurements(self) -> Sequence[Mapping[str, float]]:
        """`Engine.metrics` of every engine behind this client."""
        ...


class Engine(GenerationClient, Protocol):
    """An inference engine. Calls in flight are batched together; every method belongs to one event loop."""

    async def pause(self) -> None:
        """Stop between two steps; requests in flight stay open and keep their cache (SGLang's in_place)."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight, by published names, between two steps. Running requests go on over the keys
        and values they have and get a new weight span; shared prompts that still wait are prefilled again.
        """
        ...

    async def flush_cache(self) -> None:
        """Forget prompts kept for requests that wait."""
        ...

    def health(self) -> EngineHealth: ...

    def metrics(self) -> Mapping[str, float]:
        """Counters and gauges; a value that cannot be computed is absent."""
        ...
