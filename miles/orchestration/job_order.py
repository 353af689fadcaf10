"""What the launching machine hands to a job: the run file and where the record goes."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from miles import environment
from miles._version import __version__
from miles.config import ResolvedConfig, RunConfig, from_json, to_json
from miles.config.relations import HOOKS
from miles.errors import Unavailable

ORDER_FILE = "job.json"
TOKEN_FILE = ".submission-token"
LARGEST_SHIPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class JobOrder:
    """One submission. Paths are those of the launching machine, but `cluster_run_dir`."""

    config: str
    run_dir: str
    cwd: str
    cache_dir: str
    token: str
    """Also lies in the run directory: a job that finds it there shares a file system with the launcher."""
    resume: bool = False
    from_step: int | None = None
    sets: list[str] = field(default_factory=list)
    """Settings changed on resuming."""
    by: str = "cli"
    """Who asked for the resume."""
    cluster_run_dir: str | None = None
    """Where an earlier attempt keeps its checkpoints, on a cluster without a shared file system."""
    have: dict[str, int] = field(default_factory=dict)
    """Bytes of each record file that the launcher holds already."""
    code_version: str = __version__

    @property
    def resolved(self) -> ResolvedConfig:
        return from_json(self.config)

    @property
    def run_id(self) -> str:
        return Path(self.run_dir).name

    def shares_files(self) -> bool:
        """Whether the launcher's run directory is here too."""
        token = Path(self.run_dir) / TOKEN_FILE
        return token.is_file() and token.read_text() == self.token

    @property
    def work_dir(self) -> Path:
        """The job's own run directory where no file system is shared."""
        root = environment.get("MILES_RUNS_DIR")
        default = (Path(root) if root else environment.cache_dir() / "runs") / self.run_id
        return Path(self.cluster_run_dir) if self.cluster_run_dir else default.resolve()

    @classmethod
    def read(cls, path: Path) -> JobOrder:
        """The order that `write_order` wrote. Raises: Unavailable when another version of miles wrote it."""
        fields = json.loads(path.read_text())
        if fields["code_version"] != __version__:
            raise Unavailable(
                f"the cluster has miles {__version__}, the job was submitted by {fields['code_version']}",
                why="a run file means what the version that resolved it says",
                fix="install the same version on both sides",
            )
        return cls(**fields)


def write_order(
    stage: Path, resolved: ResolvedConfig, run_dir: Path, share_files: bool, **more: object
) -> None:
    """Fill the directory that is uploaded with the job: the order, and small files that the run names.

    Without `share_files` the job keeps a record of its own and streams it, whatever it could see.
    """
    token = secrets.token_hex(16)
    if share_files:
        (run_dir / TOKEN_FILE).write_text(token)
    order = JobOrder(
        config=to_json(resolved),
        run_dir=str(run_dir),
        cwd=str(Path.cwd()),
        cache_dir=str(environment.cache_dir().resolve()),
        token=token,
        **more,  # type: ignore[arg-type]
    )
    (stage / ORDER_FILE).write_text(json.dumps(asdict(order)))
    for source in _named_files(resolved.config):
        target = stage / source
        if source.is_file() and source.stat().st_size <= LARGEST_SHIPPED_BYTES and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _named_files(config: RunConfig) -> Iterator[Path]:
    """Files that the run names relative to the launcher's working directory and that lie below it."""
    parts = (hook.partition(".") for hook in HOOKS)
    hooks = [getattr(getattr(config, section), name) for section, _, name in parts]
    named = [
        config.data.prompt_data,
        *config.eval.eval_prompt_data[1::2],
        config.data.chat_template_path,
        *((hook or "").partition(":")[0] for hook in hooks),
    ]
    for name in named:
        path = Path((name or "").partition("@[")[0])
        if name and not path.is_absolute() and ".." not in path.parts:
            yield path
