"""An engine's weights in the formats of a precision policy: quantised ones held as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from miles.arch.precision import PrecisionPolicy
from miles.arch.stored_forms import Form, stored_forms
from miles.errors import CheckpointError
from miles.precision.held_operands import HeldOperands
from miles.weights.low_precision import native_shapes, owner_of, rounded_parameters
from miles.weights.native_map import load_each, native_parameters, published_views

_CODES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


class HeldWeights:
    """The quantised weights of an engine's decoder, which loses its plain ones."""

    def __init__(
        self,
        policy: PrecisionPolicy,
        decoder: nn.Module,
        draft: nn.Module | None,
        dtype: torch.dtype,
        device: torch.device,
        keep_expanded: bool = False,
    ) -> None:
        """`decoder`, `draft`: not allocated yet (on the device `meta`); what stays plain is, on `device`.
        `keep_expanded`: see `HeldOperands`."""
        self._spec = decoder.spec if draft is None else draft.spec
        self._operands: dict[str, HeldOperands] = {}
        whole = native_shapes(decoder, draft)
        self._shapes = {name: view.shape for name, view in published_views(self._spec, whole)}
        for name, parameter in rounded_parameters(policy.storage, decoder, draft).items():
            block, attribute = owner_of(name, decoder, draft)
            shape = block._parameters[attribute].shape
            held = HeldOperands(parameter.target, parameter.pieces, shape, dtype, device, keep_expanded)
            block.register_parameter(attribute, None)
            block.operands[attribute] = held
            self._operands |= dict.fromkeys(parameter.pieces, held)
        for part in (decoder, draft):
            if part is not None:
                part.to_empty(device=device)
        kept = native_parameters(decoder, draft)
        views = published_views(self._spec, whole | {n: parameter.detach() for n, parameter in kept.items()})
        self._plain = {name: view for name, view in views if view.device.type != "meta"}

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised weights with their scales."""
        return sum(held.nbytes for held in set(self._operands.values()))

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Types in which quantised weights and scales are held."""
        return frozenset().union(*(held.dtypes for held in self._operands.values()))

    @torch.no_grad()
    def load(self, items: Iterable[tuple[str, Tensor]], where: str = "weights") -> None:
        """Fill decoder and draft from the tensors that `as_stored` makes, in any order.

        Raises CheckpointError as `native_map.load_published` does, and for a weight in another format.
        """

        def store(name: str, tensor: Tensor) -> None:
            if name in self._plain:
                self._plain[name].copy_(tensor)

        def differs(name: str, tensor: Tensor) -> bool:
            return not torch.equal(tensor.to(self._plain[name]), self._plain[name])

        load_each(self._spec, self._shapes, store, differs, self._taken(items, where), where)

    def _taken(self, items: Iterable[tuple[str, Tensor]], where: str) -> Iterator[tuple[str, Tensor]]:
        """Plain tensors as they come; a quantised weight is stored once it is whole."""
        forms = {name: self._forms(name) for name in self._operands}
        weight_of = {part: name for name, parts in forms.items() for part in parts}
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in items:
            weight = weight_of.get(name)
            if weight is None:
                yield name, tensor
                continue
            parts = waiting.setdefault(weight, {})
            parts[name] = tensor
            if len(parts) == len(forms[weight]):
                _check_forms(parts, forms[weight], where)
                self._operands[weight].store(weight, waiting.pop(weight))
                yield weight, torch.empty(self._shapes[weight], device="meta")
        for weight, parts in waiting.items():
            missing = ", ".join(sorted(forms[weight].keys() - parts.keys()))
            raise CheckpointError(f"{weight} came without {missing}", where=where)

    def _forms(self, name: str) -> dict[str, Form]:
        return stored_forms(self._operands[name].target, name, tuple(self._shapes[name]))


def _check_forms(parts: Mapping[str, Tensor], forms: Mapping[str, Form], where: str) -> None:
    for name, (code, shape) in forms.items():
        tensor = parts[name]
        if _CODES.get(tensor.dtype) != code or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, wanted {code} {list(shape)}", where=where
            )
