"""What a command line of `miles convert` asks for; words without effect are refused, all at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from miles.arch.precision import FormatName, NumberFormat
from miles.config.suggest import closest, did_you_mean
from miles.errors import ConfigError, MilesError

if TYPE_CHECKING:
    from miles.weights.convert import Wanted

PLAIN = ("bf16", "fp16", "fp32")
QUANTISED: tuple[FormatName, ...] = ("fp8", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4", "int4", "int8")
LAYOUTS = ("dcp", "native")
TARGETS = (*PLAIN, *QUANTISED, *LAYOUTS)
MEGATRON = ("torch_dist",)
"""Written and read by megatron-core (`megatron_convert`)."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """Words as they were typed; None and False: not there."""

    to: str | None = None
    group_size: int | None = None
    asymmetric: bool = False
    fp8_block_scale: str | None = None
    dtype: str | None = None
    layers_at_start: int = 0
    layers_at_end: int = 0
    kept: tuple[str, ...] = ()
    mtp_num_layers: int | None = None
    seed: int | None = None
    max_shard_size: str | None = None
    no_save_optim: bool = False


def options_of_run(name: str, options: Options) -> Options:
    """The formats and exceptions of a profile, a run file or a run, beside what else was asked for.

    Raises ConfigError where the run names no format, and for words that say the same again.
    """
    from miles.planning.facts import collect_facts
    from miles.planning.precision import fp8_scales
    from miles_cli.config_source import load_config

    own = replace(
        options, mtp_num_layers=None, seed=None, max_shard_size=None, no_save_optim=False, dtype=None
    )
    if own != Options():
        raise ConfigError(
            MilesError("format and exceptions are the run's", where="--for", fix="leave the other flags out")
        )
    config = load_config(name).config
    precision = config.precision
    if precision.rollout_format is None:
        raise ConfigError(
            MilesError(f"{name} sets no precision.rollout_format", where="--for", fix="say --to FORMAT")
        )
    is_block = precision.rollout_format == "fp8"
    return replace(
        options,
        to=precision.rollout_format,
        group_size=precision.int4_group_size if precision.rollout_format == "int4" else None,
        fp8_block_scale=fp8_scales(config, collect_facts(config).hardware) if is_block else None,
        layers_at_start=precision.num_layers_at_start_in_bf16,
        layers_at_end=precision.num_layers_at_end_in_bf16,
        kept=precision.extra_high_precision_layers_hf,
    )


def wanted_of(options: Options) -> Wanted:
    """Raises ConfigError with every problem."""
    if problems := list(_problems(options)):
        raise ConfigError(*problems)

    from miles.weights.convert import Wanted
    from miles.weights.hf import MAX_SHARD_BYTES

    return Wanted(
        format=_format(options),
        plain=options.dtype,  # type: ignore[arg-type]
        first_layers=options.layers_at_start,
        last_layers=options.layers_at_end,
        kept=options.kept,
        mtp_num_layers=options.mtp_num_layers,
        seed=options.seed or 0,
        layout=options.to if options.to in LAYOUTS else "hf",  # type: ignore[arg-type]
        optimizer=not options.no_save_optim,
        max_shard_bytes=_bytes(options.max_shard_size) or MAX_SHARD_BYTES,
    )


def _format(options: Options) -> NumberFormat | None:
    if options.to is None or options.to in LAYOUTS:
        return None
    scales: Any = options.fp8_block_scale or "fp32"
    return NumberFormat(options.to, scales, options.group_size or 32, not options.asymmetric)  # type: ignore[arg-type]


def _problems(options: Options) -> Iterator[MilesError]:
    to = options.to
    if to is not None and to not in TARGETS:
        known = (*TARGETS, *MEGATRON)
        fix = did_you_mean(closest(to, known), f"choose one of {', '.join(known)}")
        yield MilesError(f"{to!r} is no format", where="--to", fix=fix)
        return
    if to is None and options.mtp_num_layers is None:
        yield MilesError(
            "nothing to convert: neither a format nor MTP layers are asked for",
            where="--to",
            fix=f"say --to FORMAT ({', '.join((*TARGETS, *MEGATRON))}), --for RUN, or --mtp-num-layers N",
        )
    quantised = to in QUANTISED
    exceptions = options.layers_at_start or options.layers_at_end or options.kept
    needs: tuple[tuple[str, Any, bool, str], ...] = (
        ("--group-size", options.group_size, to == "int4", "--to int4"),
        ("--asymmetric", options.asymmetric, to == "int4", "--to int4"),
        ("--fp8-block-scale", options.fp8_block_scale, to == "fp8", "--to fp8"),
        ("--dtype", options.dtype, quantised or to == "dcp", "a quantised format or dcp"),
        ("--num-layers-…-in-bf16, --extra-high-…", exceptions, quantised, "a quantised format"),
        ("--no-save-optim", options.no_save_optim, to == "dcp", "--to dcp"),
        ("--seed", options.seed is not None, options.mtp_num_layers is not None, "--mtp-num-layers"),
    )
    for flag, given, has_effect, wants in needs:
        if given and not has_effect:
            yield MilesError(f"has no effect without {wants}", where=flag, fix="leave it out")
    yield from _wrong_words(options)


def _wrong_words(options: Options) -> Iterator[MilesError]:
    if options.fp8_block_scale not in (None, "fp32", "pow2"):
        yield MilesError(f"{options.fp8_block_scale!r} is neither fp32 nor pow2", where="--fp8-block-scale")
    if options.dtype not in (None, *PLAIN):
        yield MilesError(f"{options.dtype!r} is none of {', '.join(PLAIN)}", where="--dtype")
    if options.max_shard_size is not None and not _bytes(options.max_shard_size):
        yield MilesError(
            f"{options.max_shard_size!r} is no size", where="--max-shard-size", fix="write 5GB, 800MB, 2GiB"
        )


def _bytes(text: str | None) -> int:
    """`5GB` in bytes; 0 for no size."""
    found = _SIZE.fullmatch((text or "").strip())
    if not found:
        return 0
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
