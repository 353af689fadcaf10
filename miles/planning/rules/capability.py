"""Rules on what this build can do: no setting is accepted and then ignored."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.capabilities import Part, capabilities
from miles.planning.features import Feature, State, features
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject


@rule(
    "CAP3",
    Severity.ERROR,
    title="this backend is not available yet",
    cause="the part is named in the run file but cannot run today",
    fix="take the native backends in one process",
)
def part_unavailable(subject: Subject) -> Iterator[Found]:
    for setting, part in subject.parts():
        if not part.available:
            where = " on GPUs" if subject.on_gpus else ""
            yield Found(
                f"the {part.name} {part.kind} is not supported yet{where}", setting, f"use {part.instead}"
            )


@rule(
    "CAP1",
    Severity.ERROR,
    title="not supported yet on this backend",
    cause="no part of this run (trainer, engine, executor) uses it: it would be accepted and ignored",
    fix="leave it out",
)
def setting_unused(subject: Subject) -> Iterator[Found]:
    table = capabilities()
    for setting, value in subject.explicit_settings():
        if subject.uses(setting) or value == subject.default(setting):
            continue
        users = [part for part in table.parts.values() if part.available and _ever_uses(part, setting)]
        instead = "; ".join(f"it belongs to the {part.name} {part.kind}" for part in users)
        yield Found(
            f"{setting} = {_shown(value)}",
            setting,
            instead or table.instead.get(setting, ""),
        )


def _ever_uses(part: Part, setting: str) -> bool:
    return part.uses(setting) or setting in part.gpu_fields


@rule(
    "CAP2",
    Severity.ERROR,
    title="this value is not supported yet",
    cause="the setting is used, but not with this value",
    fix="take one of the supported values",
)
def value_unsupported(subject: Subject) -> Iterator[Found]:
    written = dict(subject.explicit_settings())
    for setting, supported in value_limits(subject):
        value = written.get(setting)
        items = value if isinstance(value, tuple) else (value,)
        if value is not None and not set(items) <= set(supported):
            choices = ", ".join(map(_shown, supported))
            takers = "".join(f"; the {part} takes it" for part in _takers(subject, setting, set(items)))
            yield Found(f"{setting} = {_shown(value)}", setting, f"supported today: {choices}{takers}")


def _takers(subject: Subject, setting: str, items: set[object]) -> Iterator[str]:
    """Other parts of the kind that has the limit, which take these values. On GPUs nobody is named: which of
    them runs there depends on more than one setting.
    """
    limited = {part.kind for _, part in subject.parts() if setting in part.values and not subject.on_gpus}
    for part in capabilities().parts.values():
        if part.kind in limited and part.available and items <= set(part.values.get(setting, ())):
            yield f"{part.name} {part.kind}"


@rule(
    "CAP4",
    Severity.ERROR,
    title="the hardware cannot do this",
    cause="the format or kernel exists on other generations of GPUs only",
    fix="choose another format, or other hardware",
)
def beyond_hardware(subject: Subject) -> Iterator[Found]:
    generation = subject.hardware.generation
    for feature in _asked(subject):
        if generation not in feature.hardware and _judged(subject, feature):
            name = subject.hardware.kind.name if subject.hardware.kind else "a CPU"
            yield Found(
                f"{feature.title} on {name}; it needs {' or '.join(sorted(feature.hardware - {'cpu'}))}",
                feature_setting(feature),
                feature.instead,
            )


@rule(
    "CAP5",
    Severity.ERROR,
    title="this backend cannot do this on this hardware",
    cause="no test of this build runs it and no code for it exists",
    fix="choose another backend",
)
def beyond_backend(subject: Subject) -> Iterator[Found]:
    for feature, kind, name in _cells(subject, State.UNSUPPORTED):
        yield Found(
            f"{feature.title}: not with the {name} {kind} on {_device(subject)}",
            feature_setting(feature),
            feature.instead,
        )


@rule(
    "CAP6",
    Severity.WARNING,
    title="wired only: this was never run on this hardware",
    cause="it is written against the real library, and no test of this build runs it here",
    fix="watch the gap between trainer and engine closely",
)
def never_run(subject: Subject) -> Iterator[Found]:
    for feature, kind, name in _cells(subject, State.WIRED):
        yield Found(
            f"{feature.title} with the {name} {kind} on {_device(subject)}",
            feature_setting(feature),
            feature.instead,
        )


def _device(subject: Subject) -> str:
    return subject.hardware.kind.name if subject.on_gpus and subject.hardware.kind else "CPU"


def _cells(subject: Subject, state: State) -> Iterator[tuple[Feature, str, str]]:
    """Features that the run asks of an available part in this state, where the hardware can do them."""
    generation = subject.hardware.generation if subject.on_gpus else "cpu"
    for feature in _asked(subject):
        if generation not in feature.hardware:
            continue
        for _, part in subject.parts():
            if not part.available or part.kind not in feature.concerns:
                continue
            if feature.state(part.kind, part.name, generation) is state:
                yield feature, part.kind, part.name


def _judged(subject: Subject, feature: Feature) -> bool:
    """On a machine without GPUs a run on GPUs is GPU1's matter; a run on its CPU has no other hardware."""
    setting = feature_setting(feature)
    used = setting.startswith("plan.") or subject.uses(setting)
    return used and (subject.hardware.kind is not None or not subject.on_gpus)


def _asked(subject: Subject) -> Iterator[Feature]:
    yield from (feature for feature in features().values() if is_asked(subject, feature))


def is_asked(subject: Subject, feature: Feature) -> bool:
    """Whether something in the run asks for a feature."""
    return any(_holds(subject, condition) for condition in feature.asked)


def _holds(subject: Subject, condition: str) -> bool:
    """`setting`: it is set; `setting=value`; `plan.NAME`: what follows from the run file and the facts."""
    key, has_value, wanted = condition.partition("=")
    section, _, name = key.partition(".")
    value = getattr(subject, name) if section == "plan" else subject.value(key)
    if section != "plan" and not subject.uses(key):
        return False
    return str(value) == wanted if has_value else bool(value)


def feature_setting(feature: Feature) -> str:
    """The setting to name in a finding; what the plan derives goes by the setting it is derived from."""
    key = feature.asked[0].partition("=")[0]
    return {
        "plan.dtype": "model.dtype",
        "plan.rollout_format": "precision.rollout_format",
        "plan.routing_replay": "alignment.use_rollout_routing_replay",
    }.get(key, key)


def value_limits(subject: Subject) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Settings of the run that are supported with some values only, and these."""
    yield from capabilities().values.items()
    for _, part in subject.parts():
        yield from part.values.items()


def _shown(value: object) -> str:
    return (
        f'"{value}"'
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
