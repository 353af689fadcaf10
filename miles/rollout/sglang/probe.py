"""What a server must be able to do, asked of it with two short requests before it serves."""

from __future__ import annotations

import math

from miles.errors import Unavailable
from miles.rollout.engine import GenerateOutput, GenerateRequest, RequestRefused, SamplingParams
from miles.rollout.sglang.contract import BrokenContract
from miles.rollout.sglang.engine import SglangEngine

PROMPT = (0, 1, 2)
"""Ids that every vocabulary has; what they say does not matter."""
NEW_TOKENS = 4


async def probe(
    engine: SglangEngine, version: int, speculative: bool = False, stop: tuple[str, ...] = ()
) -> None:
    """Prove log-probs, routes, the stop token, the weight version, that it takes these stop strings, and
    where it guesses, its counters.

    Raises: Unavailable, naming what the server cannot do and how to mend it.
    """
    free = await _ask(engine, SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0))
    _require_answer(engine, free, NEW_TOKENS)
    if free.weight_versions != [(version, 0)]:
        raise _cannot(engine, f"it names weight versions {free.weight_versions}, {version} was handed over")
    if speculative and free.spec_info is None:
        raise _cannot(
            engine, "it guesses ahead and does not count its guesses", "install sglang 0.5.7 or newer"
        )
    first = free.output_ids[0]
    stopped = await _ask(
        engine, SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=(first,))
    )
    if stopped.finish_reason != "stop" or stopped.output_ids != [first]:
        raise _cannot(
            engine, f"told to stop at token {first} it gave {stopped.output_ids} ({stopped.finish_reason})"
        )
    if stop:
        await _ask(engine, SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, stop=stop))


def _require_answer(engine: SglangEngine, output: GenerateOutput, length: int) -> None:
    if len(output.output_ids) != length or output.finish_reason != "length":
        raise _cannot(
            engine, f"asked for {length} tokens it gave {output.output_ids} ({output.finish_reason})"
        )
    if not all(math.isfinite(log_prob) and log_prob <= 1e-4 for log_prob in output.log_probs.tolist()):
        raise _cannot(engine, f"its log-probs are {output.log_probs.tolist()}")


async def _ask(engine: SglangEngine, sampling: SamplingParams) -> GenerateOutput:
    try:
        (output,) = await engine.generate(
            [GenerateRequest(input_ids=PROMPT, sampling=sampling, sample_key=0)]
        )
    except (BrokenContract, RequestRefused) as broken:
        raise _cannot(engine, broken.what, broken.why) from broken
    return output


def _cannot(engine: SglangEngine, what: str, why: str = "") -> Unavailable:
    return Unavailable(
        f"the SGLang server cannot be trained with: {what}",
        where=engine.http.url,
        why=why or "the capability probe before the first rollout failed",
        fix="look at the server's version and arguments: GET /server_info shows both",
    )
