"""A response that new weights cut off, and what goes on with it under them.

SGLang's own way to do that (`mode: "retract"`) cannot forget the cache while requests wait, and 0.5.20 ends
with an assertion when it is asked to. So a request is aborted, and its continuation is a request of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from miles.rollout.engine import GenerateOutput, GenerateRequest, WeightSpan


def rest_of(request: GenerateRequest, so_far: GenerateOutput) -> GenerateRequest:
    """What is missing of a response that was cut off; it was cut before its longest."""
    sampling, held = request.sampling, len(so_far.output_ids)
    return replace(
        request,
        input_ids=[*request.input_ids, *so_far.output_ids],
        sampling=replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - held,
            min_new_tokens=max(sampling.min_new_tokens - held, 0),
        ),
    )


def joined(older: GenerateOutput, newer: GenerateOutput) -> GenerateOutput:
    """One response of two parts. A row keeps the route that its target's log-prob was computed with."""
    routes = newer.routed_experts
    if routes is None:
        routes = older.routed_experts
    elif older.routed_experts is not None:
        routes = routes.copy()
        routes[: len(older.routed_experts)] = older.routed_experts
    counters = older.spec_info
    if newer.spec_info is not None:
        counters = newer.spec_info if counters is None else counters.plus(newer.spec_info)
    return replace(
        newer,
        output_ids=[*older.output_ids, *newer.output_ids],
        log_probs=np.concatenate([older.log_probs, newer.log_probs]),
        routed_experts=routes,
        weight_versions=_joined_spans(older, newer),
        cached_tokens=older.cached_tokens,
        spec_info=counters,
    )


def _joined_spans(older: GenerateOutput, newer: GenerateOutput) -> list[WeightSpan]:
    spans = list(older.weight_versions)
    for version, start in newer.weight_versions:
        if not spans or spans[-1][0] != version:
            spans.append((version, start + len(older.output_ids)))
    return spans
