"""Rules on installed packages."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject
from miles.planning.versions import REQUIREMENTS, SGLANG_PINS, Requirement, satisfies


@rule(
    "VER1",
    Severity.ERROR,
    title="a package is missing or of another version",
    cause="this build was written against certain versions of fast-moving packages; others fail late or "
    "compute otherwise",
    fix="install the version that is named",
    local=True,
)
def package_unsuitable(subject: Subject) -> Iterator[Found]:
    chosen = {f"{part.kind}.{part.name}": setting for setting, part in subject.parts() if part.available}
    for needed in REQUIREMENTS:
        if needed.by in chosen:
            installed = subject.facts.machine.package(needed.package)
            if installed is None or not satisfies(installed, needed.accepts):
                yield Found(_unsuitable(needed, installed), chosen[needed.by], _install(needed))


def _unsuitable(needed: Requirement, installed: str | None) -> str:
    state = (
        f"{needed.package} {installed} is installed" if installed else f"{needed.package} is not installed"
    )
    return f"{state}, the {needed.by.replace('.', ' ')} needs {needed.accepts}: {needed.why}"


def _install(needed: Requirement) -> str:
    return f"pip install '{needed.package}{needed.accepts}'"


@rule(
    "VER2",
    Severity.WARNING,
    title="SGLang beside packages it was not built for",
    cause="SGLang pins torch and transformers exactly; another version fails at import, or with a kernel at "
    "run time",
    fix="give SGLang an environment of its own",
    local=True,
)
def sglang_pins_differ(subject: Subject) -> Iterator[Found]:
    machine = subject.facts.machine
    installed = machine.package("sglang")
    if installed is None or subject.config.rollout.backend != "sglang":
        return
    for package, pinned in SGLANG_PINS.get(installed, {}).items():
        there = machine.package(package)
        if there is not None and there != pinned:
            yield Found(
                f"sglang {installed} pins {package} {pinned}, {there} is installed", "rollout.backend"
            )


@rule(
    "VER3",
    Severity.ERROR,
    title="Transformer Engine is installed in part",
    cause="the package without its CUDA core raises when it is imported, and takes megatron-core with it",
    fix="pip install 'transformer-engine[pytorch]' on a GPU machine; pip uninstall transformer-engine on "
    "one without",
    local=True,
)
def transformer_engine_broken(subject: Subject) -> Iterator[Found]:
    machine = subject.facts.machine
    version = machine.package("transformer-engine")
    cores = (machine.package("transformer-engine-cu12"), machine.package("transformer-engine-cu13"))
    if version is not None and subject.config.training.backend == "megatron":
        if not any(cores):
            yield Found(f"transformer-engine {version} without its CUDA core", "training.backend")
        elif not machine.gpus:
            yield Found(f"transformer-engine {version} on a machine without a GPU", "training.backend")


@rule(
    "VER4",
    Severity.ERROR,
    title="the package of a tracker is missing",
    cause="the metrics are copied by the tracker's own package, which is no part of miles",
    fix="install it, or leave the tracker out: `miles export` copies a run afterwards, too",
    local=True,
)
def tracker_missing(subject: Subject) -> Iterator[Found]:
    record = subject.config.record
    for package, wanted in (("wandb", record.use_wandb), ("mlflow", record.use_mlflow)):
        if wanted and subject.facts.machine.package(package) is None:
            fix = f"pip install {package}, or leave it out: `miles export RUN --to {package}` copies it later"
            yield Found(f"{package} is not installed", f"record.use_{package}", fix)
