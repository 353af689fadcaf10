"""User functions inside the loss: what each is given, and what it has to return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.algorithms.corrections import Corrected, CorrectionRows, CustomCorrection
from miles.config import RunConfig
from miles.data.hooks import Hook, HookError, blame, hook_name, hook_place, load_hook


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
        result = call(
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


def call(hook: Hook, *arguments: Any, **named: Any) -> Any:
    """Call a synchronous hook; whatever it raises becomes a HookError with the user's file and line."""
    try:
        return hook(*arguments, **named)
    except Exception as error:  # User code may raise anything, and all of it is theirs to see.
        raise blame(error, hook) from error


def require_rows(hook: Hook, values: Any, like_T: Tensor) -> None:
    """Raise HookError unless `values` has one number for each row of `like_T`."""
    if not isinstance(values, Tensor) or values.shape != like_T.shape:
        raise _wrong(hook, values, f"a tensor [{like_T.numel()}], one number for each trained token")


def _wrong(hook: Hook, got: Any, wanted: str) -> HookError:
    what = f"a tensor {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
    return HookError(
        f"{hook_name(hook)} returned {what}", where=hook_place(hook), why=f"it has to return {wanted}"
    )
