"""Limits, ports and packages of this very machine, and how versions compare."""

from __future__ import annotations

import resource
import socket
import sys
from pathlib import Path

import pytest

from miles.config import parse_flags, resolve
from miles.planning.facts.machine import Gpu, MachineFacts, read_machine
from miles.planning.facts.packages import PACKAGES, installed_versions
from miles.planning.facts.ports import taken_ports
from miles.planning.versions import REQUIREMENTS, SGLANG_PINS, older, satisfies


@pytest.fixture(scope="module")
def machine() -> MachineFacts:
    return read_machine(Path("."))


def test_limits_are_those_of_this_process(machine: MachineFacts) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert machine.open_files == (None if soft == resource.RLIM_INFINITY else soft)
    assert machine.shared_memory_bytes is None or machine.shared_memory_bytes > 0


def test_packages_are_read_without_importing_them() -> None:
    before = set(sys.modules)
    versions = dict(installed_versions())
    assert set(versions) <= set(PACKAGES)
    assert versions["psutil"]
    assert "+" not in versions["torch"], "a local tag is no part of the version"
    assert not {"torch", "ray", "sglang"} & (set(sys.modules) - before)


def run(flags: str):  # type: ignore[no-untyped-def]
    return resolve(flags=parse_flags(flags.split())).config


def test_a_port_that_another_program_has_is_a_fact() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        flags = f"--use-prometheus --prometheus-port {port}"
        assert taken_ports(run(flags)) == (("record.prometheus_port", port),)
    assert taken_ports(run(flags)) == ()


def test_ports_of_features_that_are_off_are_not_asked_for() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert taken_ports(run(f"--sglang-port {port}")) == ()
        assert taken_ports(run(f"--rollout-backend sglang --sglang-port {port}")) == (("sglang.port", port),)


SMI = """\
#!/bin/sh
echo 'NVIDIA H100 80GB HBM3, 81559, 9.0'
echo 'NVIDIA H100 80GB HBM3, 81559, [N/A]'
"""


def test_gpus_as_the_driver_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    first, second = read_machine(tmp_path).gpus
    assert first == Gpu("NVIDIA H100 80GB HBM3", 81559 * 1024**2, 90)
    assert second.sm is None


def test_versions_compare_by_their_numbers() -> None:
    assert older("0.5.9", "0.5.10")
    assert not older("0.5.10", "0.5.10")
    assert older("0.5.6.post2", "0.5.7")
    assert satisfies("2.60.0", ">=2.49,<3")
    assert not satisfies("3.0.0", ">=2.49,<3")
    assert satisfies("0.16.1", "==0.16.1")
    assert satisfies("2.10", ">=2.10.0")
    assert not satisfies("0.16.0rc0", "==0.16.1")


def test_requirements_name_parts_of_a_run() -> None:
    from miles.planning.capabilities import capabilities

    parts = {f"{kind}.{name}" for kind, name in capabilities().parts}
    assert {requirement.by for requirement in REQUIREMENTS} <= parts
    assert {requirement.package for requirement in REQUIREMENTS} <= set(PACKAGES)
    assert all(pins.keys() == {"torch", "transformers"} for pins in SGLANG_PINS.values())
