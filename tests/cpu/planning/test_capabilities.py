"""capabilities.toml is honest: real settings, each in one state, and what it calls used is read by code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import miles
from miles.config import fields, find_key
from miles.exporters.follow import LIVE
from miles.planning.capabilities import capabilities
from miles.planning.features import KINDS, State, features
from miles.planning.hardware import GENERATIONS

SETTINGS = {field.dotted for field in fields()}
SECTIONS = {field.section for field in fields()}
TABLE = capabilities()
AVAILABLE = [part for part in TABLE.parts.values() if part.available]
USED = TABLE.common.union(*(part.fields | part.gpu_fields for part in AVAILABLE))
LIMITED = TABLE.values.keys() | {s for part in AVAILABLE for s in {**part.values, **part.gpu_values}}

PASSED_ON = "sglang.*"
"""SGLang's own arguments, which its servers take as they are."""

JUDGES = ("rules", "scale.py")
"""Where planning reads settings to judge or to place a run; that alone does not make a setting used."""


def test_only_real_settings_are_named() -> None:
    assert USED - {PASSED_ON} <= SETTINGS, "a part that can run lists its settings one by one"
    assert TABLE.instead.keys() <= SETTINGS
    assert LIMITED <= USED
    for part in TABLE.parts.values():
        sections = {name.partition(".")[0] for name in part.fields if name.endswith(".*")}
        assert sections <= SECTIONS
        assert {name for name in part.fields if not name.endswith(".*")} <= SETTINGS


def test_every_setting_is_either_used_or_listed_as_unsupported() -> None:
    assert SETTINGS - USED - TABLE.instead.keys() == set(), "neither used nor listed as unsupported"
    assert USED & TABLE.instead.keys() == set(), "both used and listed as unsupported"


def test_unsupported_settings_and_unavailable_parts_name_what_works() -> None:
    assert all(TABLE.instead.values())
    assert all(part.instead for part in TABLE.parts.values() if not part.available)


def test_supported_values_are_values_of_the_setting() -> None:
    limits = [*TABLE.values.items()]
    limits += [item for part in AVAILABLE for item in (*part.values.items(), *part.gpu_values.items())]
    for setting, values in limits:
        field = find_key(setting)
        assert field is not None
        if field.choices:
            assert set(values) <= set(field.choices), setting


def test_parts_are_those_that_a_run_file_can_name() -> None:
    named = {
        ("trainer", "training.backend"),
        ("engine", "rollout.backend"),
        ("executor", "run.executor"),
    }
    for kind, setting in named:
        field = find_key(setting)
        assert field is not None
        choices = set(field.choices) - {"auto"}
        assert choices == {name for part_kind, name in TABLE.parts if part_kind == kind}


def test_what_is_called_used_is_read_by_code() -> None:
    """The attribute name of every used setting occurs in the rooms that hand settings to the workers, or
    the setting is one that exporters read in the record of a run."""
    read = {name for room in ("planning", "orchestration") for name in _attributes_read_in(room)}
    read |= {f"use_{name}" for name in LIVE} | _texts_in("exporters")
    unread = {setting for setting in USED if setting.partition(".")[2] not in read}
    assert "server_args" in read
    unread -= {setting for setting in unread if setting.startswith("sglang.")}
    # One supported value needs no reader, and how many GPUs a node has only bounds what is asked.
    limits = [values for part in AVAILABLE for values in (part.values, part.gpu_values)]
    alone = {setting for values in limits for setting, held in values.items() if len(held) == 1}
    assert unread <= alone | {"cluster.num_gpus_per_node"}


def _attributes_read_in(room: str) -> set[str]:
    return {node.attr for node in _nodes(room) if isinstance(node, ast.Attribute)}


def _texts_in(room: str) -> set[str]:
    return {str(node.value) for node in _nodes(room) if isinstance(node, ast.Constant)}


def _nodes(room: str) -> list[ast.AST]:
    root = Path(miles.__file__).parent / room
    sources = [path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(JUDGES)]
    return [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("feature", features().values(), ids=lambda feature: feature.name)
def test_rows_of_the_matrix_are_of_real_things(feature) -> None:  # type: ignore[no-untyped-def]
    assert feature.hardware and feature.hardware <= set(GENERATIONS)
    assert feature.concerns and feature.concerns <= set(KINDS)
    assert feature.instead
    assert {(kind, part) for kind, part, _ in feature.cells} <= TABLE.parts.keys()
    for condition in feature.asked:
        key = condition.partition("=")[0]
        assert key.startswith("plan.") or find_key(key) is not None, condition


@pytest.mark.parametrize("feature", features().values(), ids=lambda feature: feature.name)
def test_no_cell_is_above_what_the_hardware_and_the_build_can_do(feature) -> None:  # type: ignore[no-untyped-def]
    for (kind, part, generation), state in feature.cells.items():
        assert state is not State.UNSUPPORTED, "leave the cell out"
        assert generation in feature.hardware
        assert TABLE.parts[kind, part].available or state is State.WIRED


def test_a_feature_that_nothing_names_is_unsupported() -> None:
    replay = features()["r3"]
    assert replay.state("trainer", "native", "cpu") is State.SUPPORTED
    assert replay.state("engine", "native", "cpu") is State.SUPPORTED
    assert replay.state("trainer", "native", "sm90") is State.UNSUPPORTED
    assert features()["nvfp4-training"].hardware == {"sm100"}
