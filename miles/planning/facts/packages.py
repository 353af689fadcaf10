"""Installed packages by version, read from their metadata: none is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "flashinfer-python",
    "megatron-core",
    "mlflow",
    "psutil",
    "ray",
    "sglang",
    "torch",
    "transformer-engine",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "transformers",
    "wandb",
)


def installed_versions() -> tuple[tuple[str, str], ...]:
    """(package, version) of those of `PACKAGES` that are installed, without local tags such as `+cpu`."""
    return tuple((name, found.partition("+")[0]) for name in PACKAGES if (found := _version(name)))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
