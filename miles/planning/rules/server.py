"""Rules on SGLang servers: the environment they run from, and arguments that miles decides itself."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from miles.planning.findings import Found, Severity
from miles.planning.formats import QUANTISED
from miles.planning.rules.rule import rule
from miles.planning.server_args import OWNED
from miles.planning.speculation import OWN_DRAFT
from miles.planning.subject import Subject


@rule(
    "SRV1",
    Severity.ERROR,
    title="no environment with SGLang",
    cause="SGLang pins its own torch and transformers, so its servers run from an environment of their own",
    fix="make sglang-cpu, or --server-python PATH/bin/python of an environment that has it",
    local=True,
)
def no_server_environment(subject: Subject) -> Iterator[Found]:
    if not subject.starts_servers:
        return
    server = subject.facts.server
    if server is None:
        yield Found("no Python with SGLang was found", "rollout.backend")
    elif server.version is None:
        yield Found(f"no SGLang beside {server.python}", "engine.server_python")


@rule(
    "SRV2",
    Severity.ERROR,
    title="an argument that miles decides",
    cause="servers listen on loopback ports that are free, on the run's own checkpoint and context length",
    fix="leave it out",
)
def owned_argument(subject: Subject) -> Iterator[Found]:
    if subject.config.rollout.backend == "sglang":
        for name in OWNED:
            if name in subject.config.sglang.server_args():
                yield Found(f"{name} is set for SGLang", f"sglang.{name}", _INSTEAD.get(name, ""))


@rule(
    "SRV5",
    Severity.ERROR,
    title="weights that do not travel as a checkpoint on disk",
    cause="the checkpoints of a run hold plain weights; and what has not changed is left out on disk only "
    "for servers that began with the run's own checkpoint and have no draft that reads it, too; trainer and "
    "servers on the same GPUs hand weights over there",
    fix="--update-weight-transfer-mode tensor",
)
def not_on_disk(subject: Subject) -> Iterator[Found]:
    sync = subject.config.weight_sync
    if subject.config.rollout.backend != "sglang" or sync.update_weight_transfer_mode != "disk":
        return
    if subject.on_gpus and subject.config.cluster.colocate:
        what = "a checkpoint for servers on the trainer's GPUs"
        yield Found(what, "weight_sync.update_weight_transfer_mode")
    if sync.update_weight_delta and subject.config.rollout.rollout_external_engine_addrs:
        what = "update_weight_delta with disk, for servers that others started"
        yield Found(what, "weight_sync.update_weight_delta")
    if sync.update_weight_delta and subject.config.sglang.speculative_algorithm in OWN_DRAFT:
        what = f"update_weight_delta with disk and {subject.config.sglang.speculative_algorithm}"
        yield Found(what, "weight_sync.update_weight_delta")
    if subject.rollout_format in QUANTISED:
        yield Found(f"{subject.rollout_format} weights on disk", "weight_sync.update_weight_transfer_mode")


@rule(
    "SRV4",
    Severity.ERROR,
    title="weights that a broadcast does not bring there",
    cause="SGLang hands what is broadcast to the policy alone, and its draft keeps its weights; servers that "
    "others started are reached on this machine only; NCCL has no group of two ranks on one GPU",
    fix="--update-weight-transfer-mode tensor",
)
def broadcast_does_not_reach(subject: Subject) -> Iterator[Found]:
    config, setting = subject.config, "weight_sync.update_weight_transfer_mode"
    if config.rollout.backend != "sglang" or config.weight_sync.update_weight_transfer_mode != "broadcast":
        return
    if config.sglang.speculative_algorithm in OWN_DRAFT:
        yield Found(f"broadcast with {config.sglang.speculative_algorithm}", setting)
    elsewhere = [
        address
        for address in config.rollout.rollout_external_engine_addrs
        if urlsplit(address).hostname not in ("127.0.0.1", "localhost")
    ]
    if elsewhere:
        yield Found(f"broadcast to {elsewhere[0]}", setting)
    if subject.on_gpus and config.cluster.colocate:
        yield Found("broadcast to servers on the trainer's GPUs", setting)


@rule(
    "SRV3",
    Severity.ERROR,
    title="guesses that a server without CUDA cannot verify",
    cause="SGLang's kernels for trees of guesses and for other drafts are CUDA only; on a CPU the policy's "
    "own MTP layers guess in a chain (docs/speculative.md)",
    fix="--sglang-speculative-algorithm EAGLE --sglang-speculative-eagle-topk 1 --mtp-num-layers 1",
)
def guesses_without_cuda(subject: Subject) -> Iterator[Found]:
    sglang = subject.config.sglang
    if not subject.starts_servers or subject.on_gpus or sglang.speculative_algorithm is None:
        return
    if sglang.speculative_algorithm not in OWN_DRAFT or sglang.speculative_draft_model_path is not None:
        draft = " with a checkpoint of its own" if sglang.speculative_draft_model_path else ""
        yield Found(f"{sglang.speculative_algorithm}{draft} on a CPU", "sglang.speculative_algorithm")
    elif (sglang.speculative_eagle_topk or 1) > 1:
        branches = f"{sglang.speculative_eagle_topk} branches on a CPU"
        yield Found(branches, "sglang.speculative_eagle_topk")
    if subject.config.rollout.rollout_top_p < 1 or subject.config.rollout.rollout_top_k > 0:
        yield Found(
            "a cut vocabulary, and guesses on a CPU", "rollout.rollout_top_p", "leave top-p and top-k out"
        )


@rule(
    "SRV6",
    Severity.ERROR,
    title="stop strings, and a server without a tokenizer",
    cause="SGLang looks for stop strings, and for the ids that a minimal length forbids, with its tokenizer",
    fix="leave skip_tokenizer_init out",
)
def nothing_to_read_with(subject: Subject) -> Iterator[Found]:
    config = subject.config
    if config.rollout.backend != "sglang" or not config.sglang.server_args().get("skip_tokenizer_init"):
        return
    if config.rollout.rollout_stop:
        yield Found("rollout_stop with skip_tokenizer_init", "rollout.rollout_stop")
    if config.eval.eval_min_new_tokens:
        yield Found("eval_min_new_tokens with skip_tokenizer_init", "eval.eval_min_new_tokens")


@rule(
    "SRV7",
    Severity.ERROR,
    title="an indexer in a server without CUDA",
    cause="SGLang runs the sparse attention of DeepSeek-V3.2 on CUDA devices alone, and a server on a CPU "
    "ends as it starts",
    fix="--rollout-backend native",
)
def indexer_without_cuda(subject: Subject) -> Iterator[Found]:
    spec = subject.spec
    if subject.starts_servers and not subject.on_gpus and spec is not None and spec.has_indexer:
        yield Found(f"{spec.family} in SGLang on a CPU", "rollout.backend")


_INSTEAD = {
    "context_length": "use --rollout-max-context-len",
    "host": "attach to servers that you started: --rollout-external-engine-addrs http://host:port",
    "port": "attach to servers that you started: --rollout-external-engine-addrs http://host:port",
    "model_path": "use --hf-checkpoint",
}
