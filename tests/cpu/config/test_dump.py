"""A resolved run file as TOML that resolves to itself, and as JSON that reads back whole."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from miles.config import (
    RunConfig,
    config_hash,
    dump_toml,
    fields,
    from_json,
    json_schema,
    parse_flags,
    resolve,
    shipped_names,
    to_json,
)

FLAGS = ["--rollout-stop", 'quote " and \\ slash', "ünïcode \U0001f600", "--clip-grad", "1.5e-07"]
FLAGS += [
    "--apply-chat-template",
    "--apply-chat-template-kwargs",
    '{"enable_thinking": false, "a key": [1, "x"]}',
    "--sglang-tp-size",
    "2",
]


@pytest.mark.parametrize("profile", ["quickstart", "qwen3-moe-fp8"])
def test_the_toml_text_resolves_to_the_same_configuration(profile: str, tmp_path: Path) -> None:
    resolved = resolve(profile, flags=parse_flags(FLAGS))
    for defaults in (False, True):
        path = tmp_path / "config.toml"
        path.write_text(dump_toml(resolved, defaults=defaults))
        again = resolve(run_file=path)
        assert again.config == resolved.config
        assert {key for key in again.origins if again.is_explicit(key)} == {
            key for key in resolved.origins if resolved.is_explicit(key)
        }


def test_the_toml_text_names_the_origin_of_every_value() -> None:
    text = dump_toml(resolve("quickstart", flags=parse_flags(["--lr", "5e-7"])))
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if "=" in line}
    assert lines["lr"].split() == ["lr", "=", "5e-7", "#", "--lr"]
    assert lines["num_rollout"].endswith(f"# {resolve('quickstart').origin('rollout.num_rollout')}")
    assert "derived: four knobs" in lines["# global_batch_size"]
    assert "# seed" not in lines
    assert "# seed = 1234" in dump_toml(resolve("quickstart"), defaults=True)


def test_a_changed_value_moves_what_was_derived_from_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump_toml(resolve("quickstart")))
    changed = resolve(run_file=path, sets=["rollout.rollout_batch_size=16"])
    assert changed.config.training.global_batch_size == 128


@pytest.mark.parametrize("profile", [*shipped_names(), None])
def test_json_reads_back_whole(profile: str | None) -> None:
    resolved = resolve(profile, flags=parse_flags(FLAGS)).derive("run.threads", 1, "small model")
    again = from_json(to_json(resolved))
    assert again == resolved
    assert str(again.origin("run.threads")) == "derived: small model"


def test_the_hash_is_of_values_not_of_their_origins() -> None:
    by_flag = resolve("quickstart", flags=parse_flags(["--lr", "0.1"])).config
    by_set = resolve("quickstart", sets=["optimizer.lr=0.1"]).config
    assert config_hash(by_flag) == config_hash(by_set)
    assert config_hash(by_flag) != config_hash(resolve("quickstart").config)


def test_numbers_read_back_as_the_same_float() -> None:
    from miles.config.toml_text import literal

    for value in (4e-4, 1e-6, 5e-7, 0.1, 1.0, 1 / 3, 1.2345678901234567e-5, 1e22, 0.0, -2e-9):
        assert tomllib.loads(f"x = {literal(value)}")["x"] == value
    assert [literal(value) for value in (4e-4, 1e-6, 0.28, 1.0)] == ["4e-4", "1e-6", "0.28", "1.0"]


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    for field in fields():
        section = RunConfig.model_fields[field.section].annotation
        assert section is not None
        entry = schema["$defs"][section.__name__]["properties"][field.name]
        assert entry["description"] == field.help
