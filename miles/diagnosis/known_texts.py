"""Texts of failures that say more than the type of their exception, and what each means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from miles.diagnosis.finding import Fix, FixKind


@dataclass(frozen=True)
class KnownText:
    """One row: `pattern` must be found, and `context`, where given, anywhere in the same traceback."""

    rule: str
    title: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    source: str
    fixes: tuple[Fix, ...]
    context: re.Pattern[str] | None = None
    exception_only: bool = False
    """The text is too common in logs to count outside an exception."""

    def fits(self, text: str) -> bool:
        return bool(self.pattern.search(text)) and (self.context is None or bool(self.context.search(text)))


def _manual(text: str, risk: str = "none") -> Fix:
    return Fix(text, FixKind.MANUAL, risk)


_FEWER_TOKENS = Fix(
    "train on fewer tokens at a time",
    FixKind.RESUME,
    "slower steps",
    (("training.micro_batch_size", 1),),
)
_SHORT_CHUNKS = Fix(
    "compute log-probs in chunks",
    FixKind.RESUME,
    "slower",
    (("training.log_probs_chunk_size", 1024),),
)


def _re(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_CUDA_OOM = _re(r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError: (?:CUDA|HIP)")

KNOWN_TEXTS: tuple[KnownText, ...] = (
    KnownText(
        "SY12",
        "The engine does not fit its share of the GPU",
        _re(r"Not enough memory\. Please try to increase --mem-fraction-static"),
        "the engine's weights need more than the share of the GPU that it was given",
        "raise the share (it is a share of everything, weights included): mem_fraction_static",
        "sglang-omni #292: at start the share must be raised, at run time lowered",
        (_manual("raise --sglang-mem-fraction-static, or spread the engine over more GPUs"),),
    ),
    KnownText(
        "SY11",
        "Out of GPU memory when the engine wakes up",
        _CUDA_OOM,
        "trainer and engine share the GPUs, and what the trainer keeps leaves too little for the engine",
        "lower mem_fraction_static to 0.7 or 0.6; offload more of the trainer",
        "slime debug.md",
        (_manual("lower --sglang-mem-fraction-static to 0.7, then 0.6", "less room for the KV cache"),),
        context=_re(r"wake_up|resume_memory|onload|release_memory|torch_memory_saver"),
    ),
    KnownText(
        "SY10",
        "The GPU ran out of memory",
        _CUDA_OOM,
        "the GPU ran out of memory: a batch with more or longer sequences than before needs more for "
        "activations and logits",
        "fewer tokens per micro-batch, log-probs in chunks, more context parallelism; an allocator split "
        "size of sequence / CP x vocabulary x 2 bytes against fragmentation",
        "slime FAQ 3; S#381; S#1951",
        (_FEWER_TOKENS, _SHORT_CHUNKS),
    ),
    KnownText(
        "SY13",
        "Illegal memory access",
        _re(r"illegal memory access"),
        "a kernel wrote outside its memory; often an out-of-memory condition in disguise",
        "treat it as out of memory first; then switch speculative decoding and CUDA graphs off",
        "slime FAQ 11",
        (_FEWER_TOKENS, _manual("switch speculative decoding and CUDA graphs off", "slower")),
    ),
    KnownText(
        "SY16",
        "A broken compile cache",
        _re(r"JSONDecodeError"),
        "the cache of compiled kernels was torn by processes that wrote it at once",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, or delete the cache",
        "slime FAQ 12",
        (_manual("export TORCHINDUCTOR_FORCE_DISABLE_CACHES=1", "compiles again at every start"),),
        context=_re(r"inductor|triton|torch/_dynamo"),
        exception_only=True,
    ),
    KnownText(
        "SY14",
        "The machine ran out of memory",
        _re(
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|^MemoryError|Cannot allocate memory"
            r"|Out of memory: Killed process|oom-kill|OOMKilled"
            r"|killed due to (?:the node running low on memory|memory pressure)"
        ),
        "host memory ran out: offloaded optimizer state, several engines loading at once, or a leak",
        "fewer tokens at a time; offload to disk; start engines one after another",
        "S#1740; S#1237; PR M#572",
        (_FEWER_TOKENS,),
    ),
    KnownText(
        "SY15",
        "The job asks for more than the cluster has",
        _re(
            r"No available node types can fulfill resource request|cannot be scheduled right now"
            r"|The placement group .* (?:is infeasible|cannot be created)"
        ),
        "the requested GPUs or CPUs exceed what the cluster offers, so the job waits for ever",
        "colocated: actor nodes x GPUs per node must fit; else the rollout GPUs come on top",
        "slime FAQ 2",
        (_manual("compare `ray status` with the plan: miles train --dry-run"),),
    ),
    KnownText(
        "SY20",
        "The disk is full",
        _re(r"No space left on device|Disk quota exceeded"),
        "the disk is full",
        "free space, or keep fewer checkpoints",
        "miles",
        (
            Fix(
                "free space, or keep fewer checkpoints",
                FixKind.RESUME,
                "older checkpoints are deleted",
                (("checkpoint.keep_checkpoints", 2),),
            ),
        ),
    ),
    KnownText(
        "SY3",
        "A collective timed out",
        _re(r"WorkNCCL.*Timeout\(ms\)|Watchdog caught collective operation timeout"),
        "a collective timed out: one rank never entered it. It died, hangs, or went another way through "
        "the code",
        "find the missing rank: the one whose log does not carry the message, or stops first; the flight "
        "recorder names it; --distributed-timeout-minutes only where the rank is merely slow",
        "torch.distributed; M#574",
        (
            _manual(
                "find the rank without this message; TORCH_NCCL_TRACE_BUFFER_SIZE=20000 and "
                "NCCL_DEBUG=INFO tell more next time"
            ),
        ),
    ),
)
"""In the order in which they are tried; a collective that timed out is what is left of most failures."""

ECHOES = frozenset({"SY3"})
"""Texts that other ranks print when one has failed."""


def known_text(text: str) -> KnownText | None:
    """The first row that fits."""
    return next((known for known in KNOWN_TEXTS if known.fits(text)), None)
