"""Ray around one run: a private runtime on this machine, or the cluster that runs this process as a job."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import psutil  # type: ignore[import-untyped]

from miles.errors import Unavailable
from miles.orchestration.ray_environment import load_ray, prepare_private_runtime
from miles.orchestration.seats import Report
from miles.planning import Plan
from miles.planning.workers import WorkersPlan
from miles.record import events

STARTS = 3
"""Times a private runtime is started. Ray gives its servers 30 s to come up, which a busy machine exceeds."""
PLACEMENT_SECONDS = 60.0
END_SECONDS = 15.0
"""How long the processes of a private runtime may take to end by themselves, before they are told to."""
_MIB = 1 << 20
_STORE_BYTES = 256 * _MIB
"""Object store beside weights: samples on their way."""
_COMMON = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
_VERSIONS_HELD = 3
"""Weight versions that the object store may hold at once: old, new, and one on its way out."""


class RayRuntime:
    """Started once for all attempts of a run."""

    def __init__(self, in_cluster: bool) -> None:
        self._in_cluster = in_cluster
        self._temp_dir: str | None = None
        self._placement: Any = None

    @property
    def started(self) -> bool:
        return self._placement is not None

    def start(self, plan: Plan, report: Report) -> None:
        """Connect and reserve room for every worker; a start that fails and is tried again is reported.

        Raises: Unavailable.
        """
        assert plan.workers is not None
        if not self._in_cluster:
            prepare_private_runtime()
        ray = load_ray()
        if not ray.is_initialized():
            self._connect(ray, plan, report)
        self._placement = _reserve(ray, plan.workers)

    def place(self, bundle: int) -> Any:
        """Where worker number `bundle` goes: trainers first, then engines, then reward workers."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundle)

    def stop(self) -> None:
        """End what was started here, by its own handle; other runtimes of the machine are left alone."""
        if self._placement is None and self._temp_dir is None:
            return
        import ray
        from ray.util import remove_placement_group

        if self._placement is not None and ray.is_initialized():
            remove_placement_group(self._placement)
        self._placement = None
        self._end_private(ray)

    def _connect(self, ray: Any, plan: Plan, report: Report) -> None:
        for left in reversed(range(1 if self._in_cluster else STARTS)):
            try:
                if self._in_cluster:
                    ray.init(address="auto", **_COMMON)
                else:
                    self._start_private(ray, plan)
                return
            # Ray raises bare Exceptions of its own, for a slow start among others.
            except Exception as error:
                why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if not left:
                    what = "the job cannot reach its own cluster" if self._in_cluster else "Ray did not start"
                    fix = "try again when the machine is less busy, or take --executor inline"
                    raise Unavailable(what, why=why, fix=fix) from error
                report(events.RESTART_FAILED, worker="Ray", reason=why, restarts_left=left)
                self._end_private(ray)

    def _start_private(self, ray: Any, plan: Plan) -> None:
        # Short: the sockets inside must fit in the 107 bytes of a socket path.
        self._temp_dir = tempfile.mkdtemp(prefix="miles-ray-", dir="/tmp")
        ray.init(
            address="local",
            num_cpus=plan.workers.cpus if plan.workers else 1,
            # Without a number Ray counts those of the machine.
            num_gpus=None if plan.device == "cuda" else 0,
            object_store_memory=_STORE_BYTES + _VERSIONS_HELD * _weight_bytes(plan),
            include_dashboard=False,
            # Each worker is started with the environment of the plan; others would only be thrown away.
            _system_config={"prestart_worker_first_driver": False},
            _temp_dir=self._temp_dir,
            **_COMMON,
        )

    def _end_private(self, ray: Any) -> None:
        if self._temp_dir is not None:
            family = _family(self._temp_dir)
            ray.shutdown()
            _end(family)
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None


def _family(temp_dir: str) -> list[psutil.Process]:
    """The servers of the runtime that lives in `temp_dir`, and their descendants: the workers among them."""
    family: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        try:
            if any(temp_dir in argument for argument in child.cmdline()):
                family.update({member.pid: member for member in (child, *child.children(recursive=True))})
        except psutil.NoSuchProcess:
            continue
    return list(family.values())


def _end(family: list[psutil.Process]) -> None:
    """Return when none of these runs any more. Ray's shutdown returns before its workers have ended."""
    _, alive = psutil.wait_procs(family, timeout=END_SECONDS)
    for member in alive:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=END_SECONDS)


def _reserve(ray: Any, workers: WorkersPlan) -> Any:
    """One bundle per worker. Raises: Unavailable with the arithmetic when there is no room."""
    group = ray.util.placement_group(workers.bundles, strategy=workers.strategy)
    if group.wait(PLACEMENT_SECONDS):
        return group
    total, free = ray.cluster_resources(), ray.available_resources()
    ray.util.remove_placement_group(group)
    raise Unavailable(
        "the cluster has no room for the workers",
        why=f"{workers.arithmetic}; the cluster has {total.get('CPU', 0):g} CPU, {free.get('CPU', 0):g} of "
        f"them free after waiting {PLACEMENT_SECONDS:g} s",
        fix="wait for other jobs to end, or lower --num-engines",
    )


def _weight_bytes(plan: Plan) -> int:
    return plan.model.parameters * (4 if plan.dtype == "fp32" else 2)
