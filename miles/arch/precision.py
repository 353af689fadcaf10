"""The precision policy: for every published tensor, how it is stored and how it is computed with.

One object for converter, trainers, engines and weight sync, so that a scale convention or an exception cannot
differ between two of them. It knows names only and never sees a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from miles.arch.expert_layout import split_experts, stacks, with_split_experts
from miles.arch.spec import ArchSpec, Dtype
from miles.arch.tensor_roles import Role, decoder_layer, is_fp32_buffer, role_of

FormatName = Literal[
    "fp32", "bf16", "fp16", "fp8", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4", "int4", "int8"
]
ScaleFormat = Literal["fp32", "pow2"]
"""Scales of FP8 blocks: continuous, or powers of two."""

PLAIN: tuple[FormatName, ...] = ("fp32", "bf16", "fp16")
EXPERTS_ONLY: tuple[FormatName, ...] = ("nvfp4", "int4")
"""Formats of four bits: of an MoE model they take the routed experts alone."""

EXPERTS: tuple[Role, ...] = ("expert",)
PROJECTIONS: tuple[Role, ...] = ("attention", "mlp", "shared expert", "expert")
"""Matrix products inside the layers. Embedding, head, norms, routers and MTP projections decide too much to
be rounded, for too few bytes."""


@dataclass(frozen=True)
class NumberFormat:
    """A format with the conventions that two rooms must share."""

    name: FormatName
    scales: ScaleFormat = "fp32"
    """Of `fp8`; the other formats have one convention."""
    group_size: int = 32
    """Of `int4`: weights in a row that share a scale."""
    symmetric: bool = True
    """Of `int4`: without a zero point."""

    @property
    def group(self) -> int | None:
        """Weights in a row that share a scale, where groups must fill the row."""
        return {"mxfp8": 32, "nvfp4": 16, "int4": self.group_size}.get(self.name)

    @property
    def is_plain(self) -> bool:
        return self.name in PLAIN

    @property
    def rounds_activations(self) -> bool:
        """Whether a product rounds its other operand too: in groups of 128 (`fp8`) or 32 (`mxfp8`) numbers of
        a token, in the same elements and scales. Of the others only weights are rounded."""
        return self.name in ("fp8", "mxfp8")

    def __str__(self) -> str:
        """The format with the blocks that share a scale, and the type of the scales."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        told = {
            "fp8": f"128x128, {self.scales} scales",
            "fp8_channel": "a row, fp32 scales",
            "fp8_tensor": "the tensor, fp32 scale",
            "mxfp8": "1x32, ue8m0 scales",
            "nvfp4": "1x16, e4m3 scales, fp32 outer scale",
            "int4": f"1x{self.group_size}, bf16 scales, {kind}",
            "int8": "a row, fp32 scales",
        }
        return f"{self.name} ({told[self.name]})" if self.name in told else self.name


@dataclass(frozen=True)
class TensorPrecision:
    """What the policy says about one tensor."""

    name: str
    role: Role
    storage: NumberFormat
    """Held by the engine, sent by weight sync, written by a converter."""
    compute: NumberFormat
    """What the trainer's forward rounds the weight to."""
    reason: str
    """Why it is quantised, or is not."""


