"""Going on with a run: the same directory, the next attempt, from its last good checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miles.config import ResolvedConfig, parse_sets
from miles.errors import RunError
from miles.orchestration.checkpoint_sources import locate_checkpoint
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.job import Job, RunOutcome, checkpoint_root, write_identity
from miles.orchestration.launch import run_job
from miles.orchestration.lineage import CLI, Lineage, changed_settings
from miles.orchestration.observer import Observer, SilentObserver
from miles.orchestration.stored_config import stored_config
from miles.planning import Plan
from miles.record import RunReader, RunStatus


def resume(
    run_dir: Path,
    resolved: ResolvedConfig,
    plan: Plan,
    *,
    from_step: int | None = None,
    sets: Sequence[str] = (),
    by: str = CLI,
    observer: Observer | None = None,
    in_cluster: bool = False,
) -> RunOutcome:
    """Continue after the newest checkpoint, or after the one of `from_step`; without any, from the start.

    `resolved` and `plan` come from `plan_continuation` with the same `sets`; of the live settings those win
    over the values in the checkpoint. Later checkpoints are set aside. Raises: RunError when the run still
    goes on or is complete; CheckpointError for a damaged checkpoint.
    """
    observer = observer or SilentObserver()
    reader = RunReader(run_dir)
    store = CheckpointStore(checkpoint_root(resolved, run_dir))
    _refuse_needless(reader, plan, store, from_step)
    checkpoint = store.latest() if from_step is None else store.at_step(from_step)
    if checkpoint is not None:
        state = store.load_state(checkpoint)
    source = locate_checkpoint(resolved, observer)
    if checkpoint is not None:
        store.rewind(state.step)
    before = stored_config(run_dir)
    keys = [assignment.dotted for assignment in parse_sets(sets)]
    lineage = Lineage(by, changed_settings(before, resolved, keys))
    attempt = max(reader.attempt, 1) + 1
    job = Job(resolved, plan, source, run_dir.resolve(), attempt, checkpoint, in_cluster, lineage)
    write_identity(job.run_dir, resolved, plan, job.attempt)
    return run_job(job, observer)


def _refuse_needless(reader: RunReader, plan: Plan, store: CheckpointStore, from_step: int | None) -> None:
    status = reader.status()
    if status is RunStatus.RUNNING:
        raise RunError(
            "the run is still going on",
            where=str(reader.layout.root),
            fix=f"stop it first: miles runs stop {reader.run_id}",
        )
    if status is RunStatus.FINISHED and from_step is None and store.latest_step() == plan.num_rollouts:
        raise RunError(
            f"the run is complete: {plan.num_rollouts} of {plan.num_rollouts} steps",
            where=str(reader.layout.root),
            fix="give it more steps with --set rollout.num_rollout=N, or go back with --from-step N",
        )
