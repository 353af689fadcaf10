"""Guessing ahead in an SGLang server without CUDA: in torch what its kernels for a chain of guesses do.

Imported by `cpu_server.py` where the server is told to speculate. SGLang 0.5.20 has CPU kernels for this in
a build of sgl_kernel that no registry offers; their names and argument orders are kept. A tree of guesses
(top-k above 1) is refused. SGLang's verifier takes the likeliest token on a CPU whatever the temperature is;
`sampling` makes it draw.

Shapes: B requests, T query tokens, N tokens to verify in a chain, H heads, D width of a head.
"""

import ctypes
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install(kernels: types.ModuleType) -> None:
    """Put the functions where SGLang looks for them. `kernels`: what stands in for `sgl_kernel`."""
    for function in (
        build_tree_kernel_efficient_cpu,
        verify_tree_greedy_cpu,
        assign_draft_cache_locs_contiguous_cpu,
        assign_extend_cache_locs_cpu,
        assign_req_to_token_pool_cpu,
        fill_accept_out_cache_loc_cpu,
        fill_bonus_tokens_cpu,
        copy_all_layer_kv_cache_cpu,
        build_draft_decode_metadata_cpu,
    ):
        setattr(kernels, function.__name__, function)
    torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
    torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
    _attend_with_them()
    _draw_when_verifying()


def _attend_with_them() -> None:
    """Target and draft attend through the two functions below: torch_native knows no draft."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    attention_registry.ATTENTION_BACKENDS["torch_native"] = attention_registry.create_intel_amx_backend
    create = DraftBackendFactory._create_backend

    def with_torch_native(self: Any, name: str, backends: dict[str, Any], *rest: Any, **more: Any) -> Any:
        return create(self, name, {**backends, "torch_native": backends["intel_amx"]}, *rest, **more)

    DraftBackendFactory._create_backend = with_torch_native


def _draw_when_verifying() -> None:
    from sglang.srt.speculative import eagle_utils, eagle_worker_common

    eagle_utils.eagle_sample = eagle_worker_common.eagle_sample = sampling(eagle_utils.eagle_sample)


def sampling(verify: Any) -> Any:
    """A verifier that draws the target's token at every place of the chain and keeps guesses equal to it.

    The largest of logits / temperature + Gumbel noise is such a draw, so the verifier's own argmax does it.
    """

    def drawing(verify_input: Any, batch: Any, logits_output: Any, *rest: Any, **more: Any) -> Any:
        info = batch.sampling_info
        if batch.forward_mode.is_idle() or info.is_all_greedy:
            return verify(verify_input, batch, logits_output, *rest, **more)
        draws = info.top_ks != 1  # a greedy request has one choice
        whole = 1 << 30
        if info.need_top_p_sampling or info.need_min_p_sampling or bool((info.top_ks[draws] < whole).any()):
            raise NotImplementedError("a CPU server that guesses ahead draws from the whole vocabulary")
        logits, n = logits_output.next_token_logits, verify_input.draft_token_num
        noise = -torch.empty_like(logits).exponential_().log()
        noise *= draws.repeat_interleave(n)[:, None]
        logits_output.next_token_logits = logits / info.temperatures.repeat_interleave(n, 0) + noise
        try:
            return verify(verify_input, batch, logits_output, *rest, **more)
        finally:
            logits_output.next_token_logits = logits

    return drawing


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    chosen: Tensor,
    seq_lens: Tensor,
    mask: Tensor,
    positions: Tensor,
    index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    topk: int,
    depth: int,
    n: int,
    mask_mode: int,
) -> None:
    """Places of a chain: every token is followed by the next one. The mask of a chain is the causal one."""
    if topk != 1:
        raise NotImplementedError("a CPU server guesses in a chain: --speculative-eagle-topk 1")
    count = seq_lens.numel()
    place = torch.arange(n)
    positions.copy_((seq_lens[:, None] + place).flatten())
    index.copy_(torch.arange(count * n).view(count, n))
    next_token.copy_(torch.where(place + 1 < n, place + 1, -1).expand(count, n))
    next_sibling.fill_(-1)


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept guesses for as long as the target says the same token; its next one comes on top."""
    agree = (candidates[:, 1:] == target_predict[:, :-1]).long().cumprod(1)
    right = agree.sum(1)
    accept_token_num.copy_(right)
    for b, accepted in enumerate(right.tolist()):
        places = retrive_index[b, : accepted + 1]
        accept_index[b, : accepted + 1] = places.to(accept_index.dtype)
        predicts[places] = target_predict[b, : accepted + 1].to(predicts.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, req_to_token: Tensor, seq_lens: Tensor, out: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    """Slots in which the draft writes the keys of its guesses."""
    ahead = seq_lens[:, None] + torch.arange(topk * steps)
    out.copy_(req_to_token[rows.long()[:, None], ahead].flatten())


def assign_extend_cache_locs_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor, pool_len: int
) -> None:
    """Slots [start, end) of every request, one request after the other."""
    slots = torch.cat([req_to_token[row, a:b] for row, a, b in _spans(rows, start, end)])
    out[: len(slots)] = slots.to(out.dtype)


