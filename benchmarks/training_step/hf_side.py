"""The Hugging Face model in a plain torch loop: forward, clipped policy loss, backward, clip, AdamW.

`--layout` says how samples become micro-batches: `padded` is the whole step in one right-padded batch,
`sorted` are right-padded batches of samples of like length with at most TOKEN_BUDGET cells, `packed` are rows
of TOKEN_BUDGET tokens with restarting positions. In every layout only rows that are trained on pass the head,
experts run as grouped matrix products, attention is torch's, and AdamW is fused: the fastest we know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from training_step import common
from training_step.workloads import TOKEN_BUDGET


@dataclass(frozen=True)
class Rows:
    """One micro-batch. `at` are the flat places of the rows trained on, the last four belong to those."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    at: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor


def micro_batches(batch: dict[str, np.ndarray], layout: str) -> Iterator[Rows]:
    lengths = batch["lengths"] - 1
    order = np.arange(len(lengths))
    if layout == "padded":
        yield grid(batch, order)
        return
    longest_first = order[np.argsort(-lengths, kind="stable")]
    while len(longest_first):
        widths = lengths[longest_first]
        cells = widths[0] * np.arange(1, len(widths) + 1) if layout == "sorted" else np.cumsum(widths)
        count = max(1, int((cells <= TOKEN_BUDGET).sum()))
        yield (grid if layout == "sorted" else packed)(batch, longest_first[:count])
        longest_first = longest_first[count:]


def grid(batch: dict[str, np.ndarray], indices: np.ndarray) -> Rows:
    """Right-padded [N, L]; without a mask when nothing is padded."""
    lengths = batch["lengths"][indices] - 1
    width = int(lengths.max())
    starts = np.concatenate([[0], np.cumsum(batch["lengths"])])
    tokens = np.zeros((len(indices), width), np.int64)
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        tokens[row, :length] = batch["tokens"][starts[index] : starts[index] + length]
    inside = np.arange(width) < lengths[:, None]
    offsets = np.arange(len(indices)) * width
    mask = None if inside.all() else torch.from_numpy(inside.astype(np.int64))
    positions = np.broadcast_to(np.arange(width), inside.shape)
    return _rows(batch, indices, tokens, positions, mask, offsets)


def packed(batch: dict[str, np.ndarray], indices: np.ndarray) -> Rows:
    """[1, T] with positions that restart at every sample: transformers keeps the samples apart by them."""
    lengths = batch["lengths"][indices] - 1
    starts = np.concatenate([[0], np.cumsum(batch["lengths"])])
    tokens = [batch["tokens"][starts[i] : starts[i] + n] for i, n in zip(indices, lengths, strict=True)]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return _rows(batch, indices, np.concatenate(tokens)[None], positions, None, offsets)


def _rows(
    batch: dict[str, np.ndarray],
    indices: np.ndarray,
    tokens: np.ndarray,
    positions: np.ndarray,
    mask: Tensor | None,
    offsets: np.ndarray,
) -> Rows:
    starts = np.concatenate([[0], np.cumsum(batch["lengths"])])
    response_starts = np.concatenate([[0], np.cumsum(batch["lengths"] - batch["prompt_lengths"])])
    at, targets, old, advantages = [], [], [], []
    for index, offset in zip(indices, offsets, strict=True):
        prompt, length = batch["prompt_lengths"][index], batch["lengths"][index]
        at.append(offset + np.arange(prompt - 1, length - 1))
        targets.append(batch["tokens"][starts[index] + prompt : starts[index] + length])
        old.append(batch["old_log_probs"][response_starts[index] : response_starts[index + 1]])
        advantages.append(np.full(length - prompt, batch["advantages"][index]))
    count = response_starts[-1]
    tensors = [torch.from_numpy(np.concatenate(parts)) for parts in (at, targets, old, advantages)]
    weights = torch.full((len(tensors[0]),), 1 / count)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(positions.copy()), mask, *tensors, weights)


def loss_of(model: torch.nn.Module, rows: Rows) -> Tensor:
    hidden = model.model(
        input_ids=rows.tokens, position_ids=rows.positions, attention_mask=rows.mask, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, rows.at)).float()
    log_probs = -torch.nn.functional.cross_entropy(logits, rows.targets, reduction="none")
    ratio = (log_probs - rows.old).exp()
    clipped = ratio.clamp(1 - common.EPS_CLIP, 1 + common.EPS_CLIP_HIGH)
    return (rows.weights * -torch.minimum(ratio * rows.advantages, clipped * rows.advantages)).sum()


def main() -> None:
    options = common.arguments()
    torch.set_num_threads(1)
    moe = hasattr(AutoConfig.from_pretrained(options.checkpoint), "num_experts")
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        **({"experts_implementation": "grouped_mm"} if moe else {}),
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=common.LEARNING_RATE,
        betas=common.BETAS,
        eps=common.EPS,
        weight_decay=0,
        fused=True,
    )
    batch = common.read_batch(options.batch)

    def step() -> tuple[float, float]:
        loss = 0.0
        for rows in micro_batches(batch, options.layout):
            part = loss_of(model, rows)
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), common.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm.item()

    common.measure(step, options.steps)


if __name__ == "__main__":
    main()
