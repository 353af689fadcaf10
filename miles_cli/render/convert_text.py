"""The plan and the result of a conversion as text and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from miles.arch.stored_weights import StoredWeight
from miles.weights.convert import Conversion
from miles_cli.units import binary_bytes, count, duration

_SHOWN = 3
"""Names given of tensors that are left out."""


def plan_lines(plan: Conversion) -> list[str]:
    """What is read, what is written, and a line for weights that fare alike."""
    source, files = plan.source, len(plan.shards)
    into = "torch DCP, " if plan.wanted.layout == "dcp" else ""
    lines = [
        f"{source.directory} -> {plan.target}",
        f"  model  {plan.spec.architecture}, {count(plan.spec.num_layers, 'layer')}, "
        f"{plan.spec.num_parameters():,} parameters",
        f"  in     {binary_bytes(plan.bytes_in)}, {count(source.num_tensors, 'tensor')} "
        f"in {count(len(source.files), 'file')}",
        f"  out    {into}{binary_bytes(plan.bytes_out)}, {count(plan.num_written, 'tensor')} "
        f"in {count(files, 'file')}",
        "",
        *_table(rows_of(plan)),
    ]
    left_out = plan.left_out
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        lines.append(f"  {count(len(names), 'tensor')} left out ({reason}): {shown}")
    return lines


def rows_of(plan: Conversion) -> list[dict[str, Any]]:
    """Weights with the same formats before and after, for the same reason."""
    found = Counter(
        (_before(one.weight), str(one.target or "as it is"), one.how, one.why) for one in plan.moves
    )
    ordered = sorted(found.items(), key=lambda item: (item[0][2] in ("copied", "cast"), -item[1]))
    return [
        {"count": number, "from": before, "to": after, "how": how, "why": why}
        for (before, after, how, why), number in ordered
    ]


def plan_dict(plan: Conversion) -> dict[str, Any]:
    """JSON-able values of a plan."""
    return {
        "source": str(plan.source.directory),
        "target": str(plan.target),
        "architecture": plan.spec.architecture,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "tensors_in": plan.source.num_tensors,
        "tensors_out": plan.num_written,
        "files": [shard.file for shard in plan.shards],
        "weights": rows_of(plan),
        "left_out": dict(plan.left_out),
        "fresh_tensors": list(plan.fresh),
        "mtp_num_layers": plan.spec.mtp_num_layers,
    }


def result_dict(manifest: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """JSON-able values of a conversion that was carried out."""
    errors = {
        name: told["relative_error"] for name, told in manifest["weights"].items() if "relative_error" in told
    }
    result: dict[str, Any] = {"written": True, "seconds": round(seconds, 3)}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        result["worst"] = {"name": worst, "relative_error": errors[worst]}
    return result | dict(manifest.get("checks", {}))


def result_lines(plan: Conversion, result: Mapping[str, Any]) -> list[str]:
    """Where the checkpoint is, how exact it is, and what to type next."""
    size = binary_bytes(plan.bytes_out)
    lines = [f"written: {plan.target}  {size} in {duration(result['seconds'])}"]
    worst = result.get("worst")
    if worst is None:
        lines.append("not verified: --no-verify")
    elif worst["relative_error"] == 0:
        lines.append("verified: every weight reads back as it was")
    else:
        lines.append(f"verified: largest error {worst['relative_error']:.2%} of a weight: {worst['name']}")
    if logits := result.get("logits"):
        lines.append(
            f"logits on {logits['tokens']} random tokens: KL {logits['kl']:.2e} nats, "
            f"the same best token at {logits['same_best']:.1%}"
        )
    if plan.fresh:
        lines.append(
            f"next: miles train --hf-checkpoint {plan.target} --mtp-num-layers {plan.spec.mtp_num_layers} "
            "--enable-mtp-training …"
        )
    return lines


def _before(weight: StoredWeight) -> str:
    return str(weight.format or "as it is") if weight.parts else "random"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("weights", "from", "to", "how", "why")
    cells = [(f"{row['count']:,}", row["from"], row["to"], row["how"], row["why"]) for row in rows]
    shown = [row if any(cell[4] for cell in cells) else row[:4] for row in (head, *cells)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    return [
        "  " + "  ".join([row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]).rstrip()
        for row in shown
    ]
