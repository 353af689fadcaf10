"""Reading a `config.json`: typed access that collects every problem and reports them as one error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from miles.arch.spec import Dtype, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling
from miles.errors import CheckpointError

_DTYPES: dict[str, Dtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
HF_DTYPE_NAMES: dict[Dtype, str] = {ours: theirs for theirs, ours in _DTYPES.items()}

LLAMA3, LINEAR = "llama3", "linear"
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

YARN = "yarn"
YARN_KEYS = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "fast_turns": "beta_fast",
    "slow_turns": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Fields of `YarnScaling` by their keys in config.json."""

PARTIAL_ROTARY = "partial_rotary_factor"

DTYPE_KEYS = ("dtype", "torch_dtype")
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Where published configs count their multi-token-prediction layers; the first is the one we write."""


class HfConfig:
    """Typed view of a config.json. Problems are collected; `check()` raises them all at once.

    A getter that finds a problem notes it and returns a harmless value of the right type, so that reading
    goes on to the next key: callers must call `check()` before they use what they read.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def check(self) -> None:
        """Raise `CheckpointError` naming every problem found so far."""
        if self.problems:
            raise CheckpointError(
                "; ".join(self.problems),
                where=self.where,
                fix="correct config.json or pick another checkpoint",
            )

    def filled(self, defaults: Mapping[str, Any], part: str | None = None) -> HfConfig:
        """The same with defaults for what it leaves out; its problems are noted here as well.

        part: a table inside, like `text_config`, whose values come before those around it. The stored number
        format is one of the whole checkpoint.
        """
        inner = self.values.get(part) if part else {}
        if not isinstance(inner, dict):
            self.problem(f"{part} is missing" if inner is None else f"{part} is not a table")
            inner = {}
        outer = {key: value for key, value in self.values.items() if value is not None}
        if outer.keys() & DTYPE_KEYS:
            inner = {key: value for key, value in inner.items() if key not in DTYPE_KEYS}
        given = {key: value for key, value in inner.items() if value is not None}
        config = HfConfig({**defaults, **outer, **given}, self.where)
        config.problems = self.problems
        return config

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 1 under the first of `names` that is present."""
        name, value = self._find(names)
        if value is None and default is not None:
            return default
        if type(value) is int and value >= 1:
            return value
        self._wrong(names[0], name, value, "a whole number >= 1")
        return 1

    def whole(self, *names: str, default: int) -> int:
        """A whole number of at least 0 under the first of `names` that is present."""
        name, value = self._find(names)
        if value is None:
            return default
        if type(value) is int and value >= 0:
            return value
        self._wrong(name, name, value, "a whole number >= 0")
        return default

    def mtp_num_layers(self) -> int:
        """Multi-token-prediction layers; 0 when the config names none."""
        return self.whole(*MTP_KEYS, default=0)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if _is_number(value) and value > 0:
            return float(value)
        self._wrong(name, name, value, "a number > 0")
        return 1.0

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self._wrong(name, name, value, "true or false")
        return default

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids stored as nothing, one id, or a list of ids."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if all(type(i) is int and i >= 0 for i in ids):
            return tuple(ids)
        self._wrong(name, name, value, "a token id or a list of token ids")
        return ()

    def indices(self, name: str) -> tuple[int, ...]:
        """A list of layer indices; empty when absent."""
        value = self.values.get(name) or []
        if isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
            return tuple(value)
        self._wrong(name, name, value, "a list of layer indices")
        return ()

    def refuse(self, name: str, supported: Any, default: Any) -> None:
        """Note a problem unless `name` (or its default, when absent) has the one value that is supported."""
        value = self.values.get(name)
        value = default if value is None else value
        if value != supported:
            self.problem(f"{name} = {value!r} is not supported (only {supported!r})")

    def rope(
        self, head_dim: int, rotated: float = 1.0, scalings: tuple[str, ...] = (LLAMA3, LINEAR)
    ) -> RopeSpec:
        """Rotary embedding: `rope_theta` with `rope_scaling`, or `rope_parameters` as transformers 5 writes
        it. `rotated`: the part of a head that is rotated where config.json does not say. `scalings`: the
        kinds of scaling that the family has.
        """
        parameters = self.values.get("rope_parameters") or {}
        key = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        scaling = self.values.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", *scalings):
            known = ", ".join(map(repr, ("default", *scalings)))
            self.problem(f"{key} of type {kind!r} is not supported (only {known})")
            kind = "default"
        theta = parameters.get("rope_theta", self.values.get("rope_theta"))
        if not (_is_number(theta) and theta > 0):
            self._wrong("rope_theta", "rope_theta", theta, "a number > 0")
            theta = 1.0
        width = self._rotary_width(parameters, head_dim, rotated)
        return RopeSpec(float(theta), self._scaling(kind, scaling), width)

    def _yarn_scaling(self, table: Mapping[str, Any]) -> YarnScaling | None:
        if table.get("attention_factor") is not None or table.get("truncate") is False:
            self.problem(f"rope_scaling of type {YARN!r} with attention_factor or truncate is not supported")
        values = {name: table.get(key, 0.0) for name, key in YARN_KEYS.items()}
        if not all(_is_number(value) and value >= 0 for value in values.values()) or not all(
            values[name] for name in ("factor", "original_positions", "fast_turns", "slow_turns")
        ):
            self.problem(f"rope_scaling of type {YARN!r} needs {', '.join(list(YARN_KEYS.values())[:4])}")
            return None
        numbers = {name: float(value) for name, value in values.items()}
        return YarnScaling(**numbers | {"original_positions": int(values["original_positions"])})  # type: ignore[arg-type]

    def _rotary_width(self, table: Mapping[str, Any], head_dim: int, rotated: float) -> int | None:
        """Rotated elements of a head; None: all of them."""
        part = table.get(PARTIAL_ROTARY, self.values.get(PARTIAL_ROTARY, rotated))
        width = int(head_dim * part) if _is_number(part) else 0
        if not 0 < width <= head_dim or width % 2:
            self.problem(f"{PARTIAL_ROTARY} = {part!r} does not leave an even part of head_dim = {head_dim}")
            return None
        return None if width == head_dim else width

    def _scaling(
        self, kind: Any, table: Mapping[str, Any]
    ) -> Llama3Scaling | LinearScaling | YarnScaling | None:
        if kind == YARN:
            return self._yarn_scaling(table)
        if kind == LINEAR:
            return self._linear_scaling(table)
        return self._llama3_scaling(table) if kind == LLAMA3 else None

    def _linear_scaling(self, table: Mapping[str, Any]) -> LinearScaling | None:
        factor = table.get("factor")
        if not (_is_number(factor) and factor > 0):
            self.problem(f"rope_scaling of type {LINEAR!r} needs factor")
            return None
        return LinearScaling(float(factor))

    def _llama3_scaling(self, table: Mapping[str, Any]) -> Llama3Scaling | None:
        values = [table.get(key) for key in LLAMA3_KEYS]
        if not all(_is_number(value) and value > 0 for value in values):
            self.problem(f"rope_scaling of type {LLAMA3!r} needs {', '.join(LLAMA3_KEYS)}")
            return None
        factor, low, high, positions = (float(value) for value in values if value is not None)
        return Llama3Scaling(factor, low, high, int(positions))

    def dtype(self) -> Dtype | None:
        """Stored number format, from `dtype` or `torch_dtype`; None when the config does not say."""
        _, value = self._find(DTYPE_KEYS)
        if value is None:
            return None
        if value in _DTYPES:
            return _DTYPES[value]
        self._wrong("dtype", "dtype", value, f"one of {', '.join(_DTYPES)}")
        return None

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def _wrong(self, asked: str, found: str, value: Any, wanted: str) -> None:
        if value is None:
            self.problem(f"{asked} is missing")
        else:
            self.problem(f"{found} = {value!r} is not {wanted}")


def around_text(text: Mapping[str, Any], outer: tuple[str, ...], model_type: str) -> dict[str, Any]:
    """The config.json of a model with a language model inside: `text` under `text_config`, but for the keys
    that stand outside. `model_type`: of the language model alone.
    """
    inner = {key: value for key, value in text.items() if key not in ("architectures", *DTYPE_KEYS)}
    return {key: text[key] for key in outer} | {"text_config": inner | {"model_type": model_type}}


def rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json."""
    scaling = rope.scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": LINEAR, "factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        return {"type": YARN} | {key: getattr(scaling, name) for name, key in YARN_KEYS.items()}
    values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions)
    return {"rope_type": LLAMA3} | dict(zip(LLAMA3_KEYS, values, strict=True))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
