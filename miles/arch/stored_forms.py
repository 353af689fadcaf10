"""The tensors that a checkpoint holds for one weight in a number format: their names, types and shapes.

What `miles.precision` publishes, without a number: a converter lays out its files by this table.
Legend: M rows, N columns of the weight.
"""

from __future__ import annotations

from miles.arch.family import Shape
from miles.arch.precision import FormatName, NumberFormat

Form = tuple[str, Shape]
"""Type (safetensors' code) and shape of one stored tensor."""

PLAIN_CODES: dict[FormatName, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FP8_BLOCK = (128, 128)


def has_layout(stored: NumberFormat, shape: Shape) -> bool:
    """Whether a weight of this shape can be stored so: quantised formats take matrices of whole groups."""
    if stored.is_plain:
        return True
    return len(shape) == 2 and (stored.group is None or shape[1] % stored.group == 0)


def stored_forms(stored: NumberFormat, name: str, shape: Shape) -> dict[str, Form]:
    """The stored tensors of the weight `name` of `shape`, in the order in which they are published.

    The weight has a layout in this format (`has_layout`).
    """
    if stored.name in PLAIN_CODES:
        return {name: (PLAIN_CODES[stored.name], shape)}
    rows, columns = shape
    whole = {name: ("F8_E4M3", shape)}
    if stored.name == "fp8":
        blocks = (-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
        return whole | {f"{name}_scale_inv": ("F32", blocks)}
    if stored.name == "fp8_channel":
        return whole | {f"{name}_scale": ("F32", (rows, 1))}
    if stored.name == "fp8_tensor":
        return whole | {f"{name}_scale": ("F32", (1,))}
    if stored.name == "int8":
        return {name: ("I8", shape), f"{name}_scale": ("F32", (rows, 1))}
    assert stored.group is not None and columns % stored.group == 0, (name, shape, stored)
    groups = (rows, columns // stored.group)
    if stored.name == "mxfp8":
        return whole | {f"{name}_scale_inv": ("U8", groups)}
    if stored.name == "nvfp4":
        return {
            name: ("U8", (rows, columns // 2)),
            f"{name}_scale": ("F8_E4M3", groups),
            f"{name}_scale_2": ("F32", ()),
        }
    packed: dict[str, Form] = {
        f"{name}_packed": ("I32", (rows, -(-columns // 8))),
        f"{name}_scale": ("BF16", groups),
        f"{name}_shape": ("I64", (2,)),
    }
    zeros: dict[str, Form] = {f"{name}_zero_point": ("I32", (-(-rows // 8), groups[1]))}
    return packed if stored.symmetric else packed | zeros
