"""The shape of a preflight rule, and the registry that every rule module adds to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from miles.planning.findings import Finding, Found, Severity
from miles.planning.subject import Subject

Check = Callable[[Subject], Iterator[Found]]

DOC_PAGE = "docs/reference/preflight.md"


@dataclass(frozen=True)
class Rule:
    """A rule: what it looks for, why that is wrong, and what usually mends it.

    `fix` is the general remedy; a check may give a more exact one with each thing it finds.
    """

    id: str
    severity: Severity
    title: str
    cause: str
    fix: str
    check: Check
    local: bool = False
    """It looks at this machine or at files on it: left out where the run is planned for other hardware."""

    @property
    def doc(self) -> str:
        """The line of the generated reference that explains this rule."""
        return f"{DOC_PAGE}#{self.id.lower()}"

    def findings(self, subject: Subject) -> Iterator[Finding]:
        """Everything this rule has to say about a run."""
        for found in self.check(subject):
            yield Finding(
                rule=self.id,
                severity=self.severity,
                title=self.title,
                what=found.what,
                setting=found.setting,
                where=subject.place(found.setting) if found.setting else "",
                cause=self.cause,
                fix=found.fix or self.fix,
                doc=self.doc,
            )


REGISTRY: dict[str, Rule] = {}


def rule(
    id: str, severity: Severity, *, title: str, cause: str, fix: str, local: bool = False
) -> Callable[[Check], Check]:
    """Register the decorated check under a rule id."""

    def register(check: Check) -> Check:
        assert id not in REGISTRY, f"two rules are called {id}"
        REGISTRY[id] = Rule(id, severity, title, cause, fix, check, local)
        return check

    return register