def assign_req_to_token_pool_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Enter slots as [start, end) of every request."""
    at = 0
    for row, a, b in _spans(rows, start, end):
        req_to_token[row, a:b] = slots[at : at + b - a].to(req_to_token.dtype)
        at += b - a


def _spans(rows: Tensor, start: Tensor, end: Tensor) -> list[tuple[int, int, int]]:
    return list(zip(rows.tolist(), start.tolist(), end.tolist(), strict=True))


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, slots: Tensor, out: Tensor) -> None:
    """Slots of what was accepted, one after the other."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted >= 0].long()
    out[: len(accepted)] = slots[accepted].to(out.dtype)


def fill_bonus_tokens_cpu(accepted: Tensor, lengths: Tensor, bonus: Tensor, stride: int) -> None:
    """The last accepted token of every request."""
    last = torch.arange(len(lengths)) * stride + lengths.long() - 1
    bonus.copy_(accepted.flatten()[last].to(bonus.dtype))


def copy_all_layer_kv_cache_cpu(pointers: Tensor, strides: Tensor, target: Tensor, source: Tensor) -> None:
    """Move rows of every layer's buffer, which come as addresses and bytes per row."""
    moves = [(t, s) for t, s in zip(target.tolist(), source.tolist(), strict=True) if t != s]
    for base, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        held = [ctypes.string_at(base + s * stride, stride) for _, s in moves]
        for (t, _), content in zip(moves, held, strict=True):
            ctypes.memmove(base + t * stride, content, stride)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, topk: int, steps: int, pool_len: int
) -> Tensor:
    """Slots [B, pool_len] that the draft reads of every chain: those of the request itself."""
    if topk != 1:
        raise NotImplementedError("a CPU server guesses in a chain: --speculative-eagle-topk 1")
    return req_to_token[rows.long(), :pool_len].contiguous()


def decode_attention_cpu(
    q: Tensor, keys: Tensor, values: Tensor, ks: float, vs: float, o: Tensor, k: Any, v: Any, loc: Tensor,
    logits: Tensor, req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, scale: float, cap: float,
    cross: bool, window: int, *rest: Any,
) -> None:  # fmt: skip
    """One token of every request; its key and value are written first."""
    if k is not None:
        keys[loc] = k.view(-1, *keys.shape[1:]).to(keys.dtype)
        values[loc] = v.view(-1, *values.shape[1:]).to(values.dtype)
    _refuse(cap, cross, window)
    _attend(q, o, keys, values, req_to_token[rows.long()], seq_lens, 1, scale)


def extend_attention_cpu(
    q: Tensor, k: Any, v: Any, o: Tensor, keys: Tensor, values: Tensor, ks: float, vs: float,
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, extend_lens: Tensor, starts: Tensor, longest: int,
    scale: float, cap: float, cross: bool, window: int, encoded: Any, sinks: Any, tree_mask: Any,
    causal: bool,
) -> None:  # fmt: skip
    """The last tokens of every request, each of which sees those before it. Keys are in their slots."""
    _refuse(cap, cross, window)
    if tree_mask is not None:
        raise NotImplementedError("a CPU server guesses in a chain: --speculative-eagle-topk 1")
    lens = extend_lens.tolist()
    slots = req_to_token[rows.long()]
    if len(set(lens)) == 1:
        _attend(q, o, keys, values, slots, seq_lens, lens[0], scale)
        return
    for b, (first, n) in enumerate(zip(starts.tolist(), lens, strict=True)):
        span = slice(first, first + n)
        one = slice(b, b + 1)
        if n:
            _attend(q[span], o[span], keys, values, slots[one], seq_lens[one], n, scale)


def _attend(
    q: Tensor, o: Tensor, keys: Tensor, values: Tensor, slots: Tensor, seq_lens: Tensor, n: int, scale: float
) -> None:
    """The last n tokens of B requests: q, o [B * n, H, D]; keys, values [slots, H of keys, D]."""
    count, longest = len(slots), int(seq_lens.max())
    read = slots[:, :longest].long()
    last = seq_lens[:, None] - n + torch.arange(n)
    seen = torch.arange(longest) <= last[:, :, None]
    answer = F.scaled_dot_product_attention(
        q.reshape(count, n, *q.shape[1:]).transpose(1, 2),
        keys[read].transpose(1, 2).to(q.dtype),
        values[read].transpose(1, 2).to(q.dtype),
        attn_mask=seen[:, None],
        scale=scale,
        enable_gqa=True,
    )
    o.copy_(answer.transpose(1, 2).reshape(o.shape))


def _refuse(cap: float, cross: bool, window: int) -> None:
    if cap or cross or window > 0:
        raise NotImplementedError("a CPU server that guesses ahead has plain causal attention only")
