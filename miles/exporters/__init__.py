"""The run record in other systems' formats: TensorBoard, Parquet, CSV, OpenMetrics, W&B, MLflow.

Late, from a recorded run (`export_run`, `compact`), or live, by a process that follows the record (`follow`).
"""

from miles.exporters.export import FORMATS, export_run
from miles.exporters.follow import follow
from miles.exporters.tables import compact

__all__ = ["FORMATS", "compact", "export_run", "follow"]
