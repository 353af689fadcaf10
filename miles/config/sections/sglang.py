"""`[sglang]`: SGLang's server arguments, under their own names and unchanged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveInt

from miles.config.sections.base import Section


class SglangSection(Section):
    """Server arguments (`--sglang-<name>`): those that miles reads itself are typed, the others pass through.

    The native engine obeys the typed ones as well.
    """

    model_config = ConfigDict(extra="allow")

    chunked_prefill_size: PositiveInt | Literal[-1] | None = None
    """Most prompt tokens read between two decode steps; a longer prompt is read in chunks (-1: always whole).
    Default of the native engine: 16384."""

    max_total_tokens: PositiveInt | None = None
    """Tokens that the KV cache holds; requests beyond wait. Default of the native engine: every running
    request at the full context."""

    disable_cuda_graph: bool = False
    """Launch every kernel of a step from the host instead of replaying captured steps."""

    cuda_graph_max_bs_decode: PositiveInt | None = None
    """Most requests of a decode step that is captured as a CUDA graph. Default of the native engine, on GPUs:
    all that run."""

    speculative_algorithm: Literal["EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM"] | None = None
    """Speculative decoding with this kind of draft; default: none."""

    speculative_num_steps: NonNegativeInt | None = None
    """Tokens the draft proposes in a row; 0: plain decoding (native engine)."""

    speculative_eagle_topk: PositiveInt | None = None
    """Branches of the draft at each depth; 1 is a chain."""

    speculative_num_draft_tokens: PositiveInt | None = None
    """Tokens verified at once; with a chain: steps + 1."""

    speculative_draft_model_path: str | None = None
    """Checkpoint of the draft; default: the MTP layers of the policy."""

    enable_draft_weights_cpu_backup: bool = False
    """Keep a host copy of the draft's weights while the engine gives its GPU memory back."""

    def server_args(self) -> dict[str, Any]:
        """Every argument that was set, by SGLang's own name."""
        return self.model_dump(exclude_defaults=True)
