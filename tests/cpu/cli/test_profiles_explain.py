"""`miles profiles explain`, `diff`, `schema`: where a value comes from, what differs, what may be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.config import fields, parse_flags, resolve, to_json
from miles.record import RunLayout
from miles_cli.main import run
from miles_cli.render.config_text import differences

Output = pytest.CaptureFixture[str]


@pytest.fixture
def past_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the quickstart with another learning rate."""
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path / "runs"))
    layout = RunLayout(tmp_path / "runs" / "quickstart-20260101-000000")
    layout.make()
    layout.meta.write_text("{}")
    layout.config_json.write_text(to_json(resolve("quickstart", flags=parse_flags(["--lr", "2e-4"]))))
    return layout.root


@pytest.mark.parametrize("key", ["optimizer.lr", "lr", "--lr"])
def test_a_setting_is_explained_by_key_name_or_flag(key: str, capsys: Output) -> None:
    assert run(["profiles", "explain", "quickstart", key]) == 0
    out = capsys.readouterr().out
    assert out.startswith("optimizer.lr = 4e-4\n    from profiles/quickstart.toml:28\n")
    assert "Peak learning rate." in out and "--lr (float), default 1e-6" in out


@pytest.mark.parametrize(
    ("key", "origin"),
    [
        ("run.seed", "    default"),
        ("algorithm.eps_clip", "    from profiles/base/grpo.toml:7"),
        ("training.global_batch_size", "    derived: four knobs"),
    ],
)
def test_every_kind_of_origin_is_told(key: str, origin: str, capsys: Output) -> None:
    assert run(["profiles", "explain", "quickstart", key]) == 0
    assert origin in capsys.readouterr().out


def test_a_section_or_everything_can_be_explained(capsys: Output) -> None:
    assert run(["profiles", "explain", "quickstart", "reward", "--json"]) == 0
    assert {row["key"].split(".")[0] for row in json.loads(capsys.readouterr().out)} == {"reward"}
    assert run(["profiles", "explain", "quickstart", "--all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in rows] == [field.dotted for field in fields()]
    assert all(row["help"] for row in rows)
    assert run(["profiles", "explain", "quickstart", "--json"]) == 0
    assert "default" not in {row["origin"] for row in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("key", ["eps_clip_hgh", "--eps-clip-hgh", "algorithm.eps_clip_hgh"])
def test_a_mistyped_key_brings_the_one_that_was_meant(key: str, capsys: Output) -> None:
    assert run(["profiles", "explain", "quickstart", key]) == 2
    assert "eps" in capsys.readouterr().err.partition("did you mean")[2]


def test_a_run_is_explained_by_its_id_and_shows_its_flags(past_run: Path, capsys: Output) -> None:
    for reference in (str(past_run), past_run.name, "quickstart-2026"):
        assert run(["profiles", "explain", reference, "lr"]) == 0
        assert capsys.readouterr().out.startswith("optimizer.lr = 2e-4\n    from --lr\n")


def test_diff_names_both_values_and_both_places(past_run: Path, capsys: Output) -> None:
    assert run(["profiles", "diff", "quickstart", str(past_run)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "optimizer.lr"
    assert "4e-4  (profiles/quickstart.toml:28)" in out and "2e-4  (--lr)" in out
    assert len(out.splitlines()) == 3
    assert run(["profiles", "diff", "quickstart", str(past_run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["differences"]
    assert row["right"] == {"value": 2e-4, "origin": "--lr"}


def test_diff_of_a_thing_with_itself_is_empty(capsys: Output) -> None:
    assert run(["profiles", "diff", "quickstart", "quickstart"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "No setting differs.\n")


def test_diff_sees_settings_that_only_one_side_has() -> None:
    left, right = resolve("quickstart"), resolve("quickstart", sets=["sglang.mem_fraction_static=0.6"])
    (found,) = differences(left, right)
    assert (found.key, found.left, found.right) == ("sglang.mem_fraction_static", None, 0.6)


def test_what_is_neither_profile_nor_run_is_refused_with_the_nearest(past_run: Path, capsys: Output) -> None:
    assert run(["profiles", "explain", "quickstrt"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_the_schema_describes_every_setting(capsys: Output) -> None:
    assert run(["profiles", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for field in fields():
        section = schema["properties"][field.section]["$ref"].rpartition("/")[2]
        assert schema["$defs"][section]["properties"][field.name]["description"] == field.help
    assert schema["additionalProperties"] is False and "extends" in schema["properties"]
