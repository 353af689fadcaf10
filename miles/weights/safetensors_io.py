"""Reading and writing one safetensors file: tensors are mapped on reading and streamed on writing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from miles.arch.safetensors_header import read_header

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in _CODES.items()}
"""torch's type of a safetensors code."""


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, in file order, backed by the mapped file.

    Raises `CheckpointError` when the file is missing, truncated or damaged.
    """
    names = list(read_header(path))
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors as they are; return the size of the file in bytes.

    Wide dtypes come first, so that every tensor is aligned. The bytes depend on names, values, dtypes only.
    """
    forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return stream_tensors(path, forms, tensors.items())


def stream_tensors(
    path: Path,
    forms: Mapping[str, tuple[torch.Size, torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
) -> int:
    """`write_tensors` for tensors that come one by one, in any order, and are not kept.

    Args:
        forms: shape and stored dtype of every tensor to come.
    """
    header, begins, end = file_layout(forms)
    with path.open("wb") as file:
        file.write(header)
        written = 0
        for name, tensor in tensors:
            raw = tensor.detach().to("cpu", forms[name][1]).contiguous()
            file.seek(len(header) + begins[name])
            file.write(raw.flatten().view(torch.uint8).numpy().data)
            written += raw.nbytes
    assert written == end, "every announced tensor comes once"
    return len(header) + end


def file_layout(
    forms: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> tuple[bytes, dict[str, int], int]:
    """The header of a file with its length, where each tensor begins behind it, and where the last one ends.

    Wide dtypes come first, so that every tensor is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(forms, key=lambda name: (-forms[name][1].itemsize, name)):
        shape, dtype = forms[name]
        begins[name], end = end, end + shape.numel() * dtype.itemsize
        offsets = [begins[name], end]
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, begins, end
