"""Built-in task: sort the digits of a number, learned from an imperfect teacher.

Prompt `sort 52913=`, label `12359`; the reward is 1 when the response is exactly the label and ends by
itself. 70 % of the demonstrations carry the same kind of mistake (one adjacent swap, half of them also lose a
digit), so the warm start learns to sort and to err: greedy decoding is already good, and what RL moves is the
*sampled* policy.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from miles.data.tasks.assets import TaskAssets, write_once

RECIPE_VERSION = 1
"""Goes up with every change of what is generated, so that a cache never mixes recipes."""

NUM_TRAIN = 8192
NUM_TEST = 512
NUM_DEMONSTRATIONS = 32_000
MIN_DIGITS, MAX_DIGITS = 4, 8
WRONG_FRACTION = 0.7
DROP_FRACTION_OF_WRONG = 0.5

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz =+-*/,;:.()<>?!"
VOCABULARY = (*SPECIAL_TOKENS, *CHARACTERS)

# Sixteenths of all digit strings, chosen by a hash of the string: no prompt is in two splits under any seed.
_SPLITS = {"test": range(0, 2), "train": range(2, 8), "demonstrations": range(8, 16)}


def model_config() -> dict[str, object]:
    """config.json of the task's policy: a Qwen3-MoE of 226,112 parameters in the published format."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "torch_dtype": "float32",
        "use_cache": True,
        "pad_token_id": VOCABULARY.index("<pad>"),
        "bos_token_id": VOCABULARY.index("<bos>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
    }


def build_assets(root: Path, seed: int) -> TaskAssets:
    """Write all files of the task under `root`, atomically; an existing `root` is checked and reused."""

    def write(target: TaskAssets) -> None:
        _write_checkpoint(target.checkpoint)
        for path, split, count in ((target.train, "train", NUM_TRAIN), (target.test, "test", NUM_TEST)):
            numbers = _draw_numbers(_generator(seed, split), split, count, unique=True)
            rows = (f'{{"input": "{_prompt(n)}", "label": "{_sorted(n)}"}}\n' for n in numbers)
            path.write_text("".join(rows))
        rows = (
            f'{{"prompt": "{_prompt(n)}", "response": "{answer}"}}\n' for n, answer in _demonstrations(seed)
        )
        target.demonstrations.write_text("".join(rows))

    return write_once(root, write)


def _prompt(digits: str) -> str:
    return f"sort {digits}="


def _sorted(digits: str) -> str:
    return "".join(sorted(digits))


def _generator(seed: int, split: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([RECIPE_VERSION, seed, list(_SPLITS).index(split)]))


def _buckets(codes: np.ndarray) -> np.ndarray:
    """Sixteenths by splitmix64 (Steele, Lea, Flood 2014) of uint64 codes."""
    z = codes + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) % np.uint64(16)


def _draw_numbers(rng: np.random.Generator, split: str, count: int, unique: bool) -> list[str]:
    """`count` digit strings of one split; lengths are uniform over 4 to 8 digits."""
    buckets = _SPLITS[split]
    drawn: list[str] = []
    seen: set[str] = set()
    while len(drawn) < count:
        # The leading 1 keeps leading zeros and the length, so a string and its code are the same thing.
        tens = 10 ** rng.integers(MIN_DIGITS, MAX_DIGITS + 1, size=4 * count)
        codes = tens + np.floor(rng.random(4 * count) * tens).astype(np.int64)
        bucket = _buckets(codes.astype(np.uint64))
        for code in codes[(bucket >= buckets.start) & (bucket < buckets.stop)].tolist():
            digits = str(code)[1:]
            if unique and digits in seen:
                continue
            seen.add(digits)
            drawn.append(digits)
    return drawn[:count]


def _demonstrations(seed: int) -> list[tuple[str, str]]:
    rng = _generator(seed, "demonstrations")
    numbers = _draw_numbers(rng, "demonstrations", NUM_DEMONSTRATIONS, unique=False)
    # Exactly the stated fractions: a shuffled range decides which rows are wrong and which lose a digit.
    rank = rng.permutation(len(numbers)) / len(numbers)
    where = rng.random((len(numbers), 2))
    return [
        (n, _answer(_sorted(n), float(r), float(swap), float(drop)))
        for n, r, (swap, drop) in zip(numbers, rank, where, strict=True)
    ]


def _answer(gold: str, rank: float, swap_at: float, drop_at: float) -> str:
    """The teacher's answer; `rank`, `swap_at` and `drop_at` are uniform in [0, 1)."""
    if rank >= WRONG_FRACTION:
        return gold
    # Swapping equal digits changes nothing; a number of one repeated digit can only lose a digit.
    places = [i for i in range(len(gold) - 1) if gold[i] != gold[i + 1]]
    answer = gold
    if places:
        i = places[int(swap_at * len(places))]
        answer = gold[:i] + gold[i + 1] + gold[i] + gold[i + 2 :]
    if not places or rank < WRONG_FRACTION * DROP_FRACTION_OF_WRONG:
        j = int(drop_at * len(answer))
        answer = answer[:j] + answer[j + 1 :]
    return answer


def _write_checkpoint(directory: Path) -> None:
    """config.json and the character-level tokenizer, in Hugging Face's files."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<pad>|<bos>|<eos>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "padding_side": "left",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(model_config(), indent=2) + "\n")
