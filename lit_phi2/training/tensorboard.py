"""TensorBoard: the event file of a run, truncated on resume and strict about a full disk.

    killed run     layout, step  0 1 2 3 4 5 6        last checkpoint at step 4
    resumed run    layout, step  0 1 2 3 4 . .        the run writes 5 and 6 again

TensorBoard's own purge_step drops scalars but not texts, so samples would appear twice.
"""

import io
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_phi2.utils.files import atomic_write

# The charts of the page Custom Scalars: a page, its charts, the curves of each (as regular expressions).
LAYOUT = {"Training": {"loss": ["Multiline", ["^train/loss$", "^val/loss$"]]}}


def truncate_events(folder: Path, step: int, repeated: tuple[str, ...] = ()) -> None:
    """Drop the scalars and samples after an optimizer step from every event file of a folder.

    Args:
        folder: of the run.
        step: that the run is resumed from.
        repeated: tags that begin with one of these are dropped at the step itself too: the run writes them again.
    """
    for file in sorted(folder.glob("events.out.tfevents*")):
        if file.suffix in (".new", ".lock"):  # a kill during an earlier resume left it; TensorBoard would read it too
            file.unlink(missing_ok=True)
            continue
        content = io.BytesIO()
        writer = RecordWriter(content)
        for record in RawEventFileLoader(str(file)).Load():  # stops at a record that a kill cut short
            event = Event.FromString(record)
            is_repeated = event.step == step and any(value.tag.startswith(repeated) for value in event.summary.value)
            if event.step <= step and not is_repeated:
                writer.write(record)
        atomic_write(file, content.getvalue())


class StrictTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event file alone: the run's config.yaml already holds the hyperparameters."""

    @rank_zero_only
    def log_layout(self) -> None:
        """Put train/loss and val/loss into one chart; once for a run, because the event file keeps it."""
        self.experiment.add_custom_scalars(LAYOUT)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():  # Lightning's version reports a full disk as a value it cannot log
            self.experiment.add_scalar(name, value, step)

    def save(self) -> None:
        self.experiment.flush()
