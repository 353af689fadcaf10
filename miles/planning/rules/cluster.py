"""Rules on Ray: where workers run, and whether there is room for them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject


@rule(
    "RAY1",
    Severity.ERROR,
    title="the cluster is too small for the run",
    cause="Ray would keep the job pending for ever instead of refusing it",
    fix="lower --num-engines, --num-reward-workers or --threads, or add nodes",
)
def cluster_too_small(subject: Subject) -> Iterator[Found]:
    cluster, workers = subject.facts.cluster, subject.workers
    if cluster is None or workers is None or workers.cpus <= cluster.cpus:
        return
    yield Found(
        f"{workers.arithmetic}; the cluster at {cluster.address} has {cluster.cpus:g} CPU on {cluster.nodes} "
        f"node{'s' if cluster.nodes != 1 else ''}: {workers.cpus - cluster.cpus:g} too few",
        "engine.num_engines",
    )


@rule(
    "RAY2",
    Severity.WARNING,
    title="more engines than cores",
    cause="engines sample at the same time; on one machine they share its cores and slow each other down",
    fix="lower --num-engines to the number of cores, or submit to a cluster with --address",
    local=True,
)
def engines_exceed_cores(subject: Subject) -> Iterator[Found]:
    workers, cores = subject.workers, subject.facts.machine.cores
    if workers is None or subject.config.cluster.address is not None:
        return
    busy = workers.engines * workers.threads
    if workers.engines > 1 and busy > cores:
        yield Found(
            f"{workers.engines} engines × {workers.threads} thread(s) on {cores} cores", "engine.num_engines"
        )


@rule(
    "RAY3",
    Severity.ERROR,
    title="the run file asks for a cluster and for one process",
    cause="only the ray executor can be submitted; with the inline executor the address would be ignored",
    fix="leave --executor out, or --address",
)
def inline_on_cluster(subject: Subject) -> Iterator[Found]:
    address = subject.config.cluster.address
    if address is not None and subject.config.run.executor == "inline":
        yield Found(f"run.executor = inline, cluster.address = {address}", "run.executor")


@rule(
    "RAY4",
    Severity.WARNING,
    title="another version of Ray on the cluster",
    cause="jobs are submitted over HTTP, so this works as long as the job server's interface is the same",
    fix="install the cluster's version here: pip install 'ray[default]==VERSION'",
)
def versions_differ(subject: Subject) -> Iterator[Found]:
    cluster = subject.facts.cluster
    try:
        installed = version("ray")
    except PackageNotFoundError:
        return
    if cluster is not None and cluster.ray_version != installed:
        yield Found(
            f"ray {installed} here, {cluster.ray_version} at {cluster.address}",
            "cluster.address",
            f"pip install 'ray[default]=={cluster.ray_version}'",
        )
