"""What the run file asks to be done with accepted groups before they are trained on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from miles.config import parse_flags, resolve
from miles.data.hooks import HookError
from miles.data.sample import Sample
from miles.orchestration.reward_shaping import Shaping

MINE = """
def centred(args, samples):
    raw = [sample.reward for sample in samples]
    return raw, [reward - max(raw) for reward in raw]

async def doubled(args, samples):
    return [2 * sample.reward for sample in samples]

def short(args, samples):
    return [1.0]

def only_first(args, groups):
    for group in groups:
        for sample in group[1:]:
            sample.remove_sample = True
"""


def shaping(tmp_path: Path, line: str) -> Shaping:
    path = tmp_path / "my_shaping.py"
    path.write_text(MINE)
    config = resolve(flags=parse_flags(line.replace("MINE", str(path)).split())).config
    return Shaping.of(config, SimpleNamespace(max_response_len=8))  # type: ignore[arg-type]


def samples() -> list[Sample]:
    return [Sample("?", reward=reward, response_length=length) for reward, length in ((1.0, 8), (3.0, 2))]


def shaped(tmp_path: Path, line: str) -> tuple[list[float | None], dict[str, float]]:
    given = samples()
    metrics = asyncio.run(shaping(tmp_path, line).shape(given))
    return [sample.shaped_reward for sample in given], metrics


def test_nothing_is_shaped_where_nothing_is_asked_for(tmp_path: Path) -> None:
    assert shaped(tmp_path, "") == ([None, None], {})


def test_the_penalty_counts_from_the_longest_response(tmp_path: Path) -> None:
    rewards, metrics = shaped(tmp_path, "--overlong-buffer-len 4 --overlong-penalty-factor 0.5")
    assert rewards == [0.5, 3.0]
    assert metrics["rollout/overlong_frac"] == 0.5


def test_a_function_makes_all_of_the_reward(tmp_path: Path) -> None:
    line = "--custom-reward-post-process-path MINE:centred"
    assert shaped(tmp_path, line) == ([-2.0, 0.0], {"rollout/raw_reward": 2.0})
    assert shaped(tmp_path, line.replace("centred", "doubled")) == ([2.0, 6.0], {})


def test_a_reward_for_each_sample_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="for 2 samples") as refusal:
        shaped(tmp_path, "--custom-reward-post-process-path MINE:short")
    assert "my_shaping.py" in refusal.value.where


def test_a_filter_takes_samples_out_of_the_loss(tmp_path: Path) -> None:
    groups = [samples(), samples()]
    asyncio.run(shaping(tmp_path, "--rollout-sample-filter-path MINE:only_first").filter(groups))
    assert [[sample.remove_sample for sample in group] for group in groups] == [[False, True]] * 2
