"""The C side of the decode kernel as Python sees it: structures of decode.cpp and model.h, and the calls.

All tensors are contiguous and on the CPU; the kernel keeps addresses, this module keeps what they point to.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from miles.arch.spec import ArchSpec, MoeSpec
from miles.models.decoder import Decoder
from miles.models.mlp import MoeMlp
from miles.models.rotary import rotations
from miles.rollout.native.slots import Slots

FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama")
"""Model families whose blocks the kernel computes; another may differ in what `Sizes` does not say."""

MOST_TRACED = 256
"""Rows that the kernel reads at once whatever the model, see model.cpp."""


class Sizes(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("vocab", "hidden", "layers", "heads", "key_heads", "head_dim")),
        *((name, c_int64) for name in ("slots", "blocks", "moe_layers", "top_k")),
        ("eps", c_float),
    )


class LayerSizes(Structure):
    _fields_ = tuple((name, c_int64) for name in ("experts", "top_k", "intermediate", "normed"))


class LayerWeights(Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "post_norm"),
            *("router", "gate_up", "down"),
        )
    )


class ModelWeights(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("embed", "final_norm", "head", "cos", "sin"))


class Requests(Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("lengths", "limits", "last_tokens", "stream", "min_length", "stop_ids")),
        *((n, c_void_p) for n in ("temperature", "greedy", "tokens", "log_probs", "routes")),
        ("context_length", c_int64),
        ("num_stop", c_int64),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "miles_lanes": (c_int64, ()),
    "miles_create": (c_void_p, (POINTER(Sizes), POINTER(LayerSizes), c_void_p, c_void_p)),
    "miles_destroy": (None, (c_void_p,)),
    "miles_load": (None, (c_void_p, POINTER(ModelWeights), POINTER(LayerWeights))),
    "miles_copy_slots": (None, (c_void_p, *(c_int64,) * 5, c_void_p, c_void_p, c_int64)),
    "miles_read": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "miles_stages": (c_int64, (c_void_p,)),
    "miles_trace": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "miles_decode": (c_int64, (c_void_p, POINTER(Requests), *(c_int64,) * 2, c_double, c_int64, c_void_p)),
}


class Library:
    """The loaded functions; `num_lanes` numbers fill a vector of this machine."""

    create: Any
    destroy: Any
    load: Any
    copy_slots: Any
    read: Any
    stages: Any
    trace: Any
    decode: Any

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("miles_"), function)
        self.num_lanes: int = loaded.miles_lanes()


class Kernel:
    """One model in the kernel, over keys and values of the caller (see attention.h for their shape)."""

    def __init__(self, library: Library, spec: ArchSpec, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert spec.family in FAMILIES, f"the kernel does not know {spec.family}"
        attention = spec.layers[0].attention
        sizes = Sizes(
            spec.vocab_size,
            spec.hidden_size,
            spec.num_layers,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            keys.shape[1],
            keys.shape[3],
            len(spec.moe_layers),
            spec.top_k,
            spec.rms_norm_eps,
        )
        layers = (LayerSizes * spec.num_layers)(*(_layer_sizes(layer.mlp) for layer in spec.layers))
        self.spec, self._library, self._kept = spec, library, (keys, values)
        self._angles = rotations(
            attention.rope, attention.head_dim, spec.max_position_embeddings, torch.device("cpu")
        )
        self._cos, self._sin = self._angles.real.contiguous(), self._angles.imag.contiguous()
        self._model = c_void_p(library.create(sizes, layers, keys.data_ptr(), values.data_ptr()))
        self._weights: tuple[torch.Tensor, ...] = ()
        weakref.finalize(self, library.destroy, self._model)

    def load(self, decoder: Decoder) -> None:
        """Pack the matrices of `decoder` anew, quantised ones as the numbers they stand for; norms, biases
        and embedding are read where they are.
        """
        kept: list[torch.Tensor] = []

        def at(tensor: torch.Tensor | None) -> int | None:
            if tensor is None:
                return None
            assert tensor.is_contiguous() and tensor.dtype == torch.float32, "the kernel reads plain fp32"
            kept.append(tensor)
            return tensor.data_ptr()

        model = ModelWeights(
            at(decoder.embed), at(decoder.final_norm), at(decoder.head_weight), at(self._cos), at(self._sin)
        )
        layers = (LayerWeights * self.spec.num_layers)()
        for weights, layer in zip(layers, decoder.layers, strict=True):
            block, mlp = layer.attention, layer.mlp
            weights.input_norm, weights.post_norm = at(layer.input_norm), at(layer.post_norm)
            weights.qkv, weights.qkv_bias = at(block.matrix("qkv")), at(block.qkv_bias)
            weights.q_norm, weights.k_norm = at(block.q_norm), at(block.k_norm)
            weights.o, weights.o_bias = at(block.matrix("o")), at(block.o_bias)
            weights.router = at(mlp.router) if isinstance(mlp, MoeMlp) else None
            weights.gate_up, weights.down = at(mlp.matrix("gate_up")), at(mlp.matrix("down"))
        self._weights = tuple(kept)
        self._library.load(self._model, model, layers)

    def read(
        self, tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read rows, all int64 [T]; those of one slot in order of position.

        `wanted`: the line that the logits after a row get, -1 for none. Returns logits [lines, V] and routes
        int16 [T, Lm, k] (None for a dense model).
        """
        logits = torch.empty(int(wanted.max()) + 1, self.spec.vocab_size)
        routes = None
        if self.spec.is_moe:
            shape = (len(tokens), len(self.spec.moe_layers), self.spec.top_k)
            routes = torch.empty(shape, dtype=torch.int16)
        rows = [row.data_ptr() for row in (tokens, slots, positions)]
        at_routes = None if routes is None else routes.data_ptr()
        self._library.read(self._model, *rows, len(tokens), wanted.data_ptr(), logits.data_ptr(), at_routes)
        return logits, routes

    def trace(self, tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read rows as `read` does, at most `MOST_TRACED`; fp32 [T, stages, D] in the order of
        `hidden_states.stage_names`."""
        states = torch.empty(len(tokens), self._library.stages(self._model), self.spec.hidden_size)
        rows = [row.data_ptr() for row in (tokens, slots, positions)]
        self._library.trace(self._model, *rows, len(tokens), states.data_ptr())
        return states

    def decode(
        self, slots: Slots, running: int, most_steps: int, seconds: float, to_the_end: bool
    ) -> tuple[int, torch.Tensor]:
        """Draw tokens for slots 0..running-1 until one request is done, or all of them; see miles_decode.

        Returns the steps taken, or -1 - slot where a log-prob is not finite, and who is done, bool [running].
        """
        done = torch.zeros(running, dtype=torch.bool)
        columns = (
            *(slots.lengths, slots.limits, slots.last_tokens, slots.stream, slots.min_length),
            *(slots.stop_ids, slots.temperature, slots.greedy, slots.tokens, slots.log_probs),
        )
        requests = Requests(
            *(column.data_ptr() for column in columns),
            None if slots.routes is None else slots.routes.data_ptr(),
            slots.context_length,
            slots.stop_ids.shape[1],
        )
        bounds = (running, most_steps, seconds, to_the_end)
        return self._library.decode(self._model, requests, *bounds, done.data_ptr()), done


def _layer_sizes(mlp: Any) -> LayerSizes:
    if isinstance(mlp, MoeSpec):
        return LayerSizes(mlp.num_experts, mlp.top_k, mlp.intermediate_size, mlp.norm_topk_prob)
    return LayerSizes(0, 0, mlp.intermediate_size, False)
