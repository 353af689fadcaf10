"""The sections of a run file, and `RunConfig`, which holds them all."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from miles.config.sections.algorithm import AlgorithmSection
from miles.config.sections.alignment import AlignmentSection
from miles.config.sections.base import Section
from miles.config.sections.checkpoint import CheckpointSection
from miles.config.sections.cluster import ClusterSection
from miles.config.sections.correction import CorrectionSection
from miles.config.sections.critic import CriticSection
from miles.config.sections.data import DataSection
from miles.config.sections.debug import DebugSection
from miles.config.sections.distillation import DistillationSection
from miles.config.sections.engine import EngineSection
from miles.config.sections.eval import EvalSection
from miles.config.sections.fault_tolerance import FaultToleranceSection
from miles.config.sections.model import ModelSection
from miles.config.sections.optimizer import OptimizerSection
from miles.config.sections.parallel import ParallelSection
from miles.config.sections.precision import PrecisionSection
from miles.config.sections.record import RecordSection
from miles.config.sections.reward import RewardSection
from miles.config.sections.rollout import RolloutSection
from miles.config.sections.run import RunSection
from miles.config.sections.sglang import SglangSection
from miles.config.sections.speculative import SpeculativeSection
from miles.config.sections.training import TrainingSection
from miles.config.sections.weight_sync import WeightSyncSection


class RunConfig(BaseModel):
    """Everything a run is told, frozen; `miles.config.resolve` makes one and knows each value's origin."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    cluster: ClusterSection = ClusterSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    sglang: SglangSection = SglangSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    correction: CorrectionSection = CorrectionSection()
    critic: CriticSection = CriticSection()
    distillation: DistillationSection = DistillationSection()
    alignment: AlignmentSection = AlignmentSection()
    speculative: SpeculativeSection = SpeculativeSection()
    precision: PrecisionSection = PrecisionSection()
    weight_sync: WeightSyncSection = WeightSyncSection()
    reward: RewardSection = RewardSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    record: RecordSection = RecordSection()
    fault_tolerance: FaultToleranceSection = FaultToleranceSection()
    debug: DebugSection = DebugSection()


__all__ = ["RunConfig", "Section"]
