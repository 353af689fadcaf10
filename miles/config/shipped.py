"""The profiles that come with miles."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def shipped_root() -> Path:
    """The directory of shipped profiles: inside the wheel, or `profiles/` of a checkout."""
    packaged = Path(__file__).with_name("_profiles")
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "profiles"


def shipped_names() -> tuple[str, ...]:
    """Every shipped profile by name; recipes have no `/`, the layers they are made of do."""
    paths = shipped_root().rglob("*.toml")
    names = (path.relative_to(shipped_root()).with_suffix("").as_posix() for path in paths)
    return tuple(sorted(names, key=lambda name: (name.count("/"), name)))
