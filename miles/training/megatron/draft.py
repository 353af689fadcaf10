"""Online training of the MTP layers in Megatron's form; `training.draft_course` says what they are taught.

Every process has a `DraftTraining` and makes the same calls; the layers are on the last pipeline stage alone,
and the optimizers of the others are empty.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from torch import Tensor

from miles.data.batch import TrainBatch
from miles.training.draft_course import DraftCourse, DraftUpdate
from miles.training.megatron.draft_model import DraftModel
from miles.training.megatron.head import best_tokens, row_log_probs
from miles.training.megatron.model import PolicyModel
from miles.training.megatron.optimizer import MasterAdam
from miles.training.megatron.passes import Chunks
from miles.training.megatron.tensors import MegatronTensors
from miles.training.native.micro_batches import MicroBatch


class DraftTraining:
    """`draft` is None but on the last stage; `wrapped` and `optimizer` are without parameters there."""

    def __init__(
        self,
        chunks: Chunks,
        draft: DraftModel | None,
        wrapped: DistributedDataParallel,
        optimizer: MasterAdam,
        course: DraftCourse,
    ) -> None:
        self.draft, self.optimizer = draft, optimizer
        self._chunks, self.wrapped, self._course = chunks, wrapped, course
        self._embedding: Tensor | None = None

    def begin(self, batch: TrainBatch, indices_N: np.ndarray) -> DraftUpdate | None:
        """A step over these sequences of the batch; None where they have nothing to teach."""
        self.optimizer.begin()
        update = self._course.begin(batch, indices_N)
        if update is not None:
            self._embedding = _embedding_at_the_end(self._chunks)
        return update

    @torch.enable_grad()
    def learn(
        self, update: DraftUpdate, hidden_t1D: Tensor, micro_batch: MicroBatch, batch: TrainBatch
    ) -> None:
        """Forward and backward of one micro-batch, on the last stage, right after the trunk's forward."""
        assert self.draft is not None and self._embedding is not None
        taught = self._course.lessons(batch, micro_batch)
        features = self.draft.chain(
            micro_batch.unshared(hidden_t1D),
            *self._course.chain_inputs(taught, batch, micro_batch, hidden_t1D.device),
            micro_batch.cu_seqlens_N1,
            self._embedding,
        )
        self._course.backward(update, taught, features, self._cross_entropy, micro_batch.padding)

    def reduce(self) -> None:
        """Sum gradients over the ranks, once all micro-batches are done."""
        self.wrapped.finish_grad_sync()
        _allreduce_non_tensor_model_parallel_grads([self.wrapped], self.wrapped.config)

    def finish(self, tensors: MegatronTensors, learning_rate: float, metrics: dict[str, float]) -> bool:
        """As `native.draft.DraftTraining.finish`; `tensors`: those of the whole model."""
        norm = metrics["train/mtp_grad_norm"] = tensors.norm(tensors.draft_names, MasterAdam.gradient)
        if not (math.isfinite(norm) and math.isfinite(metrics["train/mtp_loss"])):
            return False
        self.optimizer.prepare()
        self.optimizer.apply(learning_rate, norm)
        return True

    def _cross_entropy(self, rows_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        model, layout = self._chunks.bare[-1], self._chunks.layout
        head = model.head_weight.detach()
        log_probs_R, _ = row_log_probs(model, layout, rows_RD, head, targets_R)
        correct_R = best_tokens(model, layout, rows_RD.detach(), head) == targets_R
        return -log_probs_R.sum(), correct_R.sum().float()


def _embedding_at_the_end(chunks: Chunks) -> Tensor | None:
    """This rank's rows of the embedding on the last stage, which the first one sends; None elsewhere."""
    first, last = chunks.bare[0], chunks.bare[-1]
    if chunks.layout.pp == 1:
        return _embedding(first)
    at_end = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if chunks.spec.tie_word_embeddings:
        return last.head_weight.detach() if at_end else None
    if not (at_end or parallel_state.is_pipeline_first_stage(ignore_virtual=True)):
        return None
    weight = torch.empty_like(last.head_weight.detach()) if at_end else _embedding(first)
    group = parallel_state.get_embedding_group()
    dist.broadcast(weight, dist.get_global_rank(group, 0), group=group)
    return weight if at_end else None


def _embedding(model: PolicyModel) -> Tensor:
    weight: Tensor = model.embedding.word_embeddings.weight
    return weight.detach()
