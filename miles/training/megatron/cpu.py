"""megatron-core without CUDA: what it takes for granted of `torch.cuda`, answered by the CPU.

`install` does nothing where CUDA is present. Otherwise megatron-core's modules get a `torch` of their own
(`CpuTorch`), and a handful of its functions that cannot do without CUDA are replaced; the rest of the
process keeps the real torch, but for two methods of Tensor. What each piece is for is said beside it;
megatron-core is pinned, so that they stay true.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
"""Called by megatron-core with device="cuda", in the optimizer and in checkpoints."""


class NullEvent:
    """An event on a device that computes in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any, **__: Any) -> NullEvent:
        return self

    def wait(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: NullEvent) -> float:
        return 0.0


class NullStream:
    """The one stream of a device that computes in order."""

    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or NullEvent()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class CpuTorch(ModuleType):
    """torch, as far as it is not overwritten."""

    def __init__(self, behind: ModuleType, **overwritten: Any) -> None:
        super().__init__(behind.__name__)
        self.__dict__.update(overwritten, _behind=behind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


def install() -> None:
    """Make megatron-core run here. Call it before anything of megatron-core is built, and again after further
    modules of it were imported.
    """
    if torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        # It says eight times that Transformer Engine and Apex are missing.
        warnings.simplefilter("ignore", UserWarning)
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        importlib.import_module("megatron.core.optimizer")
    _replace_torch(_cpu_torch())
    _patch_once()


@functools.cache
def _patch_once() -> None:
    _random_states()
    _tensor_methods()
    _router()
    _latent_attention()
    _split_sizes()
    _norms()


def _replace_torch(own: ModuleType) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            setattr(module, "torch", own)  # noqa: B010


@functools.cache
def _cpu_torch() -> ModuleType:
    """Queries, synchronisation (pipeline exchange), streams (dispatcher, gradient buffers), random states,
    and the word "cuda" in factory functions.
    """
    stream = NullStream()
    cuda = CpuTorch(
        torch.cuda,
        current_device=lambda: CPU,
        synchronize=lambda device=None: None,
        Stream=NullStream,
        Event=NullEvent,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda state, device="cuda": torch.set_rng_state(state),
        manual_seed=torch.default_generator.manual_seed,
        manual_seed_all=torch.default_generator.manual_seed,
    )
    return CpuTorch(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*arguments: Any, **options: Any) -> Tensor:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = CPU
        return factory(*arguments, **options)

    return make


def _random_states() -> None:
    """Seeds of tensor-parallel regions are kept in states of the device's generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _tensor_methods() -> None:
    """The optimizers take tensors whose type is called torch.cuda.FloatTensor and no others."""
    original = Tensor.type

    def type_name(self: Tensor, dtype: Any = None, *rest: Any, **options: Any) -> Any:
        if dtype is not None or rest:
            return original(self, dtype, *rest, **options)
        return original(self).replace("torch.", "torch.cuda.", 1) if self.device == CPU else original(self)

    Tensor.type = type_name
    Tensor.cuda = lambda self, *_, **__: self


def _router() -> None:
    """The router reads a name that is only bound where Transformer Engine is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _latent_attention() -> None:
    """It takes Transformer Engine for installed whenever the module that would import it exists."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = HAVE_TE


def _split_sizes() -> None:
    """Expert-parallel exchange takes lists of sizes, which megatron-core makes only of tensors on a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = on_cpu


def _norms() -> None:
    """torch's norms with sequence parallelism: their gradients are summed over the ranks by this mark."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        assert config.normalization == "RMSNorm", "no model of miles has another norm"
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)
