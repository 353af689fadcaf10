"""What of a cluster profile the parts of a rehearsal cannot take: settings that need a GPU.

They are found as preflight finds them, by the table of capabilities, and go back to their defaults.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.capabilities import capabilities
from miles.planning.features import State, features
from miles.planning.rehearsal import Change
from miles.planning.rules.capability import feature_setting, is_asked, value_limits
from miles.planning.subject import Subject

FORMATS = ("precision.fp8_format", "precision.fp8_recipe", "precision.int4_qat", "precision.rollout_format")
"""What says in which format a side computes."""
FORMAT_FEATURES = frozenset(
    {"fp8-training", "mxfp8-training", "int4-qat", "fp8-rollout", "mxfp8-rollout", "int4-rollout"}
)


def unusable(subject: Subject) -> tuple[Change, ...]:
    """What the parts of the rehearsal do not take of the profile; each goes back to its default."""
    changes = {change.setting: change for change in (*_formats(subject), *_features(subject))}
    for change in (*_unused(subject), *_beyond_limits(subject)):
        changes.setdefault(change.setting, change)
    return tuple(changes.values())


def _reset(subject: Subject, setting: str, why: str) -> Change:
    return Change(setting, subject.value(setting), subject.default(setting), why)


def _unused(subject: Subject) -> Iterator[Change]:
    table = capabilities()
    for setting, value in subject.explicit_settings():
        if value == subject.default(setting) or subject.uses(setting):
            continue
        users = [p for p in table.parts.values() if p.uses(setting) or setting in p.gpu_fields]
        owner = f"only the {users[0].name} {users[0].kind} has it" if users else "only on GPUs"
        yield _reset(subject, setting, owner)


def _beyond_limits(subject: Subject) -> Iterator[Change]:
    for setting, supported in value_limits(subject):
        value = subject.value(setting)
        items = value if isinstance(value, tuple) else (value,)
        if subject.resolved.is_explicit(setting) and value is not None and not set(items) <= set(supported):
            yield _reset(subject, setting, "not on CPUs")


def _missing(subject: Subject) -> Iterator[tuple[str, str, str, str]]:
    """(feature, setting, title, part) of what the parts cannot do on a CPU."""
    for name, feature in features().items():
        if not is_asked(subject, feature):
            continue
        for _, part in subject.parts():
            concerned = part.kind in feature.concerns
            if concerned and feature.state(part.kind, part.name, "cpu") is State.UNSUPPORTED:
                yield name, feature_setting(feature), feature.title, f"the {part.name} {part.kind}"


def _formats(subject: Subject) -> Iterator[Change]:
    """A format that one side cannot have here. The other side keeps its own where the gap is corrected; INT4
    is on both sides or on none.
    """
    why = _format_obstacle(subject)
    if not why:
        return
    corrected = subject.config.correction.use_tis and subject.rollout_format != "int4"
    lost = [setting for setting in FORMATS if not (corrected and _can_have(subject, setting))]
    for setting in lost:
        if subject.resolved.is_explicit(setting) and subject.value(setting) != subject.default(setting):
            yield _reset(subject, setting, why)


def _format_obstacle(subject: Subject) -> str:
    for name, _, title, part in _missing(subject):
        if name in FORMAT_FEATURES:
            return f"{title}: not with {part} on a CPU; {subject.dtype} stands for it"
    unused = [s for s in FORMATS if subject.value(s) != subject.default(s) and not subject.uses(s)]
    if not unused:
        return ""
    backend = subject.config.training.backend
    return f"low precision of the {backend} trainer needs a GPU; {subject.dtype} stands for it"


def _can_have(subject: Subject, setting: str) -> bool:
    """Whether both parts take a setting of the format as it is."""
    lacking = {at for name, at, _, _ in _missing(subject) if name in FORMAT_FEATURES}
    return subject.uses(setting) and setting not in lacking


def _features(subject: Subject) -> Iterator[Change]:
    for name, setting, title, part in _missing(subject):
        if name in FORMAT_FEATURES:
            continue
        section, _, key = setting.partition(".")
        family = "speculative_" if section == "sglang" and key.startswith("speculative_") else None
        settings = [setting]
        if family or section == "speculative":
            settings = [
                dotted
                for dotted, _ in subject.explicit_settings()
                if dotted.startswith(f"{section}.{family or ''}")
            ]
        for each in settings:
            yield _reset(subject, each, f"{title}: not with {part} on a CPU")
