"""The wheel carries everything that a run needs: it works outside the clone, with its own profiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_support import PATIENCE_S, SMALL

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked beside the libraries it depends on."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(wheels),
        str(REPOSITORY),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    return target


def run(installed: Path, cache: Path, work: Path, *command: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = kept | {"PYTHONPATH": str(installed), "MILES_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_the_wheel_trains_the_quickstart_outside_the_clone(
    installed: Path, shared_cache: Path, tmp_path: Path
) -> None:
    where = run(installed, shared_cache, tmp_path, "-c", "import miles; print(miles.__file__)")
    assert where.stdout.startswith(str(installed)), "the wheel is what runs"
    done = run(installed, shared_cache, tmp_path, "-m", "miles_cli", "train", *SMALL)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("quickstart-*/summary.json")), "runs go to runs/ where one stands"


def test_the_wheel_ships_every_profile(installed: Path, shared_cache: Path, tmp_path: Path) -> None:
    shipped = {
        path.relative_to(REPOSITORY / "profiles") for path in (REPOSITORY / "profiles").rglob("*.toml")
    }
    packed = installed / "miles" / "config" / "_profiles"
    assert {path.relative_to(packed) for path in packed.rglob("*.toml")} == shipped
    assert run(installed, shared_cache, tmp_path, "-m", "miles_cli", "profiles", "validate").returncode == 0
