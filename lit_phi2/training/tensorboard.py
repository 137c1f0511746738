"""TensorBoard: the event file of a run, truncated on resume and strict about a full disk.

    killed run     step  0 1 2 3 4 5 6        last checkpoint at step 4
    resumed run    step  0 1 2 3 4 . .        the run writes 5 and 6 again

TensorBoard's own purge_step drops scalars but not texts, so samples would appear twice.
"""

import io
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_phi2.utils.files import atomic_write


def truncate_events(folder: Path, step: int) -> None:
    """Drop the scalars and samples after an optimizer step from every event file of a folder."""
    for file in folder.glob("events.out.tfevents*"):
        content = io.BytesIO()
        writer = RecordWriter(content)
        for record in RawEventFileLoader(str(file)).Load():  # stops at a record that a kill cut short
            if Event.FromString(record).step <= step:
                writer.write(record)
        atomic_write(file, content.getvalue())


class StrictTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event file alone: the run's config.yaml already holds the hyperparameters."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():  # Lightning's version reports a full disk as a value it cannot log
            self.experiment.add_scalar(name, value, step)

    def save(self) -> None:
        self.experiment.flush()
