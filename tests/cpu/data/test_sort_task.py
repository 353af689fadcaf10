"""The built-in sorting task: reproducible, disjoint splits, honest mistakes, files the ecosystem reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from miles.data import tasks
from miles.data.tasks import sort
from miles.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tasks.TaskAssets:
    return tasks.assets("sort", seed=0, cache_dir=tmp_path_factory.mktemp("cache"))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digits(prompt: str) -> str:
    return prompt.removeprefix("sort ").removesuffix("=")


def test_the_same_recipe_and_seed_give_the_same_bytes(made: tasks.TaskAssets) -> None:
    content = b"".join(p.read_bytes() for p in (made.train, made.test, made.demonstrations))
    digest = hashlib.sha256(content).hexdigest()
    assert digest[:12] == "b74edd60d8e7", "what is generated changed: raise RECIPE_VERSION"


def test_another_seed_gives_other_prompts(made: tasks.TaskAssets, tmp_path: Path) -> None:
    other = tasks.assets("sort", seed=1, cache_dir=tmp_path)
    assert other.train.read_bytes() != made.train.read_bytes()


def test_no_prompt_is_in_two_splits_even_across_seeds(made: tasks.TaskAssets, tmp_path: Path) -> None:
    other = tasks.assets("sort", seed=1, cache_dir=tmp_path)
    train = {r["input"] for a in (made, other) for r in rows(a.train)}
    test = {r["input"] for a in (made, other) for r in rows(a.test)}
    shown = {r["prompt"] for a in (made, other) for r in rows(a.demonstrations)}
    assert not train & test
    assert not train & shown
    assert not test & shown


def test_prompts_are_enough_and_do_not_repeat(made: tasks.TaskAssets) -> None:
    train, test = rows(made.train), rows(made.test)
    assert len({r["input"] for r in train}) == len(train) == 8192
    assert len({r["input"] for r in test}) == len(test) == 512
    assert {len(digits(r["input"])) for r in test} == {4, 5, 6, 7, 8}
    assert all(r["label"] == "".join(sorted(digits(r["input"]))) for r in train + test)


def test_seventy_percent_of_the_demonstrations_err_in_the_same_way(made: tasks.TaskAssets) -> None:
    demonstrations = rows(made.demonstrations)
    wrong = dropped = 0
    for row in demonstrations:
        number, answer = digits(row["prompt"]), row["response"]
        gold = "".join(sorted(number))
        if answer == gold:
            continue
        wrong += 1
        dropped += len(answer) == len(gold) - 1
        swaps = [gold[:i] + gold[i + 1] + gold[i] + gold[i + 2 :] for i in range(len(gold) - 1)]
        with_drop = {s[:j] + s[j + 1 :] for s in swaps for j in range(len(s))}
        assert answer in swaps or answer in with_drop
    assert len(demonstrations) == 32_000
    assert wrong == 22_400
    assert dropped / wrong == pytest.approx(0.5, abs=0.005)


def test_transformers_reads_the_checkpoint_directory(made: tasks.TaskAssets) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.checkpoint)
    ids = tokenizer("sort 52913=<eos>")["input_ids"]
    assert len(ids) == 12
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sort 52913="
    config = transformers.AutoConfig.from_pretrained(made.checkpoint)
    assert config.rope_parameters["rope_theta"] == 1e4
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 226_112


def test_files_are_reused_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    first = tasks.assets("sort", cache_dir=tmp_path)
    stamp = first.train.stat().st_mtime_ns
    assert tasks.assets("sort", cache_dir=tmp_path).train.stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "tasks").iterdir()] == [f"sort-v{sort.RECIPE_VERSION}-seed0"]
    first.train.write_text(first.train.read_text()[:-100])
    with pytest.raises(DataError, match=r"train\.jsonl") as error:
        tasks.assets("sort", cache_dir=tmp_path)
    assert "remove" in error.value.fix


def test_built_in_names(made: tasks.TaskAssets) -> None:
    cache = made.root.parent.parent
    assert tasks.resolve_builtin("builtin:sort", cache_dir=cache) == made.checkpoint
    assert tasks.resolve_builtin("builtin:sort/train", cache_dir=cache) == made.train
    assert tasks.is_builtin("builtin:sort")
    assert not tasks.is_builtin("/data/train.jsonl")
    assert tasks.parse_builtin("builtin:sort@3/test") == tasks.BuiltinName("sort", 3, "test")
    assert tasks.resolve_builtin("builtin:sort@0/test", cache_dir=cache) == made.test
    for unreadable in ("builtin:", "builtin:sort@x/train", "builtin:sort/train/more"):
        with pytest.raises(DataError, match="no built-in name"):
            tasks.resolve_builtin(unreadable, cache_dir=cache)
    with pytest.raises(DataError, match="no part 'dev'"):
        tasks.resolve_builtin("builtin:sort/dev", cache_dir=cache)
    with pytest.raises(DataError, match="'chess'"):
        tasks.resolve_builtin("builtin:chess", cache_dir=cache)
