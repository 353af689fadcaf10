"""How far the native engine guesses ahead, from the `speculative_…` flags and what is left open."""

from __future__ import annotations

from dataclasses import dataclass

from miles.arch import ArchSpec, MtpSpec, with_mtp
from miles.config import RunConfig
from miles.config.sections.sglang import SglangSection

OWN_DRAFT = ("EAGLE", "NEXTN")
"""Algorithms whose draft is the policy's own MTP layers where no other is named."""

DEFAULT_STEPS = 3
"""As in SGLang for a draft of MTP layers; with one branch that is four tokens to verify."""


@dataclass(frozen=True)
class SpeculationPlan:
    """A draft that guesses `num_steps` deep in `eagle_topk` branches, `num_draft_tokens` nodes at once."""

    algorithm: str
    num_steps: int
    eagle_topk: int
    num_draft_tokens: int
    draft_model_path: str | None = None

    @property
    def most_draft_tokens(self) -> int:
        """Nodes that such a tree can have, the last token included."""
        if self.eagle_topk == 1 or self.algorithm == "NGRAM":
            return 1 + self.num_steps * self.eagle_topk
        return 1 + self.eagle_topk + (self.num_steps - 1) * self.eagle_topk**2


def plan_speculation(sglang: SglangSection) -> SpeculationPlan | None:
    """None without speculative decoding, which 0 steps switch off as well."""
    steps = DEFAULT_STEPS if sglang.speculative_num_steps is None else sglang.speculative_num_steps
    if sglang.speculative_algorithm is None or steps == 0:
        return None
    branches = sglang.speculative_eagle_topk or 1
    tokens = sglang.speculative_num_draft_tokens or 1 + steps * branches
    return SpeculationPlan(
        sglang.speculative_algorithm, steps, branches, tokens, sglang.speculative_draft_model_path
    )


def mtp_layers(config: RunConfig, saved: int) -> int:
    """MTP layers that a run uses: as many as the run file says; where it says nothing, those `saved` in the
    checkpoint that the engine drafts with.
    """
    asked, engine = config.speculative.mtp_num_layers, config.sglang
    if asked is not None:
        return asked
    drafts = engine.speculative_algorithm in OWN_DRAFT and engine.speculative_draft_model_path is None
    return saved if drafts else 0


def drafting_layers(config: RunConfig, spec: ArchSpec) -> MtpSpec | None:
    """The MTP layers that an engine drafts with; None for another draft, or none."""
    plan = plan_speculation(config.sglang)
    if plan is None or plan.algorithm not in OWN_DRAFT or plan.draft_model_path is not None:
        return None
    return with_mtp(spec, mtp_layers(config, spec.mtp_num_layers)).mtp


def mtp_training_steps(config: RunConfig) -> int:
    """Tokens ahead that the MTP layers are taught: what the run file says, else what the engine guesses."""
    own, plan = config.speculative, plan_speculation(config.sglang)
    drafts = plan is not None and plan.algorithm in OWN_DRAFT
    guessed = plan.num_steps if plan is not None and drafts else 1
    return own.mtp_training_steps or max(guessed, own.mtp_num_layers or 1)
