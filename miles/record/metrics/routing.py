"""`route/`: which experts tokens went to, on both sides."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, Band, Metric

ROUTING: tuple[Metric, ...] = (
    Metric(
        "route/flip_frac",
        "fraction of (token, MoE layer) choices the trainer would make differently from the engine",
        FRACTION,
        Band(0, 0.1),
        "kernel and precision noise; without replay it becomes a log-prob gap",
    ),
    Metric(
        "route/flip_frac/layer_<i>",
        "the same for one MoE layer, counted from 0",
        FRACTION,
        Band(0, 0.15),
        "as route/flip_frac; one bad layer points at that layer's weights or offset",
    ),
    Metric(
        "route/token_any_flip_frac",
        "fraction of tokens with a different choice in at least one layer",
        FRACTION,
        None,
        "as route/flip_frac; grows with depth",
    ),
    Metric(
        "route/zero_overlap_frac",
        "fraction of (token, layer) choices that share no expert with the engine's",
        FRACTION,
        Band(0, 0.01),
        "wrong layer order, shifted rows, stale weights",
    ),
    Metric(
        "route/dispatched_flip_frac",
        "fraction of (token, MoE layer) pairs that the trainer sent to other experts than the engine did",
        FRACTION,
        None,
        "exactly 0 where every row is replayed; route/flip_frac without replay",
    ),
    Metric(
        "route/ref_dispatched_flip_frac",
        "the same for the reference model, which decides for itself: the routes are not its own",
        FRACTION,
        None,
        "distance of the policy from the reference; it adds to the measured KL",
    ),
    *(
        Metric(
            f"route/{name}_no_replay{layer}",
            f"{name} without routing replay, on a bounded part of the batch{told}",
            FRACTION,
            None,
            "kernel and precision noise, which grows from layer to layer where nothing is replayed",
        )
        for name, layer, told in (
            ("flip_frac", "", ""),
            ("flip_frac", "/layer_<i>", ", for one MoE layer"),
            ("token_any_flip_frac", "", ""),
            ("zero_overlap_frac", "", ""),
            ("dispatched_flip_frac", "", ""),
        )
    ),
    Metric(
        "route/replayed_rows_frac",
        "fraction of rows whose routes were replayed from the engine",
        FRACTION,
        Band(0.99, 1),
        "engine returning routes, alignment.use_rollout_routing_replay",
    ),
    Metric(
        "route/expert_load_max_over_mean",
        "load of the busiest expert over the mean load, worst layer",
        "",
        Band(1, 5),
        "router collapse, load balancing",
    ),
    Metric(
        "route/expert_load_max_over_mean/layer_<i>",
        "the same for one MoE layer, counted from 0",
        "",
        Band(1, 5),
        "as route/expert_load_max_over_mean; one bad layer points at that layer's router",
    ),
    Metric(
        "route/bytes_per_token", "memory of the recorded routes per token", "bytes", None, "layers x top-k"
    ),
    Metric(
        "route/wire_bytes_per_token",
        "the same on disk and between processes: one byte per expert id where the experts fit",
        "bytes",
        None,
        "layers x top-k, number of experts, rows that were not recorded",
    ),
)
