"""The panels of the board and the presets that group them: what is shown, in order of importance."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

CHART, HEATMAP, BARS, PHASES, WORKERS, ALERTS, LOG = (
    "chart",
    "heatmap",
    "bars",
    "phases",
    "workers",
    "alerts",
    "log",
)


NO_CRITIC = "no critic: algorithm.advantage_estimator is not ppo"


@dataclass(frozen=True)
class Panel:
    """One box. `metrics` are names or patterns; the first that is present gives the value in the title."""

    id: str
    title: str
    kind: str
    metrics: tuple[str, ...] = ()
    missing: str = "not reported by this run"
    """What to say when none of the metrics is there."""

    def is_empty(self, names: Iterable[str]) -> bool:
        """Whether none of its metrics is among `names`; a panel of something else is never empty."""
        return self.kind in (CHART, HEATMAP, BARS) and not matching(self.metrics, names)


PANELS = {
    panel.id: panel
    for panel in (
        Panel("reward", "reward", CHART, ("rollout/raw_reward", "eval/*")),
        Panel("gap", "log-prob gap", CHART, ("train/train_rollout_logprob_abs_diff",)),
        Panel("gap_p99", "log-prob gap p99", CHART, ("train/train_rollout_logprob_abs_diff_p99",)),
        Panel("gap_max", "log-prob gap max", CHART, ("train/train_rollout_logprob_abs_diff_max",)),
        Panel(
            "kl",
            "KL",
            CHART,
            ("train/kl_loss", "train/kl/*", "train/ppo_kl", "train/train_rollout_kl"),
            "no KL term: algorithm.use_kl_loss is off",
        ),
        Panel("entropy", "entropy", CHART, ("train/entropy", "rollout/entropy")),
        Panel("grad_norm", "grad norm", CHART, ("train/grad_norm",)),
        Panel("loss", "loss", CHART, ("train/loss", "train/pg_loss")),
        Panel("lr", "learning rate", CHART, ("train/lr",)),
        Panel("clipfrac", "clip fraction", CHART, ("train/pg_clipfrac",)),
        Panel("length", "response length", CHART, ("rollout/response_len/mean", "rollout/response_len/max")),
        Panel("truncated", "truncated", CHART, ("rollout/truncated_ratio",)),
        Panel("groups", "useful groups", CHART, ("train/active_group_fraction", "rollout/zero_std/fraction")),
        Panel("mismatch_kl", "KL rollout to trainer", CHART, ("train/train_rollout_kl",)),
        Panel("ratio", "ratio beyond 2x", CHART, ("train/ratio_gt2_frac",)),
        Panel("tis", "importance weight", CHART, ("train/tis", "train/ois"), "no correction: use_tis is off"),
        Panel("tis_clip", "weights truncated", CHART, ("train/tis_clipfrac",), "use_tis is off"),
        Panel("ess", "effective samples", CHART, ("train/ess_ratio",)),
        Panel("non_finite", "non-finite", CHART, ("train/non_finite_elements",)),
        Panel(
            "flips",
            "routing flips",
            CHART,
            ("route/flip_frac", "route/token_any_flip_frac"),
            "a dense model has no routes",
        ),
        Panel(
            "flip_map", "flips by layer", HEATMAP, ("route/flip_frac/layer_*",), "a dense model has no routes"
        ),
        Panel("overlap", "no expert in common", CHART, ("route/zero_overlap_frac",), "no routes to compare"),
        Panel("replayed", "rows replayed", CHART, ("route/replayed_rows_frac",), "routing replay is off"),
        Panel("load", "expert load max/mean", CHART, ("route/expert_load_max_over_mean",), "a dense model"),
        Panel(
            "load_map",
            "expert load by layer",
            HEATMAP,
            ("route/expert_load_max_over_mean/layer_*",),
            "no expert load by layer in this run",
        ),
        Panel(
            "rounding",
            "rounding error",
            CHART,
            ("precision/weight_error", "precision/activation_error"),
            "nothing is rounded in training",
        ),
        Panel(
            "rounding_map",
            "rounding error of weights by layer",
            HEATMAP,
            ("precision/weight_error/layer_*",),
            "nothing is rounded in training",
        ),
        Panel(
            "underflow_map",
            "weights lost by layer",
            HEATMAP,
            ("precision/weight_underflow_frac/layer_*",),
            "nothing is rounded in training",
        ),
        Panel(
            "activation_map",
            "rounding error of activations by layer",
            HEATMAP,
            ("precision/activation_error/layer_*",),
            "no activations are rounded",
        ),
        Panel(
            "rounding_edges",
            "cut off and lost",
            CHART,
            ("precision/*_saturated_frac", "precision/*_underflow_frac"),
            "nothing is rounded in training",
        ),
        Panel("explained", "variance explained", CHART, ("train/explained_variance",), NO_CRITIC),
        Panel("value_loss", "value loss", CHART, ("train/value_loss",), NO_CRITIC),
        Panel("values", "values and returns", CHART, ("rollout/values", "rollout/returns"), NO_CRITIC),
        Panel("critic_norm", "critic's grad norm", CHART, ("train/critic_grad_norm",), NO_CRITIC),
        Panel("value_clip", "values clipped", CHART, ("train/value_clipfrac",), NO_CRITIC),
        Panel("critic_lr", "critic's learning rate", CHART, ("train/critic_lr",), NO_CRITIC),
        Panel("aux", "balance loss", CHART, ("train/aux_loss",), "no load-balancing loss"),
        Panel("throughput", "tokens/s", CHART, ("perf/tokens_per_sec",)),
        Panel("rollout_rate", "rollout tokens/s", CHART, ("perf/rollout_tokens_per_sec",)),
        Panel("train_rate", "train tokens/s", CHART, ("perf/train_tokens_per_sec",)),
        Panel("step_time", "step time", CHART, ("perf/step_time",)),
        Panel("sync_time", "weight sync", CHART, ("perf/update_weights_time",)),
        Panel("memory", "memory", CHART, ("perf/cpu_memory_gb",)),
        Panel("cache", "prefix cache hits", CHART, ("rollout/prefix_cache_hit_rate",)),
        Panel(
            "acceptance",
            "draft acceptance by depth",
            BARS,
            ("rollout/spec_accept*depth_*", "rollout/spec_accept*position_*"),
            "no speculative decoding in this run",
        ),
        Panel("phases", "phases", PHASES),
        Panel("workers", "workers and engines", WORKERS, ("engine/*",)),
        Panel("alerts", "alerts", ALERTS),
        Panel("log", "log", LOG),
    )
}

PRESETS: dict[str, tuple[str, ...]] = {
    "overview": ("reward", "gap", "entropy", "grad_norm", "kl", "flips", "length", "throughput", "flip_map"),
    "numerics": (
        "gap", "grad_norm", "mismatch_kl", "gap_p99", "ratio", "clipfrac", "tis", "ess", "non_finite",
    ),
    "critic": (
        "explained", "value_loss", "values", "reward", "critic_norm", "value_clip", "kl", "entropy",
        "critic_lr",
    ),
    "moe": (
        "flip_map", "flips", "load", "load_map", "overlap", "replayed", "gap", "aux", "reward",
    ),
    "precision": (
        "gap", "rounding", "rounding_map", "underflow_map", "activation_map", "rounding_edges", "mismatch_kl",
        "grad_norm", "reward",
    ),
    "throughput": (
        "phases", "throughput", "step_time", "rollout_rate", "train_rate", "acceptance", "sync_time",
        "memory", "length",
    ),
    "incident": (
        "alerts", "log", "gap", "grad_norm", "workers", "reward", "entropy", "non_finite", "flips",
    ),
}  # fmt: skip

STAND_INS = {("overview", "flips"): "explained", ("numerics", "tis"): "critic_norm"}
"""What stands in a preset in a panel's place where a run has it: the nine numbers stay."""

