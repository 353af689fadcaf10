"""Starts a real SGLang server without CUDA. Executed by the server's own Python, never imported by miles.

SGLang 0.5.20 computes everything it needs in torch on a CPU, but some of its modules name CUDA kernels or
CUDA runtime calls when they are imported or on the way. The few lines below stand in for those names. None of
them computes anything that a model's output depends on.

SGLang's worker processes are forks of the first one, so what is at top level reaches each of them.
"""

import importlib.machinery
import multiprocessing
import os
import socket
import sys
import types
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed


class _KernelStub(types.ModuleType):
    """A module whose every name exists and refuses to be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name} is a CUDA kernel")

        return refuse


def _stand_in_for_kernels() -> None:
    """torchvision built for CUDA lacks two operators on a CPU torch; sgl_kernel has no CPU wheel."""
    for operator in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", signature)
    for name in ("sgl_kernel", "sgl_kernel.flash_attn", "sgl_kernel.mamba"):
        stub = _KernelStub(name)
        stub.__path__ = []
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = stub


def _stand_in_for_cuda_runtime() -> None:
    """Host memory of the route recorder is pinned through CUDA, and the weight checksum waits for it."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(dims, dtype=dtype)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *args, **kwargs: None


def _listen_on_loopback() -> None:
    """torch's rendezvous store listens on every interface unless it is given a socket."""
    rendezvous: Any = sys.modules["torch.distributed.rendezvous"]
    make_store = rendezvous.TCPStore

    def loopback_store(host_name: str, port: int, is_master: bool, **options: Any) -> Any:
        if is_master:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host_name, port))
            listener.listen()
            options["master_listen_fd"] = listener.detach()
        return make_store(host_name=host_name, port=port, is_master=is_master, **options)

    rendezvous.TCPStore = loopback_store


def _guess_ahead() -> None:
    """A draft needs more than torch_native and its stubs; what is missing is computed in torch."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import cpu_speculation

    cpu_speculation.install(sys.modules["sgl_kernel"])


def _fork_workers() -> None:
    """SGLang spawns its workers for CUDA's sake; forked, they need not import all of it again.

    There are no threads yet. A server is ready after 14 processor seconds instead of 36.
    """
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=True)


_stand_in_for_kernels()
if "--speculative-algorithm" in sys.argv:
    _guess_ahead()  # before SGLang is imported, whose modules take the names over
_stand_in_for_cuda_runtime()
_listen_on_loopback()

if __name__ == "__main__":
    _fork_workers()

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
