"""User functions inside the loss: what each is given, and what it has to return."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.algorithms.corrections import Corrected, CorrectionRows, CustomCorrection
from miles.algorithms.losses import LossOutput, LossRows
from miles.config import RunConfig
from miles.data.batch import TrainBatch
from miles.data.hooks import Hook, HookError, call_sync, hook_name, hook_place, load_hook
from miles.training.settings import CustomAdvantages, CustomLoss, CustomReducer


def custom_correction(path: str, config: RunConfig) -> CustomCorrection:
    """The function behind `--custom-tis-function-path`, called as slime and miles call it.

    `(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths)`
    returns `(pg_loss, modified_response_masks, metrics)`. `args` is the run's configuration. Lists have one
    tensor for each sequence of a micro-batch, of its trained tokens only: all masks are 1, and both lengths
    count them. `pg_loss` and metrics are flat over these sequences.
    """
    hook = load_hook(path, "--custom-tis-function-path")

    def correct(rows: CorrectionRows) -> Corrected:
        lengths = rows.sequences.lengths_N.tolist()
        result = call_sync(
            hook,
            config,
            pg_loss=rows.pg_loss_T,
            train_log_probs=list(rows.old_log_probs_T.detach().split(lengths)),
            rollout_log_probs=list(rows.rollout_log_probs_T.split(lengths)),
            loss_masks=list(rows.loss_mask_T.split(lengths)),
            total_lengths=lengths,
            response_lengths=lengths,
        )
        if not isinstance(result, tuple) or len(result) != 3:
            raise _wrong(hook, result, "(pg_loss, modified_response_masks, metrics)")
        loss_T, masks, metrics = result
        kept_T = torch.cat(list(masks)) if len(masks) else rows.loss_mask_T
        for value_T in (loss_T, kept_T, *metrics.values()):
            require_rows(hook, value_T, rows.loss_mask_T)
        named = {f"custom/{name}": value_T.detach().float() for name, value_T in metrics.items()}
        return Corrected(loss_T, kept_T.detach().to(loss_T.dtype), named)

    return correct


def custom_loss(path: str, config: RunConfig) -> CustomLoss:
    """The function behind `--custom-loss-function-path`: `(args, rows: LossRows)` returns a scalar loss, or
    `(loss, metrics)`.

    It is called for every micro-batch, and losses and metrics of a step are added up: weigh with
    `rows.weights_T`.
    """
    hook = load_hook(path, "--custom-loss-function-path")

    def loss_of(rows: LossRows) -> LossOutput:
        result = call_sync(hook, config, rows)
        loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        for value in (loss, *metrics.values()):
            if not isinstance(value, Tensor) or value.ndim:
                raise _wrong(hook, value, "a loss, or (loss, metrics): tensors of one number each")
        named = {f"custom/{name}": value.detach() for name, value in metrics.items()}
        return LossOutput(loss, {"loss": loss.detach()} | named)

    return loss_of


def custom_advantages(path: str, config: RunConfig) -> CustomAdvantages:
    """The function behind `--custom-advantage-function-path`: `(args, batch: TrainBatch)` returns advantages
    float32 [T], one for each row; those of untrained rows are not read. Every rank calls it.
    """
    hook = load_hook(path, "--custom-advantage-function-path")

    def advantages_of(batch: TrainBatch) -> np.ndarray:
        values = np.asarray(call_sync(hook, config, batch), dtype=np.float32)
        if values.shape != batch.loss_mask.shape or not np.isfinite(values[batch.loss_mask > 0]).all():
            raise _wrong(hook, values, f"[{batch.num_tokens}] finite numbers, one for each row of the batch")
        return values

    return advantages_of


def custom_reducer(path: str, by_token: bool) -> CustomReducer:
    """The function behind `--custom-pg-loss-reducer-function-path`, as slime and miles call it.

    `(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)` of all sequences of an optimizer
    step returns a function from the losses of all response tokens to one number: a sum over samples, or over
    tokens, that is divided by their number here. It has to be linear: its weights are read off it once.
    """
    hook = load_hook(path, "--custom-pg-loss-reducer-function-path")

    def weights_of(batch: TrainBatch, num_rollouts: int) -> Tensor:
        ends, lengths = batch.cu_seqlens[1:], batch.response_lengths
        rows = np.concatenate([np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)])
        masks = list(torch.from_numpy(batch.loss_mask[rows]).split(lengths.tolist()))
        reduce = call_sync(hook, (batch.lengths + 1).tolist(), lengths.tolist(), masks, by_token)
        divisor = float(batch.loss_mask.sum()) if by_token else num_rollouts
        weights_T = torch.zeros(batch.num_tokens)
        weights_T[torch.from_numpy(rows)] = _slope(hook, reduce, len(rows)) / divisor
        return weights_T

    return weights_of


def _slope(hook: Hook, reduce: Any, size: int) -> Tensor:
    """The weights [size] of a linear function."""
    zeros, ones = torch.zeros(size, requires_grad=True), torch.linspace(1.0, 2.0, size)
    with torch.enable_grad():
        value = call_sync(reduce, zeros)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise _wrong(hook, value, "a function from losses to one number, with a gradient")
        (slope,) = torch.autograd.grad(value, zeros)
    reduced = call_sync(reduce, ones)
    if value.item() != 0 or not torch.allclose(reduced, slope @ ones, rtol=1e-3, atol=1e-6):
        raise HookError(
            f"the reduction of {hook_name(hook)} is not linear",
            where=hook_place(hook),
            why="a step is cut into micro-batches, whose losses are added up",
            fix="weigh and add, as in sum(weight * loss)",
        )
    return slope


def require_rows(hook: Hook, values: Any, like_T: Tensor) -> None:
    """Raise HookError unless `values` has one number for each row of `like_T`."""
    if not isinstance(values, Tensor) or values.shape != like_T.shape:
        raise _wrong(hook, values, f"a tensor [{like_T.numel()}], one number for each trained token")


def _wrong(hook: Hook, got: Any, wanted: str) -> HookError:
    what = f"a tensor {list(got.shape)}" if isinstance(got, Tensor | np.ndarray) else type(got).__name__
    return HookError(
        f"{hook_name(hook)} returned {what}", where=hook_place(hook), why=f"it has to return {wanted}"
    )
