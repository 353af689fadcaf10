"""The exact arguments of an SGLang server, as a run needs them; what the run file says itself wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.config import RunConfig
from miles.planning.engine_limits import EngineLimits
from miles.planning.speculation import plan_speculation

SERVER_DTYPES: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What a server calls a format of plain weights; a quantised checkpoint says its own (`auto`)."""

CONTEXT_ROOM = 2
"""Positions beyond the longest request: a server ends one that is to fill its context two tokens early."""

OWNED = ("host", "port", "model_path", "model", "tokenizer_path", "context_length", "weight_version")
"""Arguments that miles decides: a value in the run file would be overruled, and is refused."""


def plan_server_args(
    config: RunConfig, limits: EngineLimits, rollout_format: str, replay: bool, on_gpus: bool
) -> dict[str, Any]:
    """By SGLang's own names, in the order of the command line; checkpoint and address come at launch."""
    rollout = config.rollout
    reads_text = bool(rollout.rollout_stop or config.eval.eval_min_new_tokens)
    args: dict[str, Any] = {
        "dtype": SERVER_DTYPES.get(rollout_format, "auto"),
        "context_length": limits.context + CONTEXT_ROOM,
        "random_seed": rollout.rollout_seed,
        # Token ids go in and come out. A server reads text for stop strings, and looks up ids for a minimum.
        "skip_tokenizer_init": not reads_text,
        "enable_metrics": True,
    }
    if reads_text:
        # Its warm-up is an English sentence, for which not every vocabulary has symbols.
        args["skip_server_warmup"] = True
    if replay:
        args["enable_return_routed_experts"] = True
    guesses = _speculation_args(config)
    # Slots that a request holds for guesses: those being verified, and those after them.
    ahead = 2 * guesses.get("speculative_num_draft_tokens", 0)
    if on_gpus:
        args["tp_size"] = config.cluster.rollout_num_gpus_per_engine
        if config.cluster.colocate:
            # Without it a server that is told to release its memory keeps it.
            args["enable_memory_saver"] = True
    else:
        # Left alone, a server takes its memory from what the machine has free.
        args["max_running_requests"] = limits.running_requests
        args["max_total_tokens"] = limits.running_requests * (args["context_length"] + ahead)
    return args | guesses | config.sglang.server_args()


def _speculation_args(config: RunConfig) -> dict[str, Any]:
    """What a server that guesses ahead is told; it takes steps, branches and tokens all or none."""
    plan = plan_speculation(config.sglang)
    if plan is None or plan.algorithm == "NGRAM":
        return {}
    return {
        "speculative_algorithm": plan.algorithm,
        "speculative_num_steps": plan.num_steps,
        "speculative_eagle_topk": plan.eagle_topk,
        "speculative_num_draft_tokens": plan.num_draft_tokens,
    }
