"""One look, before the first rollout, at whether the compiled exact kernels keep their promise here.

They need no measuring: every row has an order of its own. A compiler's defect would break that all the same,
and only be found by the first batch. So a decoder of one layer of each kind answers requests in the engine's
own batch, by the decode kernel, and the trainer's kernels read every sequence packed, alone and behind a
shared prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miles.arch import ArchSpec
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.decoder import Decoder
from miles.models.hidden_states import Stages, first_difference, hidden_states, joined
from miles.models.invariance import smallest
from miles.models.logprob import token_log_probs
from miles.models.routing import Router
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.batch import ContinuousBatch
from miles.rollout.native.fused.runner import FusedRunner
from miles.rollout.native.rescore import rescore
from miles.rollout.native.scheduler import Ticket, prefix_key

PROMPTS = (45, 17, 17, 3, 1)
"""Tokens. The second and third are one prompt, read once."""
RESPONSES = (6, 19, 4, 11, 8)
LONGEST = max(map(sum, zip(PROMPTS, RESPONSES, strict=True)))
SLOTS = 4
"""Fewer than requests: one is admitted while others are decoded."""


@torch.inference_mode()
def kernels_part(spec: ArchSpec, numerics: CompiledExactNumerics, decode_library: Path) -> str | None:
    """Where the two sides, or two batches on one side, first give a token other bits; None: nowhere."""
    small = replace(smallest(spec), max_position_embeddings=max(spec.max_position_embeddings, LONGEST))
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(small)
    for name, parameter in decoder.named_parameters():
        scale = 1.0 if name.endswith("norm") else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator)).mul_(scale)
    decoder.use_numerics(numerics)
    sampled = _sample(decoder, numerics, decode_library, generator)
    together = _packed(decoder, [one.tokens for one in sampled])
    starts = np.cumsum([0, *(len(one.tokens) for one in sampled)])
    for one, start in zip(sampled, starts, strict=False):
        mine = {stage: states[start : start + len(one.tokens)] for stage, states in together.items()}
        where = f"in a sequence of {len(one.tokens)} tokens"
        if difference := first_difference(mine, _packed(decoder, [one.tokens])):
            return f"the trainer's {difference.stage} depends on the batch, {where}"
        engines = rescore(decoder, numerics, one.tokens.tolist(), one.prompt, decode_library)
        if difference := first_difference(mine, engines):
            return f"trainer and engine part in {difference.stage}, {where}"
        if not torch.equal(_log_probs(decoder, mine, one), one.log_probs):
            return f"a log-prob drawn in the engine's batch is not the trainer's, {where}"
    if not torch.equal(_shared(decoder, sampled[1:3]), together["final norm"][starts[1] : starts[3]]):
        return "the trainer's attention depends on whether a prompt is shared"
    return None


@dataclass(frozen=True)
class _Sampled:
    """tokens int64 [n], the first `prompt` of them given; log_probs of the others."""

    tokens: Tensor
    prompt: int
    log_probs: Tensor


def _sample(
    decoder: Decoder, numerics: CompiledExactNumerics, library: Path, generator: torch.Generator
) -> list[_Sampled]:
    """Requests as the engine answers them, more than there are slots."""
    spec = decoder.spec
    prompts = [torch.randint(spec.vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]
    prompts[2] = prompts[1]
    runner = FusedRunner(library, spec, SLOTS + 1, LONGEST, numerics)
    runner.decoder = decoder
    batch = ContinuousBatch(runner, SLOTS, LONGEST, LONGEST, SLOTS * LONGEST, seed=0)
    requests = [
        GenerateRequest(
            input_ids=prompt,
            sampling=SamplingParams(max_new_tokens=most),
            sample_key=i,
            group=1 if i in (1, 2) else None,
        )
        for i, (prompt, most) in enumerate(zip(prompts, RESPONSES, strict=True))
    ]
    batch.scheduler.submit([Ticket(asked, None, i, prefix_key(asked)) for i, asked in enumerate(requests)])
    answers = {}
    while batch.busy:
        answers.update({ticket.index: output for ticket, output in batch.step()})
    return [
        _Sampled(
            torch.tensor([*prompt, *answers[i].output_ids]), len(prompt), torch.tensor(answers[i].log_probs)
        )
        for i, prompt in enumerate(prompts)
    ]


def _packed(decoder: Decoder, sequences: list[Tensor]) -> Stages:
    """What the trainer's kernels compute, the sequences one behind the other."""
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    offsets = torch.tensor([0, *(len(sequence) for sequence in sequences)]).cumsum(0)
    attention = decoder.numerics.packed_attention(offsets)
    with hidden_states(decoder) as seen:
        decoder(torch.cat(sequences), positions, attention, Router.decide())
    return joined(seen)


def _shared(decoder: Decoder, samples: list[_Sampled]) -> Tensor:
    """Final hidden states of samples with one prompt, which is read once; sample after sample."""
    prompt = samples[0].prompt
    own = [one.tokens[prompt:] for one in samples]
    positions = [torch.arange(prompt), *(torch.arange(prompt, prompt + len(tokens)) for tokens in own)]
    attention = decoder.numerics.prefix_attention(
        torch.tensor([0, prompt]),
        torch.tensor([0, *(len(tokens) for tokens in own)]).cumsum(0),
        torch.zeros(len(own), dtype=torch.long),
    )
    tokens = torch.cat([samples[0].tokens[:prompt], *own])
    found: Tensor = decoder(tokens, torch.cat(positions), attention, Router.decide())
    first, *rest = found.split([prompt, *(len(tokens) for tokens in own)])
    return torch.cat([part for states in rest for part in (first, states)])


def _log_probs(decoder: Decoder, stages: Stages, one: _Sampled) -> Tensor:
    numerics, rows = decoder.numerics, stages["final norm"][one.prompt - 1 : -1]
    return token_log_probs(
        rows,
        decoder.head_weight,
        one.tokens[one.prompt :],
        linear=numerics.linear,
        log_softmax=numerics.log_softmax,
    )[0]