@dataclass(frozen=True)
class PrecisionPolicy:
    """How the weights of one model are stored on the engine's side and computed with on the trainer's.

    A plain `rollout` or `training` format applies to every tensor; a quantised one to the matrix products
    that no exception names, and the rest has `plain`.
    """

    rollout: NumberFormat
    training: NumberFormat = NumberFormat("fp32")
    plain: Dtype = "fp32"
    """Format of what a quantised format leaves alone: the trainer's."""
    num_layers: int = 0
    """Decoder layers, for exceptions counted from the end."""
    is_moe: bool = True
    first_layers: int = 0
    """Decoder layers at the start that are not quantised."""
    last_layers: int = 0
    """Decoder layers at the end that are not quantised."""
    kept: tuple[str, ...] = ()
    """Published names, or parts of them, that are not quantised."""
    other_parts: tuple[str, ...] = ()
    """How names begin that belong to no part of the decoder, see `ArchSpec.other_parts`."""
    splits_experts: bool = False
    """Whether experts that are published stacked are stored, and rounded, as the matrices inside: all of a
    model's, where any is quantised, as readers take the experts of a checkpoint in one layout."""

    def layout(self, spec: ArchSpec) -> ArchSpec:
        """The model with its experts as they are stored."""
        return with_split_experts(spec) if self.splits_experts else spec

    def lost_exceptions(self, spec: ArchSpec) -> list[str]:
        """Exceptions by names that stacked experts lose when they are split."""
        if not self.splits_experts:
            return []
        before, after = list(stacks(spec)), split_experts(spec)
        return [
            part
            for part in self.kept
            if any(part in name for name in before) and not any(part in name for name in after)
        ]

    def storage(self, name: str) -> NumberFormat:
        """The format in which the engine holds a published tensor, and every transfer and checkpoint."""
        return self._applied(self.rollout, name)

    def compute(self, name: str) -> NumberFormat:
        """The format that the trainer's forward rounds a published tensor to."""
        return self._applied(self.training, name)

    def is_quantised(self, name: str) -> bool:
        """Whether a published tensor is rounded on either side."""
        return not (self.storage(name).is_plain and self.compute(name).is_plain)

    def of(self, name: str) -> TensorPrecision:
        """Everything about one published tensor."""
        role, exception = role_of(name), self.exception(name)
        quantised = next((f for f in (self.rollout, self.training) if not f.is_plain), None)
        if quantised is None:
            reason = "no quantised format"
        elif exception:
            reason = exception
        else:
            reason = f"{role} is quantised" if role in self._roles(quantised) else f"{role} is kept"
        return TensorPrecision(name, role, self.storage(name), self.compute(name), reason)

    def all_of(self, names: Iterable[str]) -> tuple[TensorPrecision, ...]:
        """Everything about many tensors, in their order."""
        return tuple(map(self.of, names))

    def exception(self, name: str) -> str:
        """Which exception keeps a tensor plain whatever its role; empty for none."""
        part = next((part for part in self.kept if part in name), None)
        if part is not None:
            return f"name has {part}"
        if name.startswith(self.other_parts):
            return "not of the decoder"
        layer = decoder_layer(name)
        if layer is None or layer >= self.num_layers:
            return ""
        if layer < self.first_layers:
            return f"in the first {self.first_layers} layers"
        if layer >= self.num_layers - self.last_layers:
            return f"in the last {self.last_layers} layers"
        return ""

    def _applied(self, wanted: NumberFormat, name: str) -> NumberFormat:
        if is_fp32_buffer(name):
            return NumberFormat("fp32")
        if wanted.is_plain:
            return wanted
        if role_of(name) in self._roles(wanted) and not self.exception(name):
            return wanted
        return NumberFormat(self.plain)

    def _roles(self, wanted: NumberFormat) -> tuple[Role, ...]:
        return EXPERTS if wanted.name in EXPERTS_ONLY and self.is_moe else PROJECTIONS


def precision_policy(
    spec: ArchSpec,
    plain: Dtype,
    rollout: NumberFormat,
    training: NumberFormat | None = None,
    first_layers: int = 0,
    last_layers: int = 0,
    kept: tuple[str, ...] = (),
) -> PrecisionPolicy:
    """The policy of a model. `training` None: the trainer computes in `plain`."""
    policy = PrecisionPolicy(
        rollout=rollout,
        training=training or NumberFormat(plain),
        plain=plain,
        num_layers=spec.num_layers,
        is_moe=spec.is_moe,
        other_parts=spec.other_parts,
        first_layers=first_layers,
        last_layers=last_layers,
        kept=kept,
    )
    splits = any(policy.is_quantised(name) for name in split_experts(spec))
    return replace(policy, splits_experts=splits)
