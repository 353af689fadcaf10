"""The native engine in `fast`, sharing the weights of the subject's decoder."""

from __future__ import annotations

import asyncio

from decoding.models import Subject
from decoding.workload import GROUP, Clock, Timing, Workload
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.rollout.native.fused import build


class MilesSide:
    """One engine that holds the whole batch."""

    def __init__(self, subject: Subject, workload: Workload, kernel: str) -> None:
        library = None if kernel == "torch" else build.library("c++")
        self.decode_kernel = "torch" if library is None else "fused"
        settings = EngineSettings(
            max_context_len=workload.prompt + workload.response,
            seed=0,
            max_running_requests=workload.batch,
            decode_library=library,
        )
        self.engine = NativeEngine(subject.spec, settings)
        self.workload, self.prompts = workload, workload.prompts(subject.spec.vocab_size)
        asyncio.run(self.engine.share_weights(subject.decoder, version=0))

    def generate(self) -> Timing:
        """Tokens, log-probs and routes of every request."""
        sampling = SamplingParams(max_new_tokens=self.workload.response)
        requests = [
            GenerateRequest(input_ids=prompt, sampling=sampling, sample_key=key, group=key // GROUP)
            for key, prompt in enumerate(self.prompts)
        ]
        return asyncio.run(self._timed(requests))

    async def _timed(self, requests: list[GenerateRequest]) -> Timing:
        with Clock() as clock:
            outputs = await self.engine.generate(requests)
        assert sum(len(output.output_ids) for output in outputs) == self.workload.new_tokens
        return clock.timing
