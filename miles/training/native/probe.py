"""What would be without routing replay, the log-prob gap and the flips, measured on a bounded part of each
rollout batch.
"""

from __future__ import annotations

import numpy as np
import torch

from miles.data.batch import TrainBatch
from miles.models.decoder import Decoder
from miles.training.native.forward import forward, make_router
from miles.training.native.measurements import PassMeasurements
from miles.training.native.micro_batches import make_micro_batch
from miles.training.native.shared_prompts import may_share_prompts
from miles.training.settings import TrainerSettings

NO_REPLAY = "_no_replay"


@torch.no_grad()
def gap_without_replay(
    decoder: Decoder,
    batch: TrainBatch,
    settings: TrainerSettings,
    device: torch.device,
    measured: PassMeasurements | None = None,
) -> dict[str, float]:
    """Gap and routing metrics with suffix `_no_replay`, on the batch's first sequences of the newest weights,
    up to `probe_tokens` rows.

    Empty when nothing is replayed (the ordinary gap then is the one without replay), when the engine
    reported no log-probs, or when `probe_tokens` is 0. At least one sequence is probed, however long.

    `measured`: what a pass with replay over all of the batch measured under the same weights. Where it has
    the answer no pass of the probe's own is made.
    """
    probed = probed_sequences(batch, settings)
    if probed is None:
        return {}
    known = None if measured is None else measured.of_sequences(batch, probed)
    if known is not None:
        return known.gap_metrics(NO_REPLAY) | known.agreement_metrics(NO_REPLAY)
    share = may_share_prompts(decoder, settings, batch)
    micro_batch = make_micro_batch(batch, probed, device, share)
    if micro_batch.num_trained == 0:
        return {}
    router = make_router(micro_batch, replay=False, measure=True)
    output = forward(decoder, micro_batch, router, settings.algorithm.temperature, with_entropy=False)
    measurements = PassMeasurements(decoder.spec)
    measurements.add_log_probs(micro_batch, output, batch.newest_rollout_log_probs)
    measurements.add_routing(micro_batch, router, replay=False)
    return measurements.gap_metrics(NO_REPLAY) | measurements.agreement_metrics(NO_REPLAY)


def probed_sequences(batch: TrainBatch, settings: TrainerSettings) -> np.ndarray | None:
    """int64 indices of the sequences to probe, those without a token of older weights first; at least one.
    None where nothing is replayed, or nothing is to be probed.
    """
    if not settings.replay_routes or batch.routes is None or settings.probe_tokens == 0:
        return None
    order = np.arange(batch.num_sequences)
    versions_T = batch.weight_versions
    if versions_T is not None:
        old_T = (versions_T >= 0) & (versions_T < versions_T.max())
        order = np.argsort(np.logical_or.reduceat(old_T, batch.cu_seqlens[:-1]), kind="stable")
    fits = np.cumsum(batch.lengths[order]) <= settings.probe_tokens
    return order[: max(1, int(fits.sum()))]
