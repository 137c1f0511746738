"""The event file of a run: one chart of both losses, and nothing twice after a resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from helpers import DieAt, new_data, new_module, new_trainer


@pytest.mark.parametrize("dies", [False, True])
def test_both_losses_are_in_one_chart_also_after_a_resume(
    dies: bool, phi_dir: Path, train_file: Path, tmp_path: Path, read_events: Callable[[Path], EventAccumulator]
) -> None:
    """Reference: the layout as TensorBoard's own plugin reads it."""
    settings = {"keep": True, "max_epochs": 2, "num_sanity_val_steps": -1}
    folder = tmp_path / "run" / "version_0"
    if dies:
        with pytest.raises(RuntimeError, match="power cut"):
            new_trainer(tmp_path, [DieAt(8)], **settings).fit(new_module(phi_dir), new_data(phi_dir, train_file))
    last = str(folder / "checkpoints" / "last.ckpt") if dies else None
    new_trainer(tmp_path, **settings).fit(new_module(phi_dir), new_data(phi_dir, train_file), ckpt_path=last)
    events = read_events(folder)
    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    (chart,) = category.chart
    assert (chart.title, list(chart.multiline.tag)) == ("loss", ["^train/loss$", "^val/loss$"])
    for tag in ("train/loss", "val/loss"):
        steps = [each.step for each in events.Scalars(tag)]
        assert len(steps) > 2
        assert steps == sorted(set(steps)), tag
