"""The sampling side of the ring: an engine, the reward and the evaluation sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from miles.data.hooks import Hook
from miles.data.sample import Sample
from miles.data.source import PromptSource
from miles.errors import RunError
from miles.orchestration.reward_shaping import Shaping
from miles.rollout.collect import CollectSettings, Generate, Group, Score, collect
from miles.rollout.custom import Surroundings, generate_group_with
from miles.rollout.engine import GenerationClient
from miles.rollout.generate import EVAL_ROLLOUT_ID, GenerationSettings, generate_group
from miles.rollout.served_teacher import ServedTeachers
from miles.rollout.statistics import rollout_metrics

REWARD = "rollout/raw_reward"
CustomGeneration = tuple[Hook, Surroundings]
"""The user's generation function, and what its `args` are made of."""
SPECULATIVE_STEPS = "sglang.speculative_num_steps"
BREAK_EVEN = {
    "perf/spec_tokens_per_sec": "spec_tokens_per_second",
    "perf/plain_tokens_per_sec": "plain_tokens_per_second",
    "perf/spec_speedup": "spec_speedup",
}
"""Metrics by the engine's own names for them."""


@dataclass(frozen=True)
class EvalSet:
    """One held-out set and how it is sampled. `greedy` asks for greedy accuracy as well."""

    name: str
    source: PromptSource
    samples_per_prompt: int
    sampled: GenerationSettings
    greedy: GenerationSettings | None


@dataclass(frozen=True)
class StepRollout:
    """The samples of one step, in group order, and the metrics of drawing them."""

    samples: list[Sample]
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutWorker:
    """Owns an engine and the prompt source of the run."""

    def __init__(
        self,
        engine: GenerationClient,
        prompts: PromptSource,
        score: Score,
        detokenize: Callable[[list[int]], str],
        generation: GenerationSettings,
        settings: CollectSettings,
        eval_sets: Sequence[EvalSet] = (),
        eval_score: Score | None = None,
        eval_reward_key: str | None = None,
        custom: CustomGeneration | None = None,
        shaping: Shaping | None = None,
        teachers: ServedTeachers | None = None,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self._score = score
        self._detokenize = detokenize
        self._generation = generation
        self._most_steps = generation.speculative_num_steps
        self._settings = settings
        self._eval_sets = tuple(eval_sets)
        self._eval_score = eval_score or score
        self._eval_reward_key = eval_reward_key
        self._custom = custom
        self._shaping = shaping
        self._teachers = teachers
        self.step = 0
        """The one whose samples were drawn last."""

    async def collect(self, step: int) -> StepRollout:
        """Draw, generate, score and filter the prompt groups of one step."""
        started = time.perf_counter()
        self.step = step
        rollout = await collect(
            self.engine,
            self._draw,
            self._generate(self._generation, step),
            self._score,
            self._settings,
        )
        self.prompts.put_back(rollout.unused)
        return await self._complete(rollout.groups, rollout.metrics, started)

    async def _complete(self, groups: list[Group], metrics: dict[str, float], started: float) -> StepRollout:
        """What a step is given of finished groups. `started`: when sampling them began, in seconds."""
        self.prompts.lengths.observe(groups)
        if self._shaping is not None:
            await self._shaping.filter(groups)
        samples = _with_reward(groups)
        shaped = {} if self._shaping is None else await self._shaping.shape(samples)
        if self._teachers is not None:
            asked = time.perf_counter()
            await self._teachers.advise(samples)
            shaped["perf/teacher_log_probs_time"] = time.perf_counter() - asked
        seconds = time.perf_counter() - started
        generated = sum(sample.response_length for sample in samples)
        speed = {"perf/rollout_time": seconds, "perf/rollout_tokens_per_sec": generated / seconds}
        speed |= await self._break_even()
        return StepRollout(samples, metrics | shaped | self._row_problems() | speed)

    def _draw(self, count: int) -> list[Group]:
        """The next groups; what is likely to take long is begun first."""
        return self.prompts.lengths.longest_first(self.prompts.next_groups(count))

    async def evaluate(self) -> dict[str, float]:
        """Accuracy on every held-out set, under the same random numbers at every evaluation."""
        metrics: dict[str, float] = {}
        for held_out in self._eval_sets:
            sampled = await self._evaluate_one(held_out, held_out.sampled, held_out.samples_per_prompt)
            metrics |= _accuracy(f"eval/{held_out.name}", sampled, self._eval_reward_key)
            if held_out.greedy is not None:
                greedy = await self._evaluate_one(held_out, held_out.greedy, 1)
                greedy_metrics = rollout_metrics(greedy, self._eval_reward_key)
                metrics[f"eval/{held_out.name}-greedy"] = greedy_metrics[REWARD]
        return metrics

    async def _evaluate_one(self, held_out: EvalSet, generation: GenerationSettings, n: int) -> list[Group]:
        groups = [
            [prompt.sample(index=g * n + i, group_index=g) for i in range(n)]
            for g, prompt in enumerate(held_out.source.prompts())
        ]
        wanted = CollectSettings(rollout_batch_size=len(groups), over_sampling_batch_size=len(groups))
        steps = self._generation.speculative_num_steps
        generate = self._generate(replace(generation, speculative_num_steps=steps), EVAL_ROLLOUT_ID)
        rollout = await collect(self.engine, lambda _: groups, generate, self._eval_score, wanted)
        return rollout.groups

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        """Change live settings of sampling, given under their dotted config keys; raises RunError."""
        generation = self._generation
        for key, value in patch.items():
            most = self._most_steps
            if key != SPECULATIVE_STEPS or most is None:
                raise RunError(f"{key} cannot be changed in this run", why="its engine does not speculate")
            if value != int(value) or not 0 <= value <= most:
                raise RunError(
                    f"{key} cannot be {value:g}",
                    why=f"the engine was made for 0 (plain decoding) to {most} steps",
                    fix="resume with another --sglang-speculative-num-steps",
                )
            generation = replace(generation, speculative_num_steps=int(value))
        self._generation = generation

    async def _break_even(self) -> dict[str, float]:
        """What speculation gains, as a mean over the engines that measured it."""
        if not self._generation.speculative_num_steps:
            return {}
        engines = [measured for measured in await self.engine.measurements() if "spec_speedup" in measured]
        if not engines:
            return {}
        return {metric: fmean(engine[name] for engine in engines) for metric, name in BREAK_EVEN.items()}

    def _generate(self, generation: GenerationSettings, rollout_id: int) -> Generate:
        async def generate(group: Sequence[Sample]) -> Group:
            if self._custom is None:
                return await generate_group(self.engine, group, generation, self._detokenize, rollout_id)
            hook, surroundings = self._custom
            return await generate_group_with(hook, group, surroundings, generation, rollout_id)

        return generate

    def _row_problems(self) -> dict[str, float]:
        problems = self.prompts.problems
        return {"rollout/bad_rows": float(len(problems))} if problems else {}


def _with_reward(groups: list[Group]) -> list[Sample]:
    """Samples that can be trained on: a reward that could not be computed is not a reward of zero."""
    judged = [sample for group in groups for sample in group if sample.reward is not None]
    if not judged:
        raise RunError(
            "no sample of the step has a reward",
            why="the reward function gave None or NaN for every one of them",
            fix="print in it what it is given and what it returns",
        )
    return judged


def _accuracy(name: str, groups: list[Group], reward_key: str | None) -> dict[str, float]:
    metrics = rollout_metrics(groups, reward_key)
    return {name: metrics[REWARD], f"{name}-truncated_ratio": metrics["rollout/truncated_ratio"]}
