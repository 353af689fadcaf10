"""Rules on speculative decoding and the training of its draft."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.speculation import OWN_DRAFT, mtp_training_steps
from miles.planning.subject import Subject


@rule(
    "SPC1",
    Severity.WARNING,
    title="the draft does not follow the policy",
    cause="a draft that stays as it was accepts fewer tokens with every update of the policy (0.91 to 0.4 "
    "in 200 steps)",
    fix="train it along: --mtp-num-layers 1 --enable-mtp-training",
)
def draft_frozen(subject: Subject) -> Iterator[Found]:
    sglang, speculative = subject.config.sglang, subject.config.speculative
    if (
        sglang.speculative_algorithm in (*OWN_DRAFT, "EAGLE3", "STANDALONE")
        and not speculative.enable_mtp_training
    ):
        yield Found(
            f"speculative_algorithm {sglang.speculative_algorithm} without enable_mtp_training",
            "sglang.speculative_algorithm",
        )


@rule(
    "SPC2",
    Severity.ERROR,
    title="MTP training with context parallelism",
    cause="the MTP targets are tokens shifted by two, of which some lie on another rank; with context "
    "parallelism the loss was seen to go wrong (GLM-4.7-Flash)",
    fix="use --context-parallel-size 1",
)
def mtp_with_context_parallel(subject: Subject) -> Iterator[Found]:
    size = subject.config.parallel.context_parallel_size
    if subject.config.speculative.enable_mtp_training and size > 1:
        yield Found(f"enable_mtp_training with CP {size}", "parallel.context_parallel_size")


@rule(
    "SPC3",
    Severity.ERROR,
    title="the number of draft tokens does not follow from steps and branches",
    cause="a chain of n steps gives n + 1 tokens to verify; SGLang changes another number without saying so",
    fix="leave --sglang-speculative-num-draft-tokens out, or set it to steps + 1",
)
def draft_tokens_inconsistent(subject: Subject) -> Iterator[Found]:
    sglang = subject.config.sglang
    steps, branches, tokens = (
        sglang.speculative_num_steps,
        sglang.speculative_eagle_topk,
        sglang.speculative_num_draft_tokens,
    )
    if steps is None or tokens is None:
        return
    if branches in (None, 1) and tokens != steps + 1:
        yield Found(
            f"{steps} steps of one branch and {tokens} draft tokens",
            "sglang.speculative_num_draft_tokens",
            f"set --sglang-speculative-num-draft-tokens {steps + 1}",
        )


@rule(
    "SPC5",
    Severity.ERROR,
    title="a tree of guesses that cannot be grown",
    cause="a draft of so many steps and branches has fewer guesses than are to be verified, or none",
    fix="leave --sglang-speculative-num-draft-tokens out, or ask for more steps or branches",
)
def tree_too_small(subject: Subject) -> Iterator[Found]:
    plan, sglang = subject.speculation, subject.config.sglang
    if plan is not None and plan.eagle_topk > 1 and not 2 <= plan.num_draft_tokens <= plan.most_draft_tokens:
        yield Found(
            f"{plan.num_draft_tokens} draft tokens from {plan.num_steps} steps of {plan.eagle_topk} branches",
            "sglang.speculative_num_draft_tokens",
            f"set --sglang-speculative-num-draft-tokens to 2 … {plan.most_draft_tokens}",
        )
    if sglang.speculative_num_steps == 0 and subject.config.rollout.backend != "native":
        yield Found(
            "speculative_num_steps 0, which the native engine alone takes for plain decoding",
            "sglang.speculative_num_steps",
            "leave --sglang-speculative-algorithm out",
        )


LAYOUT_OF = {"EAGLE3": ("eagle3",), "EAGLE": ("eagle", "mtp"), "NEXTN": ("mtp",), "NGRAM": ()}
"""What a draft checkpoint may be; algorithms of SGLang that are not here take other models."""


@rule(
    "SPC6",
    Severity.ERROR,
    title="the draft checkpoint does not fit",
    cause="a draft reads the hidden states of its model and says tokens of its vocabulary, so it serves the "
    "model that it was trained beside, under the algorithm of its layout",
    fix="name the draft that was published for this model, with its algorithm",
)
def draft_does_not_fit(subject: Subject) -> Iterator[Found]:
    draft, algorithm = subject.facts.draft, subject.config.sglang.speculative_algorithm
    layouts = LAYOUT_OF.get(algorithm or "")
    if draft is None or layouts is None:
        return
    place = "sglang.speculative_draft_model_path"
    if not layouts:
        yield Found(f"{algorithm} with a draft checkpoint", place, "leave it out: it needs no draft model")
    elif draft.layout is None:
        yield Found(f"{draft.name}: {draft.problem}", place)
    elif draft.layout not in layouts:
        right = next(name for name, fitting in LAYOUT_OF.items() if draft.layout in fitting)
        yield Found(
            f"{algorithm}, and {draft.name} is a draft of {draft.layout} layout",
            place,
            f"--sglang-speculative-algorithm {right}",
        )


@rule(
    "SPC7",
    Severity.WARNING,
    title="MTP layers are trained that nobody drafts with",
    cause="an n-gram draft has no weights, and a draft checkpoint stays as it is: training the policy's own "
    "MTP layers costs compute and changes no guess",
    fix="leave --enable-mtp-training out, or draft with the policy's own layers",
)
def other_draft_trained(subject: Subject) -> Iterator[Found]:
    sglang = subject.config.sglang
    if sglang.speculative_algorithm is None or not subject.config.speculative.enable_mtp_training:
        return
    if sglang.speculative_draft_model_path is not None:
        yield Found("the engine drafts with a checkpoint of its own", "speculative.enable_mtp_training")
    elif sglang.speculative_algorithm not in OWN_DRAFT:
        name = sglang.speculative_algorithm
        yield Found(f"the engine drafts with {name}", "speculative.enable_mtp_training")


@rule(
    "SPC8",
    Severity.ERROR,
    title="MTP training that goes on from guesses, with sparse attention",
    cause="a guess behind a guess attends to keys of several passes, of which the indexer cannot choose; "
    "each MTP layer is trained on true tokens alone",
    fix="set --mtp-training-steps to the number of MTP layers",
)
def guesses_under_an_indexer(subject: Subject) -> Iterator[Found]:
    config, spec = subject.config, subject.spec
    if spec is None or not config.speculative.enable_mtp_training:
        return
    steps, layers = mtp_training_steps(config), config.speculative.mtp_num_layers or 1
    if steps > layers and spec.has_indexer:
        yield Found(
            f"{steps} steps of {layers} MTP layers",
            "speculative.mtp_training_steps",
            f"set --mtp-training-steps {layers}",
        )


@rule(
    "SPC4",
    Severity.ERROR,
    title="speculative decoding without a draft",
    cause="the draft is another checkpoint or the policy's own MTP layers; this checkpoint has none",
    fix="set --sglang-speculative-draft-model-path, or start from a checkpoint with MTP layers",
)
def no_draft(subject: Subject) -> Iterator[Found]:
    sglang, checkpoint = subject.config.sglang, subject.facts.checkpoint
    algorithm = sglang.speculative_algorithm
    if algorithm in (None, "NGRAM") or sglang.speculative_draft_model_path is not None:
        return
    if algorithm not in OWN_DRAFT:
        yield Found(f"{algorithm} needs a draft checkpoint", "sglang.speculative_algorithm")
    elif checkpoint.state == "directory" and not checkpoint.has_mtp_weights:
        yield Found(f"{algorithm}, and {checkpoint.name} has no MTP weights", "sglang.speculative_algorithm")
    elif checkpoint.state == "builtin" and subject.config.speculative.mtp_num_layers is None:
        yield Found(
            f"{algorithm}, and {checkpoint.name} is made without MTP layers",
            "sglang.speculative_algorithm",
            "have them made and taught in the warm start: --mtp-num-layers 1",
        )
