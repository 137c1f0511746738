"""training/tensorboard.py."""

import io
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_phi2.utils.files import atomic_write


def truncate_events(folder: Path, step: int) -> None:
    """Drop curves and samples that a run which was killed wrote after its last checkpoint; they will come again.

    Nothing but this keeps samples from standing there twice: TensorBoard's own purge leaves texts alone.
    """
    for file in folder.glob("events.out.tfevents*"):
        kept = io.BytesIO()
        writer = RecordWriter(kept)
        for record in RawEventFileLoader(str(file)).Load():  # ends at a record that the kill has cut
            if Event.FromString(record).step <= step:
                writer.write(record)
        atomic_write(file, kept.getvalue())


class StrictTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event file and nothing else: the run is described by its config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():  # Lightning's own would tell a full disk as a value it cannot log
            self.experiment.add_scalar(name, value, step)

    def save(self) -> None:
        self.experiment.flush()
