"""The questions of the interview: one row each, from which flags, prompts, form and run file are made.

Only the standard library is imported here: `miles init --help` is made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

Value = str | int | float | bool
"""An answer. An empty text is an answer too: none."""


class Kind(StrEnum):
    """What an answer is made of."""

    TEXT = "text"
    INT = "a whole number"
    FLOAT = "a number"
    SWITCH = "yes or no"


@dataclass(frozen=True)
class Question:
    """One question; `suggest.py` knows its suggested answer and when it is asked."""

    id: str
    title: str
    """Two or three words, for the form and for the comment in the run file."""
    group: str
    help: str
    kind: Kind = Kind.TEXT
    setting: str = ""
    """The key of the run file; empty where an answer becomes something else than one key."""
    optional: bool = False
    """Whether the empty answer is one."""
    least: float = 1
    """The smallest number that is an answer."""

    @property
    def flag(self) -> str:
        """Its flag, under the name that `miles train` has for it."""
        return "--" + self.id.replace("_", "-")


MODEL, DATA, ROLLOUT, TRAINING = "Model", "Data and reward", "Rollout", "Training"

QUESTIONS = (
    Question(
        "hf_checkpoint",
        "Checkpoint",
        MODEL,
        "Directory of a Hugging Face checkpoint, or builtin:sort: a tiny MoE that is made on the spot.",
        setting="model.hf_checkpoint",
    ),
    Question(
        "profile",
        "Profile",
        MODEL,
        "What the run builds on: a recipe, or layers separated by commas. `miles profiles ls` lists them.",
    ),
    Question(
        "address",
        "Ray address",
        MODEL,
        "Address of a running Ray cluster that the run is submitted to; empty starts Ray here.",
        setting="cluster.address",
        optional=True,
    ),
    Question(
        "actor_num_nodes",
        "Nodes",
        MODEL,
        "Nodes that train the policy.",
        Kind.INT,
        setting="cluster.actor_num_nodes",
    ),
    Question(
        "actor_num_gpus_per_node",
        "GPUs per node",
        MODEL,
        "GPUs of each of these nodes.",
        Kind.INT,
        setting="cluster.actor_num_gpus_per_node",
        least=0,
    ),
    Question(
        "prompt_data",
        "Prompts",
        DATA,
        "JSON lines or Parquet file of prompts, path@[a:b] for a slice, or builtin:sort/train.",
        setting="data.prompt_data",
    ),
    Question(
        "input_key",
        "Prompt column",
        DATA,
        "Column of the prompt: text, or a list of chat messages.",
        setting="data.input_key",
    ),
    Question(
        "label_key",
        "Answer column",
        DATA,
        "Column of the expected answer; empty where the reward needs none.",
        setting="data.label_key",
        optional=True,
    ),
    Question(
        "apply_chat_template",
        "Chat template",
        DATA,
        "Whether prompts are rendered with the chat template of the checkpoint.",
        Kind.SWITCH,
        setting="data.apply_chat_template",
    ),
    Question(
        "rm_type",
        "Reward",
        DATA,
        "Built-in verifier that compares the response with the expected answer, or custom: your function.",
        setting="reward.rm_type",
    ),
    Question(
        "custom_rm_path",
        "Your reward",
        DATA,
        "Your reward function: file.py:function or package.module:function.",
        setting="reward.custom_rm_path",
    ),
    Question(
        "hold_out",
        "Held out",
        DATA,
        "Rows at the end of the prompts that are kept for evaluation; 0 for none.",
        Kind.INT,
        least=0,
    ),
    Question(
        "eval_prompt_data",
        "Evaluation",
        DATA,
        "File of held-out prompts; empty where rows are held out above, or for no evaluation.",
        optional=True,
    ),
    Question(
        "rollout_max_prompt_len",
        "Prompt limit",
        ROLLOUT,
        "Most tokens of a prompt; longer prompts are left out and counted.",
        Kind.INT,
        setting="rollout.rollout_max_prompt_len",
    ),
    Question(
        "rollout_max_response_len",
        "Response limit",
        ROLLOUT,
        "Most tokens of a response.",
        Kind.INT,
        setting="rollout.rollout_max_response_len",
    ),
    Question(
        "rollout_stop_token_ids",
        "Stop tokens",
        ROLLOUT,
        "Token ids that end a response besides the checkpoint's own, separated by commas.",
        optional=True,
    ),
    Question(
        "rollout_batch_size",
        "Prompts/rollout",
        ROLLOUT,
        "Prompts of one rollout.",
        Kind.INT,
        setting="rollout.rollout_batch_size",
    ),
    Question(
        "n_samples_per_prompt",
        "Samples/prompt",
        ROLLOUT,
        "Samples of each prompt: the group that advantages are normalised in.",
        Kind.INT,
        setting="rollout.n_samples_per_prompt",
    ),
    Question(
        "num_rollout",
        "Rollouts",
        ROLLOUT,
        "Rounds of sampling and training.",
        Kind.INT,
        setting="rollout.num_rollout",
    ),
    Question("lr", "Learning rate", TRAINING, "Peak learning rate.", Kind.FLOAT, "optimizer.lr", least=0),
    Question(
        "max_tokens_per_gpu",
        "Micro-batch",
        TRAINING,
        "Tokens of one forward and backward pass; what backward keeps grows with it.",
        Kind.INT,
        setting="training.max_tokens_per_gpu",
    ),
    Question(
        "max_running_requests",
        "Decoded at once",
        TRAINING,
        "Samples that the engine decodes together; its KV cache grows with it.",
        Kind.INT,
        setting="engine.max_running_requests",
    ),
    Question(
        "save_interval",
        "Save every",
        TRAINING,
        "Rollouts between two checkpoints.",
        Kind.INT,
        setting="checkpoint.save_interval",
    ),
)

BY_ID = {question.id: question for question in QUESTIONS}

CUSTOM = "custom"
"""The answer to `rm_type` that leads to a function of the user's."""
