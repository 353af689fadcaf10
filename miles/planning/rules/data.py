"""Rules on prompt data, other files, lengths and rewards."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.config.relations import HOOKS
from miles.planning.facts.data import DataFacts
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject

NEEDS_LABEL = ("exact", "math", "dapo", "deepscaler", "f1", "gpqa")
"""Verifiers that compare a response with an expected answer."""

PYTHON_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*|.+\.py:[A-Za-z_]\w*")
"""`package.module.function`, `package.module:function` or `file.py:function`."""


@rule(
    "DAT1",
    Severity.ERROR,
    title="prompt data is missing",
    cause="rollouts and evaluations draw their prompts from these files",
    fix="set --prompt-data to a JSONL or Parquet file, or to builtin:sort/train",
    local=True,
)
def data_missing(subject: Subject) -> Iterator[Found]:
    if subject.config.data.prompt_data is None:
        yield Found("prompt_data is not set", "data.prompt_data")
    for data in _all(subject):
        if not data.exists:
            yield Found(f"{data.path}: {data.problem}", data.setting, _similar(data))


def _similar(data: DataFacts) -> str:
    return f"did you mean {data.suggestion}?" if data.suggestion else ""


@rule(
    "DAT2",
    Severity.ERROR,
    title="prompt data cannot be read",
    cause="the first rows hold no prompt, so no row would",
    fix="look at the rows: miles data show FILE",
)
def data_unreadable(subject: Subject) -> Iterator[Found]:
    for data in _all(subject):
        if data.exists and data.problem:
            look = f"look at the rows: miles data show {data.path}"
            yield Found(f"{data.path}: {data.problem}", data.setting, look)
        elif data.exists and data.num_rows == 0:
            yield Found(f"{data.path} has no rows", data.setting, "name a file with prompts")


@rule(
    "DAT3",
    Severity.ERROR,
    title="a column is not there",
    cause="the named column is in none of the first rows",
    fix="name a column that exists, or add it to the data",
)
def column_missing(subject: Subject) -> Iterator[Found]:
    for data in _all(subject):
        if not data.keys:
            continue
        for setting, column in data.columns:
            if column not in data.keys:
                yield Found(
                    f"{data.path} has no column {column!r}; it has {', '.join(sorted(data.keys)) or 'none'}",
                    setting,
                )


@rule(
    "DAT4",
    Severity.WARNING,
    title="some rows are bad",
    cause="rows that cannot be read are left out and counted while the run goes on",
    fix="mend them, or refuse such files: --set data.on_bad_row=refuse",
)
def bad_rows(subject: Subject) -> Iterator[Found]:
    if subject.config.data.on_bad_row == "skip":
        yield from _bad_rows(subject)


@rule(
    "DAT5",
    Severity.ERROR,
    title="some rows are bad, and on_bad_row is `refuse`",
    cause="the run was told not to start on data with rows that cannot be read",
    fix="mend them, or leave them out: --set data.on_bad_row=skip",
)
def bad_rows_refused(subject: Subject) -> Iterator[Found]:
    if subject.config.data.on_bad_row == "refuse":
        yield from _bad_rows(subject)


def _bad_rows(subject: Subject) -> Iterator[Found]:
    for data in _all(subject):
        if data.bad_rows and not data.problem:
            line, reason = data.bad_rows[0]
            yield Found(
                f"{data.path}: {len(data.bad_rows)} of the first {data.sampled_rows} rows; "
                f"line {line}: {reason}",
                data.setting,
            )


@rule(
    "DAT6",
    Severity.WARNING,
    title="fewer prompts than one rollout needs",
    cause="a rollout would draw the same prompt more than once",
    fix="lower --rollout-batch-size, or add prompts",
)
def few_prompts(subject: Subject) -> Iterator[Found]:
    prompts, wanted = subject.facts.prompts, subject.config.rollout.rollout_batch_size
    if prompts and prompts.num_rows and wanted and prompts.num_rows < wanted:
        yield Found(f"{prompts.num_rows} prompts for rollouts of {wanted}", "rollout.rollout_batch_size")


@rule(
    "DAT7",
    Severity.ERROR,
    title="no chat template",
    cause="apply_chat_template renders prompts with a template that the checkpoint does not have",
    fix="set --chat-template-path, or leave --apply-chat-template out",
)
def chat_template_missing(subject: Subject) -> Iterator[Found]:
    data, checkpoint = subject.config.data, subject.facts.checkpoint
    known = checkpoint.state in ("directory", "builtin")
    if (
        data.apply_chat_template
        and data.chat_template_path is None
        and known
        and not checkpoint.has_chat_template
    ):
        yield Found(f"{checkpoint.name} has no chat template", "data.apply_chat_template")


@rule(
    "DAT8",
    Severity.ERROR,
    title="prompts are chat messages, but no chat template is applied",
    cause="a list of messages becomes text only through a chat template",
    fix="add --apply-chat-template",
)
def messages_without_template(subject: Subject) -> Iterator[Found]:
    if subject.config.data.apply_chat_template:
        return
    for data in _all(subject):
        if data.has_messages:
            yield Found(f"{data.path} holds lists of messages", data.setting)


@rule(
    "FIL1",
    Severity.ERROR,
    title="a file or directory is missing",
    cause="the run would end when it opens it, after the work that comes before",
    fix="check the path",
    local=True,
)
def path_missing(subject: Subject) -> Iterator[Found]:
    for missing in subject.facts.missing:
        yield Found(f"{missing.path} is not {missing.expected}", missing.setting)


@rule(
    "FIL2",
    Severity.ERROR,
    title="a function of yours is not in its file",
    cause="the run would end when it calls it, after the work that comes before",
    fix="mend the file",
    local=True,
)
def hook_missing(subject: Subject) -> Iterator[Found]:
    for broken in subject.facts.broken_hooks:
        yield Found(broken.what, broken.setting, broken.fix)


@rule(
    "CTX1",
    Severity.ERROR,
    title="the longest sequence does not fit the model's positions",
    cause="positions beyond max_position_embeddings were never trained and give noise",
    fix="lower --rollout-max-response-len or --rollout-max-prompt-len",
)
def context_too_long(subject: Subject) -> Iterator[Found]:
    spec, rollout = subject.facts.checkpoint.spec, subject.config.rollout
    if spec is None:
        return
    limit = spec.max_position_embeddings
    if rollout.rollout_max_context_len is not None:
        if rollout.rollout_max_context_len > limit:
            yield Found(
                f"rollout_max_context_len {rollout.rollout_max_context_len} > {limit} positions",
                "rollout.rollout_max_context_len",
            )
    elif rollout.rollout_max_response_len is not None:
        prompt = rollout.rollout_max_prompt_len or subject.facts.longest_prompt or 0
        if prompt + rollout.rollout_max_response_len > limit:
            yield Found(
                f"{prompt} prompt + {rollout.rollout_max_response_len} response tokens > {limit} positions",
                "rollout.rollout_max_response_len",
                _room_for_prompts(limit - rollout.rollout_max_response_len),
            )


def _room_for_prompts(room: int) -> str:
    if room < 1:
        return ""
    return f"lower --rollout-max-response-len, or leave longer prompts out: --rollout-max-prompt-len {room}"


@rule(
    "CTX2",
    Severity.ERROR,
    title="the response length is not set",
    cause="without a limit a response may fill the whole context; slime and miles have no default either",
    fix="set --rollout-max-response-len",
)
def response_length_unset(subject: Subject) -> Iterator[Found]:
    if subject.config.rollout.rollout_max_response_len is None:
        yield Found("rollout_max_response_len is not set", "rollout.rollout_max_response_len")


@rule(
    "CTX3",
    Severity.WARNING,
    title="prompts leave no room for a whole response",
    cause="prompt and response share rollout_max_context_len, so responses to long prompts are cut short",
    fix="raise --rollout-max-context-len, or lower --rollout-max-prompt-len",
)
def context_truncates(subject: Subject) -> Iterator[Found]:
    rollout = subject.config.rollout
    if rollout.rollout_max_context_len is None or rollout.rollout_max_response_len is None:
        return
    longest = rollout.rollout_max_prompt_len or subject.facts.longest_prompt or 0
    prompt = min(longest, rollout.rollout_max_context_len)
    room = rollout.rollout_max_context_len - prompt
    if room < rollout.rollout_max_response_len:
        yield Found(
            f"a prompt of {prompt} tokens leaves {room} of {rollout.rollout_max_response_len} response "
            "tokens",
            "rollout.rollout_max_context_len",
        )


@rule(
    "CTX4",
    Severity.WARNING,
    title="prompts are longer than the limit",
    cause="prompts above rollout_max_prompt_len are left out of training and counted",
    fix="raise --rollout-max-prompt-len",
)
def prompts_too_long(subject: Subject) -> Iterator[Found]:
    limit, prompts = subject.config.rollout.rollout_max_prompt_len, subject.facts.prompts
    if limit is None or prompts is None:
        return
    longer = sum(length > limit for length in prompts.prompt_tokens)
    if 0 < longer < len(prompts.prompt_tokens):
        yield Found(
            f"{longer} of {len(prompts.prompt_tokens)} sampled prompts have more than {limit} tokens "
            f"(the longest: {max(prompts.prompt_tokens)})",
            "rollout.rollout_max_prompt_len",
        )


@rule(
    "CTX5",
    Severity.ERROR,
    title="every prompt is longer than the limit",
    cause="prompts above the limit are left out, and then there is nothing to sample",
    fix="raise --rollout-max-prompt-len",
)
def no_prompt_fits(subject: Subject) -> Iterator[Found]:
    training, held_out = "rollout.rollout_max_prompt_len", "eval.eval_max_prompt_len"
    limit = subject.config.rollout.rollout_max_prompt_len
    eval_limit = subject.config.eval.eval_max_prompt_len
    for data in _all(subject):
        own = eval_limit is not None and data is not subject.facts.prompts
        most = eval_limit if own else limit
        shortest = min(data.prompt_tokens, default=0)
        if most is not None and shortest > most:
            yield Found(
                f"{data.path}: the shortest of {len(data.prompt_tokens)} sampled prompts has {shortest} "
                f"tokens, the limit is {most}",
                held_out if own else training,
                "raise --eval-max-prompt-len" if own else "",
            )


@rule(
    "REW1",
    Severity.ERROR,
    title="nothing judges the responses",
    cause="reinforcement learning needs a reward: a built-in verifier or a function of yours",
    fix="set --rm-type exact, --rm-type math, or --custom-rm-path package.module.function",
)
def reward_unset(subject: Subject) -> Iterator[Found]:
    config, reward = subject.config, subject.config.reward
    if config.algorithm.loss_type == "sft_loss" or reward.rm_type or reward.custom_rm_path:
        return
    if not config.distillation.use_opd:
        yield Found("rm_type and custom_rm_path are both unset", "reward.rm_type")
    elif config.eval.eval_prompt_data:
        yield Found(
            "a teacher advises in training, and judges no evaluation",
            "eval.eval_prompt_data",
            "leave --eval-prompt-data out, or set --rm-type and let --custom-reward-post-process-path return "
            "zeros for training",
        )


@rule(
    "REW2",
    Severity.ERROR,
    title="the verifier has no answers to compare with",
    cause="this verifier compares each response with the expected answer of its row",
    fix="set --label-key to the column of the expected answer",
)
def label_unset(subject: Subject) -> Iterator[Found]:
    reward = subject.config.reward
    if reward.rm_type in NEEDS_LABEL and not reward.custom_rm_path and subject.config.data.label_key is None:
        yield Found(f"rm_type {reward.rm_type!r} without label_key", "data.label_key")


@rule(
    "REW5",
    Severity.WARNING,
    title="some rows have no expected answer",
    cause="a verifier compares with the answer of the row; against an empty one nothing or everything is "
    "right",
    fix="mend the rows: miles data show FILE",
)
def labels_empty(subject: Subject) -> Iterator[Found]:
    reward = subject.config.reward
    if reward.rm_type not in NEEDS_LABEL or reward.custom_rm_path:
        return
    for data in _all(subject):
        if data.unlabelled and not data.problem:
            yield Found(f"{data.path}: {data.unlabelled} of the first {data.sampled_rows} rows", data.setting)


@rule(
    "REW6",
    Severity.WARNING,
    title="expected answers are whole solutions",
    cause="the exact verifier compares a response with the label word by word; no response repeats a worked "
    "solution, so every reward is 0",
    fix="use --rm-type math, or a column that holds the answer alone",
)
def labels_are_solutions(subject: Subject) -> Iterator[Found]:
    reward = subject.config.reward
    if reward.rm_type != "exact" or reward.custom_rm_path:
        return
    for data in _all(subject):
        if data.solutions and not data.problem:
            yield Found(f"{data.path}: {data.solutions} of the first {data.sampled_rows} rows", data.setting)


@rule(
    "REW3",
    Severity.ERROR,
    title="the path of a hook is not a path",
    cause="hooks are imported when the run starts, by package.module.function or file.py:function",
    fix="write it as package.module.function",
)
def hook_path(subject: Subject) -> Iterator[Found]:
    for setting in HOOKS:
        path = subject.value(setting)
        if path is not None and not PYTHON_PATH.fullmatch(path):
            yield Found(f"{path!r} is not importable", setting)


@rule(
    "REW4",
    Severity.WARNING,
    title="two rewards are set",
    cause="a reward function replaces the built-in verifier",
    fix="leave --rm-type out",
)
def two_rewards(subject: Subject) -> Iterator[Found]:
    reward = subject.config.reward
    if reward.rm_type and reward.custom_rm_path:
        yield Found(
            f"custom_rm_path {reward.custom_rm_path} wins over rm_type {reward.rm_type}", "reward.rm_type"
        )


def _all(subject: Subject) -> tuple[DataFacts, ...]:
    prompts = (subject.facts.prompts,) if subject.facts.prompts else ()
    return prompts + subject.facts.evals
