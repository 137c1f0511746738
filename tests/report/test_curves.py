"""Curves of event files, and their drawings, have the values that TensorBoard's own writer was given."""

import math
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from lit_phi2.report.charts import line_chart
from lit_phi2.report.curves import Curve, read_curves


def test_of_two_values_for_a_step_the_later_file_counts(tmp_path: Path) -> None:
    """A resumed run repeats steps that the first file has. A value that is not finite is left out."""
    for suffix, values in ((".1", {1: 4.0, 2: 3.0}), (".2", {2: 2.5, 3: math.nan, 4: 2.0})):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            for step, value in values.items():
                writer.add_scalar("train/loss", value, step)
        names = sorted(file.name for file in tmp_path.iterdir())
        (file,) = (tmp_path / name for name in names if name.endswith(suffix))
        file.rename(tmp_path / f"events.out.tfevents.{suffix[1:]}")  # in the order of their times
    curve = read_curves(tmp_path).scalars["train/loss"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2, 4], [4.0, 2.5, 2.0])
    assert curve.values[curve.lowest] == 2.0


def test_a_dotted_line_is_the_base_and_drawn_only_with_it() -> None:
    """The base was measured if the first validation is at step 0."""
    for steps, dotted in (([0, 2, 4], 1), ([2, 4, 6], 0), ([0], 0)):
        val = Curve(np.array(steps), np.linspace(2, 1, len(steps)))
        drawing = str(line_chart("loss", "", None, val))
        assert drawing.count("stroke-dasharray") == dotted
