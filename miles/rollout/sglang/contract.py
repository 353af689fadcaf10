"""SGLang's `/generate` contract: our requests as its JSON, its answers as ours.

Shapes: an answer's `routed_experts` is base64 of little-endian int32 [prompt + output - 1, layers, top-k],
dense layers included; ours are int16 and hold the MoE layers only.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles.arch.spec import ArchSpec
from miles.data.sample import SpecInfo
from miles.errors import MilesError
from miles.rollout.engine import FinishReason, GenerateOutput, GenerateRequest, SamplingParams, WeightSpan

FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class BrokenContract(MilesError):
    """A server's answer is not what its documentation promises."""


@dataclass(frozen=True)
class RouteShape:
    """How a model's routes come out of a server, and which part of them we keep."""

    layers: int
    moe_layers: tuple[int, ...]
    top_k: int

    @classmethod
    def of(cls, spec: ArchSpec) -> RouteShape | None:
        """None for a dense model."""
        if not spec.moe_layers:
            return None
        return cls(spec.num_layers, tuple(spec.moe_layers), spec.top_k)


def group_body(requests: Sequence[GenerateRequest], rids: Sequence[str], routes: bool) -> dict[str, Any]:
    """The JSON of one HTTP request for several samples; they are answered together.

    `rids`: one name per request, none a prefix of another (the scheduler aborts by prefix).
    """
    return {
        "rid": list(rids),
        "input_ids": [list(request.input_ids) for request in requests],
        "sampling_params": [sampling_body(r.sampling, r.sample_key) for r in requests],
        "return_logprob": True,
        "return_routed_experts": routes and any(r.return_routed_experts for r in requests),
    }


def sampling_body(sampling: SamplingParams, seed: int | None = None) -> dict[str, Any]:
    """SGLang's sampling parameters. A server draws by `seed` under --enable-deterministic-inference only.

    SGLang always stops at the checkpoint's own end-of-sequence ids where any stop id is given; without one it
    is told to ignore them.
    """
    body: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
    }
    if sampling.min_new_tokens:
        body["min_new_tokens"] = sampling.min_new_tokens
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        body["ignore_eos"] = True
    if seed is not None:
        body["sampling_seed"] = seed
    return body


def read_answer(
    request: GenerateRequest, answer: Mapping[str, Any], shape: RouteShape | None, version: int | None
) -> GenerateOutput:
    """One sample out of an answer.

    Args:
        shape: what the routes must look like; None where none were asked for.
        version: the weight version to assume of a server too old to name one.

    Raises: BrokenContract, naming what is missing or does not fit.
    """
    meta = answer.get("meta_info") or {}
    triples = meta.get("output_token_logprobs")
    reason = (meta.get("finish_reason") or {}).get("type")
    if reason not in FINISH:
        raise BrokenContract(f"an answer ends with finish_reason {meta.get('finish_reason')!r}")
    if triples is None:
        raise BrokenContract("an answer has no output_token_logprobs", why="return_logprob was asked for")
    output_ids = [int(token) for _, token, *_ in triples]
    routes = None if shape is None else _routes(meta, shape, len(request.input_ids) + len(output_ids) - 1)
    if routes is None and shape is not None and output_ids:
        raise BrokenContract(
            "an answer has no routed_experts",
            why="the server runs without --enable-return-routed-experts, or a router dropped the field",
        )
    return GenerateOutput(
        output_ids=output_ids,
        log_probs=np.array([float(log_prob) for log_prob, *_ in triples], dtype=np.float32),
        routed_experts=routes,
        finish_reason=FINISH[reason],
        weight_versions=_spans(meta, version) if output_ids else [],
        cached_tokens=int(meta.get("cached_tokens") or 0),
        spec_info=_spec_info(meta),
        stop_string=_stop_string(request.sampling, meta, output_ids),
    )


def _stop_string(sampling: SamplingParams, meta: Mapping[str, Any], output_ids: list[int]) -> str | None:
    """The text that ended the response. A server names it before a stop id that says the same."""
    matched = meta["finish_reason"].get("matched")
    by_id = bool(output_ids) and output_ids[-1] in sampling.stop_token_ids
    return matched if isinstance(matched, str) and matched in sampling.stop and not by_id else None


def _routes(meta: Mapping[str, Any], shape: RouteShape, rows: int) -> np.ndarray | None:
    encoded = meta.get("routed_experts")
    if not encoded:
        return None
    try:
        raw = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
        every_layer = raw.reshape(rows, shape.layers, shape.top_k)
    except (ValueError, binascii.Error) as odd:
        raise BrokenContract(
            f"routed_experts are not [{rows} tokens, {shape.layers} layers, {shape.top_k} experts]",
            why=str(odd),
        ) from odd
    return every_layer[:, list(shape.moe_layers)].astype(np.int16)


def _spans(meta: Mapping[str, Any], version: int | None) -> list[WeightSpan]:
    """Spans by output token; a server without spans names one version, that of the end."""
    spans = [
        (read_version(span["version"]), int(span["start"])) for span in meta.get("weight_versions") or ()
    ]
    last = read_version(meta.get("weight_version"))
    found = spans or [(last, 0)]
    return [(version if known is None else known, start) for known, start in found]  # type: ignore[misc]


def read_version(text: Any) -> int | None:
    """A weight version that we gave; None for a name that a server began with."""
    return int(text) if isinstance(text, str) and text.isdigit() else None


def _spec_info(meta: Mapping[str, Any]) -> SpecInfo | None:
    """Counters of speculative decoding. A histogram h says that h[k] steps accepted k guesses in a row."""
    steps = meta.get("spec_verify_ct")
    if not steps:
        return None
    accepted = meta.get("spec_num_correct_drafts", meta.get("spec_accepted_drafts", 0))
    guessed = meta.get("spec_num_proposed_drafts", meta.get("spec_proposed_drafts", 0))
    histogram = list(meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram") or ())
    reached = [sum(histogram[depth:]) for depth in range(len(histogram))]
    return SpecInfo(int(accepted), int(guessed), int(steps), reached[:-1], reached[1:])
