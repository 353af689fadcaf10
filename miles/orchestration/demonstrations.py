"""The sampling side of supervised fine-tuning: nothing is sampled, the label is the response."""

from __future__ import annotations

from collections.abc import Mapping

from miles.data.sample import Sample, SampleStatus
from miles.data.source import PromptSource
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import DataError, RunError
from miles.orchestration.rollout_worker import StepRollout


class DemonstrationWorker:
    """Turns rows of prompt and label into finished samples, ended by the stop token."""

    def __init__(
        self, prompts: PromptSource, tokenizer: CheckpointTokenizer, stop_token_id: int, batch_size: int
    ) -> None:
        self.prompts = prompts
        self._tokenizer = tokenizer
        self._stop_token_id = stop_token_id
        self._batch_size = batch_size

    async def collect(self, step: int) -> StepRollout:
        """The demonstrations of one step."""
        groups = self.prompts.next_groups(self._batch_size)
        return StepRollout([self._finished(sample) for group in groups for sample in group])

    async def evaluate(self) -> dict[str, float]:
        """Nothing is measured: no engine runs."""
        return {}

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        """There is nothing to set. Raises RunError."""
        raise RunError(f"{', '.join(patch)} cannot be changed in this run", why="no engine runs")

    def _finished(self, sample: Sample) -> Sample:
        if sample.label is None:
            raise DataError("a demonstration without a response", fix="name its column with --label-key")
        response = [*self._tokenizer.encode(sample.label, add_special_tokens=False), self._stop_token_id]
        sample.tokens = [*sample.tokens, *response]
        sample.response = sample.label
        sample.response_length = len(response)
        sample.status = SampleStatus.COMPLETED
        return sample
