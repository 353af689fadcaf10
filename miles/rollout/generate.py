"""Single-turn generation: samples that hold a prompt, or a response that was cut off, go in; samples that
hold a response come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from miles.data.sample import Sample, SampleStatus, SpecInfo, validate_samples
from miles.data.turns import Reading, continued, last_turn, spoken, without_loss_so_far
from miles.rollout.engine import (
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    GenerationClient,
    RequestRefused,
    SamplingParams,
)

Detokenize = Callable[[list[int]], str]

STATUS_OF: dict[FinishReason, SampleStatus] = {
    "stop": SampleStatus.COMPLETED,
    "length": SampleStatus.TRUNCATED,
    "abort": SampleStatus.ABORTED,
}

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_MEMBER_BITS, _GROUP_BITS, _ROLLOUT_BITS = 14, 24, 25
EVAL_ROLLOUT_ID = (1 << _ROLLOUT_BITS) - 1
"""The rollout id that evaluations draw under: the same numbers at every evaluation, so that two evaluations
differ by their policy only, and numbers that no training rollout draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """`max_context_len` caps prompt and response together; `sampling.max_new_tokens` caps the response, over
    all of its turns. `mask_off_policy`: what older weights sampled of a continued response is not trained on.
    `speculative_num_steps`: tokens to guess in a row; None: as the engine does.
    """

    sampling: SamplingParams
    max_context_len: int
    return_routed_experts: bool = True
    mask_off_policy: bool = False
    speculative_num_steps: int | None = None


def sample_key(rollout_id: int, group_index: int, member: int) -> int:
    """The key of a sample's random stream: distinct for every (rollout, group, member) and the same after a
    resume. Bit fields: 25 for the rollout, 24 for the group, 14 for the member of the group.
    """
    assert 0 <= rollout_id < 1 << _ROLLOUT_BITS, f"rollout_id = {rollout_id} does not fit"
    assert 0 <= group_index < 1 << _GROUP_BITS, f"group_index = {group_index} does not fit"
    assert 0 <= member < 1 << _MEMBER_BITS, f"member = {member} does not fit"
    return (rollout_id << _GROUP_BITS | group_index) << _MEMBER_BITS | member


async def generate_group(
    engine: GenerationClient,
    group: Sequence[Sample],
    settings: GenerationSettings,
    detokenize: Detokenize,
    rollout_id: int,
) -> list[Sample]:
    """Generate one response for every sample of a prompt group; the given samples are left as they are.

    Args:
        group: samples with the same `group_index`. Pending ones, whose `tokens` are the prompt ids, are
            generated, aborted ones are continued, finished ones stay as they are.
        detokenize: response ids to text, special tokens treated as the reward function wants them.
        rollout_id: the step the samples are drawn for; part of their random streams.

    Raises:
        RequestRefused: a prompt leaves no room for a response, or the engine refuses the request.
    """
    missing = {i: resumed(sample, settings) for i, sample in enumerate(group) if unfinished(sample)}
    requests = [request_for(s, member, settings, rollout_id) for member, s in missing.items()]
    outputs = await engine.generate(requests)
    # One conversion for the whole group; each sample gets its own dict, with its own limits.
    sampling = {name: getattr(settings.sampling, name) for name in _SAMPLING}
    filled = list(group)
    for (member, sample), request, output in zip(missing.items(), requests, outputs, strict=True):
        own = dict(sampling)
        if request.sampling is not settings.sampling:
            own |= {name: getattr(request.sampling, name) for name in ("max_new_tokens", "min_new_tokens")}
        filled[member] = _filled(sample, own, output, detokenize)
    validate_samples([filled[member] for member in missing])
    return filled


def unfinished(sample: Sample) -> bool:
    """Whether the sample's response has yet to begin, or was cut off in the middle."""
    return sample.status in (SampleStatus.PENDING, SampleStatus.ABORTED)


def resumed(sample: Sample, settings: GenerationSettings) -> Sample:
    """The sample as it enters a rollout: what an earlier one sampled loses its loss where that is wanted."""
    if settings.mask_off_policy and sample.status is SampleStatus.ABORTED:
        return without_loss_so_far(sample)
    return sample


def request_for(
    sample: Sample, member: int, settings: GenerationSettings, rollout_id: int
) -> GenerateRequest:
    """Ask for what is missing of the sample's response; a continued one draws from positions of its own.

    Raises:
        RequestRefused: prompt and response so far fill the context.
    """
    assert sample.group_index is not None, "a sample belongs to a prompt group"
    room = settings.max_context_len - len(sample.tokens)
    if room < 1:
        raise RequestRefused(
            f"a prompt of {len(sample.tokens)} tokens leaves no room for a response",
            where=f"sample {sample.index} (group {sample.group_index})",
            why=f"the context holds {settings.max_context_len} tokens",
            fix="raise --rollout-max-context-len, or drop long prompts with --rollout-max-prompt-len",
        )
    sampling = settings.sampling
    room = min(room, sampling.max_new_tokens - sample.response_length)
    wanted = max(sampling.min_new_tokens - sample.response_length, 0)
    if (room, wanted) != (sampling.max_new_tokens, sampling.min_new_tokens):
        sampling = replace(sampling, max_new_tokens=room, min_new_tokens=min(wanted, room))
    return GenerateRequest(
        input_ids=sample.tokens,
        sampling=sampling,
        sample_key=sample_key(rollout_id, sample.group_index, member),
        group=sample.group_index,
        return_routed_experts=settings.return_routed_experts,
        speculative_num_steps=settings.speculative_num_steps,
        response_so_far=len(last_turn(sample)) if sample.status is SampleStatus.ABORTED else 0,
    )


def fill(sample: Sample, sampling: dict[str, Any], output: GenerateOutput, detokenize: Detokenize) -> Sample:
    """A copy of the sample with the engine's answer behind what it held."""
    filled = _filled(sample, sampling, output, detokenize)
    filled.validate()
    return filled


def _filled(
    sample: Sample, sampling: dict[str, Any], output: GenerateOutput, detokenize: Detokenize
) -> Sample:
    filled = continued(
        sample,
        Reading(
            token_ids=output.output_ids,
            log_probs=output.log_probs,
            routes=output.routed_experts,
            weight_versions=output.weight_versions,
        ),
    )
    filled.status, filled.stop_string = STATUS_OF[output.finish_reason], output.stop_string
    filled.response = detokenize(spoken(filled, filled.tokens[filled.prompt_length :]))
    filled.sampling = sampling
    if sample.cached_tokens is None:
        filled.cached_tokens = output.cached_tokens
    if output.spec_info is not None:
        filled.spec_info = (sample.spec_info or SpecInfo()).plus(output.spec_info)
    return filled
