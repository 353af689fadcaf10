"""`train/`: the loss, the policy, and the optimizer."""

from __future__ import annotations

from miles.record.metrics.metric import FRACTION, NATS, TOKENS, Band, Metric

POLICY: tuple[Metric, ...] = (
    Metric("train/loss", "the loss that was minimised", "", None, "every term of the algorithm"),
    Metric("train/pg_loss", "policy-gradient term of the loss", "", None, "advantages, ratio clipping"),
    Metric(
        "train/entropy",
        "mean entropy of the policy over response tokens (slime: entropy_loss)",
        NATS,
        Band(0.02, 1.5),
        "falls as the policy gets sure; learning rate, clip-higher and the entropy bonus move it",
    ),
    Metric(
        "train/pg_clipfrac",
        "fraction of tokens whose ratio was clipped",
        FRACTION,
        Band(0, 0.2),
        "learning rate and optimizer steps per rollout",
    ),
    Metric(
        "train/ppo_kl",
        "mean of old minus current log-prob: how far the policy moved inside this rollout",
        NATS,
        Band(-0.05, 0.05),
        "learning rate and steps per rollout; 0 in the first step of a rollout",
    ),
    Metric(
        "train/ess_ratio",
        "effective sample size (sum w)^2 / (n sum w^2) of the importance ratios",
        FRACTION,
        Band(0.8, 1),
        "stale data, too many steps per rollout",
    ),
    Metric(
        "train/log_ratio_bounded",
        "tokens whose log ratio had to be bounded before exponentiation",
        TOKENS,
        Band(0, 0),
        "a policy that left the data far behind; overflow",
    ),
    Metric(
        "train/kl_loss", "KL term against the reference model", NATS, None, "drift from the reference model"
    ),
    Metric(
        "train/grad_norm",
        "gradient norm before clipping",
        "",
        None,
        "learning rate, outlier samples; judged against its own past",
    ),
    Metric("train/lr", "learning rate of the step", "", None, "schedule, or a live change"),
    Metric(
        "train/aux_loss",
        "load-balancing loss of the routers (1 = perfectly balanced)",
        "",
        None,
        "router drift, moe_aux_loss_coeff",
    ),
    Metric(
        "train/mtp_loss",
        "cross-entropy of the MTP layers to the sampled tokens, mean over depths",
        NATS,
        Band(high=1.0),
        "how well the draft follows the policy; the policy's own entropy is its floor",
    ),
    Metric(
        "train/mtp_accuracy/depth_<i>",
        "share of tokens that are the draft's first choice, i tokens ahead",
        FRACTION,
        None,
        "speculative.enable_mtp_training, the learning rate",
    ),
    Metric(
        "train/mtp_grad_norm",
        "norm of the MTP layers' gradient before clipping, which is their own",
        "",
        None,
        "speculative.mtp_loss_scaling_factor",
    ),
    Metric(
        "train/mtp_non_finite_elements",
        "elements that kept the MTP layers from being updated; absent when there were none",
        "",
        Band(high=0.0),
        "non-finite values and training.non_finite_policy",
    ),
    Metric(
        "train/non_finite_elements",
        "NaN or infinite elements met in loss and gradients",
        "elements",
        Band(0, 0),
        "overflow, bad data",
    ),
    Metric(
        "train/step_skipped",
        "1 when the optimizer step was skipped because of a non-finite value",
        "0 or 1",
        Band(0, 0),
        "non-finite values and training.non_finite_policy",
    ),
    Metric(
        "train/active_group_fraction",
        "fraction of prompt groups with a non-zero advantage",
        FRACTION,
        None,
        "task difficulty against the policy; falls as a task is solved, and as a policy dies",
    ),
    Metric("train/custom/<name>", "what a function of yours reports", "", None, "that function"),
)
