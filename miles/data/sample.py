"""Sample: one prompt, its response, and everything the trainer must know about how the response was made.

Index legend: a sample holds n = prompt_length + response_length tokens. Per-response arrays count from the
first response token; routes count rows (row t consumed token t), so they have n - 1 rows: the last token of a
sample is never an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import pairwise, zip_longest
from types import NoneType
from typing import Any

import numpy as np

from miles.data import route_codec
from miles.errors import DataError

Message = dict[str, Any]
"""One chat message: role, content, and whatever else the chat template reads."""


class SampleStatus(StrEnum):
    """How far a sample got; the value is what records show."""

    PENDING = "pending"
    COMPLETED = "completed"
    """The policy ended the response itself (stop token or stop string)."""
    TRUNCATED = "truncated"
    """A length cap ended the response."""
    ABORTED = "aborted"
    """Generation was interrupted; the tokens so far are valid and can be continued."""
    FAILED = "failed"
    """Generation or scoring broke; the sample must not be trained on."""


@dataclass
class SpecInfo:
    """Counters of speculative decoding over one response.

    Attributes:
        accepted_tokens, draft_tokens: guesses that are in the response, and guesses made.
        verify_steps: forwards that decoded; each gave the accepted guesses and one token more.
        tried, accepted: by depth, from 1 on: guesses that were judged (all before them stood), and stood.
    """

    accepted_tokens: int = 0
    draft_tokens: int = 0
    verify_steps: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def plus(self, other: SpecInfo) -> SpecInfo:
        """The counters of both, for a response that was generated in parts."""

        def by_depth(one: list[int], more: list[int]) -> list[int]:
            return [a + b for a, b in zip_longest(one, more, fillvalue=0)]

        return SpecInfo(
            self.accepted_tokens + other.accepted_tokens,
            self.draft_tokens + other.draft_tokens,
            self.verify_steps + other.verify_steps,
            by_depth(self.tried, other.tried),
            by_depth(self.accepted, other.accepted),
        )


_LOWEST_LOG_PROB, _HIGHEST_EXPERT = float(np.finfo(np.float32).min), int(np.iinfo(np.int16).max)
_WHOLE = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
_PLAIN_REWARDS, _PLAIN_ROUTES = (float, NoneType), (np.ndarray, NoneType)


@dataclass(eq=False)
class Sample:
    """One rollout of one prompt.

    `tokens` are prompt then response ids. Optional fields are None when the thing was not recorded, which is
    never the same as zero.
    """

    prompt: str | list[Message]
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    """Number of response tokens, the stop token included; tool output counts as response."""
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    shaped_reward: float | None = None
    """What is trained on in place of `reward`, where rewards are shaped: it joins the group normalisation."""
    loss_mask: list[int] | None = None
    """0 or 1 per response token; None means that every response token is trained on."""
    remove_sample: bool = False
    """Keep the sample in reward normalisation but take all of its tokens out of the loss."""
    status: SampleStatus = SampleStatus.PENDING
    stop_string: str | None = None
    """What ended the last turn, where a stop string did and no stop token; its tokens are in the response."""
    metadata: dict[str, Any] = field(default_factory=dict)
    rollout_log_probs: np.ndarray | None = None
    """float32 [response_length], at the sampling temperature; NaN where the token was not sampled."""
    teacher_log_probs: np.ndarray | None = None
    """float32 [response_length], of a served teacher in a distillation."""
    rollout_routed_experts: np.ndarray | None = None
    """int16 [len(tokens) - 1, num_moe_layers, top_k], published expert ids; -1 where not recorded."""
    weight_versions: list[tuple[int, int]] = field(default_factory=list)
    """Spans (weight version, index of its first response token), first indices ascending from 0."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters; log-probs of two samples are comparable only under the same ones."""
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    spec_info: SpecInfo | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the engine served from its prefix cache."""
    non_generation_time: float = 0.0
    """Seconds spent in tools and environments."""

    def __copy__(self) -> Sample:
        """The same values in a sample of their own; several times faster than `copy.copy` by itself."""
        twin = object.__new__(Sample)
        vars(twin).update(vars(self))
        return twin

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.tokens) - self.response_length

    @property
    def num_rows(self) -> int:
        """Rows this sample contributes to a TrainBatch: every token but the last."""
        return max(len(self.tokens) - 1, 0)

    @property
    def trained_tokens(self) -> int:
        """Response tokens that enter the loss."""
        if self.remove_sample:
            return 0
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def oldest_weight_version(self) -> int | None:
        """The lowest version that produced a token of the response, or None when none was recorded."""
        return min((version for version, _ in self.weight_versions), default=None)

    def reward_value(self, reward_key: str | None = None) -> float | None:
        """The scalar reward: `reward` itself, or its entry `reward_key`; None when there is none."""
        if self.reward is None:
            return None
        if not isinstance(self.reward, dict):
            return float(self.reward)
        if not reward_key or reward_key not in self.reward:
            problem = f"lacks {reward_key!r}" if reward_key else "no reward key is set"
            raise DataError(
                f"the reward is a dict and {problem}",
                where=self._name(),
                why=f"its keys are {', '.join(map(str, self.reward))}",
                fix="set --reward-key to one of them",
            )
        value = self.reward[reward_key]
        return None if value is None else float(value)

    def validate(self) -> None:
        """Raise DataError on the first broken invariant; called wherever a sample changes hands, for many at
        once by `validate_samples`.
        """
        self._check_structure()
        self._check_values()

    def _check_structure(self) -> None:
        """What needs no look into the arrays."""
        if self._is_plain_response():
            return
        self._check_lengths()
        self._check_status()
        self._check_loss_mask()
        if self.rollout_log_probs is not None:
            length = (self.response_length,)
            _check_array(self, "rollout_log_probs", self.rollout_log_probs, np.float32, length)
        self._check_routes()
        self._check_weight_versions()
        if isinstance(self.reward, float | int) and not math.isfinite(self.reward):
            raise self._broken(f"reward is {self.reward}", "a reward is a finite number or None")

    def _is_plain_response(self) -> bool:
        """Whether it is what most samples are, a whole response of one turn from one set of weights, with
        nothing broken: one look instead of a check after the other. Never True where a check would fail.
        """
        length, log_probs, routes = len(self.tokens), self.rollout_log_probs, self.rollout_routed_experts
        return (
            self.status in _WHOLE
            and self.loss_mask is None
            and 0 < self.response_length < length
            and min(self.tokens) >= 0
            and type(self.reward) in _PLAIN_REWARDS
            and (self.reward is None or math.isfinite(self.reward))  # type: ignore[arg-type]
            and len(self.weight_versions) == 1
            and self.weight_versions[0][1] == 0
            and type(log_probs) is np.ndarray
            and log_probs.dtype == np.float32
            and log_probs.shape == (self.response_length,)
            and type(routes) in _PLAIN_ROUTES
            and (routes is None or (routes.ndim == 3 and len(routes) == length - 1))
            and (routes is None or routes.dtype == np.int16)
        )

    def _check_values(self) -> None:
        """What the arrays hold."""
        if self.rollout_log_probs is not None:
            self._check_log_probs(self.rollout_log_probs)
        routes = self.rollout_routed_experts
        if routes is not None and routes.size and routes.min() < -1:
            raise self._broken(f"expert id {routes.min()}", "ids start at 0, and -1 means not recorded")

    def _name(self) -> str:
        return f"sample {self.index if self.index is not None else '?'} (group {self.group_index})"

    def _broken(self, what: str, why: str) -> DataError:
        return DataError(what, where=self._name(), why=why)

    def _check_lengths(self) -> None:
        if self.response_length < 0:
            raise self._broken(f"response_length is {self.response_length}", "a length is not negative")
        if self.response_length and self.prompt_length < 1:
            raise self._broken(
                f"{len(self.tokens)} tokens hold a response of {self.response_length}",
                "tokens are prompt then response, and the first response token needs a token before it",
            )
        if self.tokens and min(self.tokens) < 0:
            raise self._broken(f"token id {min(self.tokens)}", "token ids are not negative")

    def _check_status(self) -> None:
        if not isinstance(self.status, SampleStatus):
            raise self._broken(f"status is {self.status!r}", "status is a SampleStatus")
        if self.status is SampleStatus.COMPLETED and self.response_length == 0:
            raise self._broken("a completed sample without a response", "its stop token is part of it")
        if self.status is SampleStatus.PENDING and self.response_length:
            raise self._broken(
                f"a pending sample with {self.response_length} response tokens",
                "a sample that has begun is completed, truncated, aborted or failed",
            )

    def _check_loss_mask(self) -> None:
        if self.loss_mask is None:
            return
        if len(self.loss_mask) != self.response_length:
            raise self._broken(
                f"loss_mask has {len(self.loss_mask)} entries for {self.response_length} response tokens",
                "the mask has one entry per response token",
            )
        if any(m not in (0, 1) for m in self.loss_mask):
            raise self._broken(
                "loss_mask holds a value other than 0 and 1", "a token is trained on or it is not"
            )

    def _check_log_probs(self, log_probs: np.ndarray) -> None:
        if not log_probs.size or (log_probs.max() <= 0 and log_probs.min() > -np.inf):
            return  # the common case in two passes; a NaN fails both comparisons
        if np.isinf(log_probs).any():
            raise self._broken("rollout_log_probs holds an infinity", "a sampled token has a finite log-prob")
        if (log_probs > 0).any():
            raise self._broken("rollout_log_probs holds a positive value", "probabilities do not exceed 1")
        unsampled = np.isnan(log_probs)
        trained = unsampled if self.loss_mask is None else unsampled & np.asarray(self.loss_mask, dtype=bool)
        if trained.any() and not self.remove_sample:
            raise self._broken(
                f"response token {int(np.flatnonzero(trained)[0])} is trained on but its log-prob is NaN",
                "NaN marks a token that the policy did not sample; its loss_mask must be 0",
            )

    def _check_routes(self) -> None:
        routes = self.rollout_routed_experts
        if routes is None:
            return
        if routes.ndim != 3:
            raise self._broken(f"routes have shape {routes.shape}", "routes are [rows, MoE layers, top-k]")
        _check_array(self, "rollout_routed_experts", routes, np.int16, (self.num_rows, *routes.shape[1:]))

    def _check_weight_versions(self) -> None:
        if not self.weight_versions:
            return
        starts = [start for _, start in self.weight_versions]
        if starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise self._broken(f"weight version spans start at {starts}", "spans ascend from token 0")
        if starts[-1] >= max(self.response_length, 1):
            raise self._broken(
                f"a weight version span starts at token {starts[-1]} of {self.response_length}",
                "every span holds at least one response token",
            )

    def to_dict(self, routes: bool = True) -> dict[str, Any]:
        """A JSON-able record; NaN log-probs become null, routes base64. `routes=False` leaves routes out."""
        record: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        record["status"] = self.status.value
        record["weight_versions"] = [list(span) for span in self.weight_versions]
        if self.spec_info is not None:
            record["spec_info"] = dict(vars(self.spec_info))
        if self.rollout_log_probs is not None:
            record["rollout_log_probs"] = [
                None if math.isnan(x) else x for x in self.rollout_log_probs.tolist()
            ]
        if self.teacher_log_probs is not None:
            record["teacher_log_probs"] = self.teacher_log_probs.tolist()
        if self.rollout_routed_experts is not None:
            record["rollout_routed_experts"] = route_codec.to_json(self.rollout_routed_experts)
        if not routes:
            del record["rollout_routed_experts"]
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`; an unknown key is a DataError."""
        unknown = set(record) - {f.name for f in fields(cls)}
        if unknown:
            raise DataError(f"unknown sample fields: {', '.join(sorted(unknown))}", where="sample record")
        values = dict(record)
        values["status"] = SampleStatus(values.get("status", SampleStatus.PENDING))
        values["weight_versions"] = [(int(v), int(t)) for v, t in values.get("weight_versions", [])]
        if values.get("spec_info") is not None:
            values["spec_info"] = SpecInfo(**values["spec_info"])
        if values.get("rollout_log_probs") is not None:
            log_probs = [math.nan if x is None else x for x in values["rollout_log_probs"]]
            values["rollout_log_probs"] = np.array(log_probs, dtype=np.float32)
        if values.get("teacher_log_probs") is not None:
            values["teacher_log_probs"] = np.array(values["teacher_log_probs"], dtype=np.float32)
        if values.get("rollout_routed_experts") is not None:
            values["rollout_routed_experts"] = route_codec.from_json(values["rollout_routed_experts"])
        return cls(**values)


def validate_samples(samples: Sequence[Sample]) -> None:
    """`Sample.validate` of each, with one look at the arrays of all of them together."""
    for sample in samples:
        sample._check_structure()
    log_probs = [s.rollout_log_probs for s in samples if s.rollout_log_probs is not None]
    routes = [s.rollout_routed_experts.ravel() for s in samples if s.rollout_routed_experts is not None]
    if not (_all_within(log_probs, _LOWEST_LOG_PROB, 0) and _all_within(routes, -1, _HIGHEST_EXPERT)):
        for sample in samples:
            sample._check_values()


def _all_within(arrays: list[np.ndarray], low: float, high: float) -> bool:
    """Whether every element lies between the bounds; a NaN does not."""
    joined = np.concatenate(arrays) if arrays else np.empty(0)
    return not joined.size or bool(np.minimum.reduce(joined) >= low and np.maximum.reduce(joined) <= high)


def _check_array(
    sample: Sample, name: str, array: np.ndarray, dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise sample._broken(f"{name} is {kind}", f"it is a numpy array of {np.dtype(dtype)}")
    if array.shape != shape:
        raise sample._broken(f"{name} has shape {array.shape}", f"it must be {shape} for this sample")
