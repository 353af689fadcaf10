"""Rules on INT4 experts in Megatron and in SGLang: what is rounded together, and how new weights get in."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.precision import engine_format, training_format
from miles.planning.rules.rule import rule
from miles.planning.scale import plan_layout
from miles.planning.subject import Subject
from miles.planning.versions import PACKED_UPDATES_SINCE, older

REPACKED_BY = ("auto", "marlin")
"""Kernels of SGLang's experts whose packing it can undo."""


@rule(
    "I43",
    Severity.ERROR,
    title="expert tensor parallelism cuts INT4 groups",
    cause="a rank rounds the columns that it holds; a group over two ranks would have two scales, and the "
    "engine's copy has one",
    fix="spread experts instead of cutting them: --expert-tensor-parallel-size 1",
)
def groups_over_two_ranks(subject: Subject) -> Iterator[Found]:
    config, spec = subject.config, subject.spec
    if config.training.backend != "megatron" or training_format(subject) != "int4":
        return
    etp, group = plan_layout(config).etp, config.precision.int4_group_size
    width = spec.moe.intermediate_size if spec is not None and spec.moe is not None else 0
    if etp > 1 and width % (etp * group):
        yield Found(
            f"experts of {width} columns over ETP {etp}: {width / etp:g} are not whole groups of {group}",
            "parallel.expert_tensor_parallel_size",
        )


@rule(
    "I44",
    Severity.ERROR,
    title="INT4 of a dense model",
    cause="the Megatron trainer rounds the weights of experts alone, and a dense layer of SGLang does not "
    "take packed weights a second time",
    fix="use FP8: --rollout-format fp8 --fp8-format e4m3 --fp8-recipe blockwise",
)
def dense_int4(subject: Subject) -> Iterator[Found]:
    config, spec = subject.config, subject.spec
    if spec is None or spec.is_moe:
        return
    if config.training.backend == "megatron" and training_format(subject) == "int4":
        yield Found(f"int4_qat with {spec.architecture} in Megatron", "precision.int4_qat")
    if config.rollout.backend == "sglang" and engine_format(subject) == "int4":
        yield Found(f"packed INT4 of {spec.architecture} in SGLang", "precision.rollout_format")


@rule(
    "I45",
    Severity.ERROR,
    title="packed weights do not get into the server this way",
    cause="SGLang repacks INT4 experts for its kernel, and puts that back before an update: all of them have "
    "to be sent again, and of its kernels one can undo its packing",
    fix="leave it out",
)
def packed_weights_refused(subject: Subject) -> Iterator[Found]:
    config = subject.config
    if config.rollout.backend != "sglang" or engine_format(subject) != "int4":
        return
    sync = config.weight_sync
    if sync.update_weight_delta:
        yield Found("update_weight_delta with INT4", "weight_sync.update_weight_delta")
    kernel = config.sglang.server_args().get("moe_runner_backend", "auto")
    if kernel not in REPACKED_BY:
        yield Found(f"moe_runner_backend {kernel} with INT4", "sglang.moe_runner_backend")


@rule(
    "I46",
    Severity.ERROR,
    title="this SGLang takes packed weights once",
    cause=f"servers before {PACKED_UPDATES_SINCE} repack INT4 experts when they start and have no call that "
    "puts that back, so that no update fits",
    fix=f"make an environment with sglang {PACKED_UPDATES_SINCE} or newer, and name it: --server-python "
    "PATH/bin/python",
    local=True,
)
def server_too_old_for_packed_weights(subject: Subject) -> Iterator[Found]:
    server = subject.facts.server
    if not subject.starts_servers or server is None or server.version is None:
        return
    if engine_format(subject) == "int4" and older(server.version, PACKED_UPDATES_SINCE):
        yield Found(f"sglang {server.version} with INT4", "precision.rollout_format")
