"""`miles profiles`: data on stdout, talk on stderr, JSON for each verb, exit code 2 for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.config import from_json, resolve, shipped_names
from miles_cli.main import run


def test_ls_names_every_profile_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "ls"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == list(shipped_names())
    assert "miles profiles show" in printed.err
    assert run(["profiles", "ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    recipes = {row["name"] for row in rows if not row["layer"]}
    assert {"quickstart", "qwen3-moe-fp8"} <= recipes and not {"base/grpo", "models/qwen3-4b"} & recipes
    assert all(row["description"] for row in rows)


def test_show_prints_values_with_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "show", "quickstart"]) == 0
    out = capsys.readouterr().out
    assert "# profiles/base/grpo.toml:" in out
    assert "# seed" not in out
    assert run(["profiles", "show", "quickstart", "--all"]) == 0
    assert "# seed = 1234" in capsys.readouterr().out
    assert run(["profiles", "show", "quickstart", "--json"]) == 0
    assert from_json(capsys.readouterr().out) == resolve("quickstart")


def test_show_reads_a_file_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.toml"
    path.write_text('extends = ["quickstart"]\n[optimizer]\nlr = 1e-3\n')
    assert run(["profiles", "show", str(path)]) == 0
    assert f"# {path}:3" in capsys.readouterr().out


def test_validate_checks_all_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles", "validate"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"ok  {name}" for name in shipped_names()]


def test_validate_names_every_mistake_of_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("[optimizer]\nlrr = 1\n")
    (tmp_path / "b.toml").write_text("[optimizer]\nlr = true\n")
    files = [str(tmp_path / "a.toml"), str(tmp_path / "b.toml")]
    assert run(["profiles", "validate", *files]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{files[0]}:2: unknown key optimizer.lrr\n  fix: did you mean optimizer.lr?" in printed.err
    assert f"{files[1]}:2: optimizer.lr must be a number" in printed.err
    assert run(["profiles", "validate", *files, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [problem["where"] for problem in answer["error"]["problems"]] == [f"{file}:2" for file in files]


def test_a_name_with_a_typo_is_refused_without_a_flag_that_nobody_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in ("show", "validate", "explain"):
        assert run(["profiles", verb, "quickstrat"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: no profile is named 'quickstrat'") and "quickstart" in said
    assert run(["train", "--profile", "quickstrat", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: --profile: no profile is named")
    assert run(["train", "--config", "nowhere.toml", "--dry-run"]) == 2
    assert "miles init" in capsys.readouterr().err
