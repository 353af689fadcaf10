"""Finding profiles, and reading a profile together with everything it extends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles.config.assignments import Assignment
from miles.config.files import ConfigFile, read_file
from miles.config.origin import OriginKind
from miles.config.shipped import shipped_names, shipped_root
from miles.config.suggest import closest, did_you_mean
from miles.errors import MilesError


@dataclass(frozen=True)
class Chain:
    """The layers of one profile or run file, weakest first, each file once."""

    layers: tuple[ConfigFile, ...]
    problems: tuple[MilesError, ...]

    @property
    def suspects(self) -> frozenset[str]:
        """Keys whose value is not known because of a problem."""
        return frozenset().union(*(layer.suspects for layer in self.layers))

    @property
    def assignments(self) -> tuple[tuple[Assignment, ...], ...]:
        """The values of each layer."""
        return tuple(layer.assignments for layer in self.layers)


def read_chain(reference: str | Path, kind: OriginKind, text: str | None = None, at: str = "") -> Chain:
    """Read a profile by shipped name, or a file by path, with all it extends.

    `text` stands for the content of a file that is not written yet. `at`: where a profile was named.
    """
    reader = _ChainReader(kind)
    if isinstance(reference, Path):
        reader.read(reference, str(reference), stack=(), at="", text=text)
    else:
        reader.read_reference(reference, base=Path(), stack=(), at=at)
    problems = (*reader.problems, *(problem for layer in reader.layers for problem in layer.problems))
    return Chain(tuple(reader.layers), problems)


class _ChainReader:
    """Depth first, left to right; a file that was read already is not applied twice."""

    def __init__(self, kind: OriginKind) -> None:
        self.kind = kind
        self.layers: list[ConfigFile] = []
        self.problems: list[MilesError] = []
        self._read: set[Path] = set()

    def read_reference(self, reference: str, base: Path, stack: tuple[Path, ...], at: str) -> None:
        """Read what `extends` or `--profile` names; a path is relative to the file that names it."""
        if reference.endswith(".toml"):
            path = base / reference
            self.read(path, str(path), stack, at)
            return
        path = shipped_root() / f"{reference}.toml"
        if path.is_file():
            self.read(path, f"profiles/{reference}.toml", stack, at)
            return
        near = closest(reference, shipped_names())
        fix = did_you_mean(near, "`miles profiles ls` lists them; a file of your own is a path: ./my.toml")
        self.problems.append(MilesError(f"no profile is named {reference!r}", where=at, fix=fix))

    def read(self, path: Path, label: str, stack: tuple[Path, ...], at: str, text: str | None = None) -> None:
        """Read one file after everything it extends; `at` is where it was named."""
        identity = path.resolve()
        if identity in stack:
            self._report_cycle(identity, stack, at)
            return
        if identity in self._read:
            return
        self._read.add(identity)
        try:
            file = read_file(path, label, OriginKind.PROFILE if stack else self.kind, text)
        except OSError as error:
            what = f"cannot read {label}: {error.strerror or error}"
            run_file = self.kind is OriginKind.RUN_FILE and not stack
            others = "`miles init` writes a run file" if run_file else "`miles profiles ls` lists profiles"
            self.problems.append(MilesError(what, where=at, fix=f"check the path; {others}"))
            return
        place = f"{label}:{file.extends_line}" if file.extends_line else label
        for parent in file.extends:
            self.read_reference(parent, path.parent, (*stack, identity), place)
        self.layers.append(file)

    def _report_cycle(self, identity: Path, stack: tuple[Path, ...], at: str) -> None:
        circle = (*stack[stack.index(identity) :], identity)
        names = " -> ".join(path.stem for path in circle)
        self.problems.append(
            MilesError(
                f"the profile {identity.stem} extends itself: {names}",
                where=at,
                fix="take one of them out of `extends`",
            )
        )