SIDE = ("alerts", "phases", "log")
"""What stands beside the board where the screen is wide enough, from top to bottom."""


def presets_of(names: Iterable[str]) -> list[str]:
    """The presets that a run with these metrics has something for: the critic's only where there is one."""
    known = list(names)
    return [preset for preset in PRESETS if preset != "critic" or not PANELS["explained"].is_empty(known)]


def panels_of(preset: str, names: Iterable[str]) -> list[Panel]:
    """The panels of a preset, in order, for a run with these metrics."""
    known = list(names)
    found = []
    for panel in PRESETS[preset]:
        other = STAND_INS.get((preset, panel))
        stands_in = other is not None and not PANELS[other].is_empty(known)
        found.append(PANELS[other if other is not None and stands_in else panel])
    return found


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that fit one of the patterns, in the order of the patterns, numbers in numeric order."""
    known = list(names)
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = (n for n in known if fnmatchcase(n, pattern) and not n.endswith("-truncated_ratio"))
        found.update(dict.fromkeys(sorted(hits, key=natural)))
    return list(found)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts layer_10 after layer_9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def short_name(metric: str) -> str:
    """The name without its group, for legends."""
    return metric.split("/", 1)[-1].removeprefix("train_rollout_")


def metric_panel(name: str) -> Panel:
    """A panel for one metric that no preset names."""
    return Panel(f"metric:{name}", name, CHART, (name,))


def passes(text: str, query: str) -> bool:
    """Whether `text` passes a filter: every word in it, or none of them after a leading `!`."""
    words = query.lower().removeprefix("!").split()
    found = all(word in text.lower() for word in words)
    return not found if query.startswith("!") and words else found
