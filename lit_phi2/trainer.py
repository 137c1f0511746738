"""Trainer: Lightning's, with a folder for every run and the subcommands inspect and export.

    fit         check the data -> open a folder -> base's validation -> steps -> best adapter in PEFT form
    validate    metrics on val_files           test      metrics on test_files
    predict     predictions.jsonl              inspect   the data in figures, without a model
    export      a checkpoint's adapter in PEFT form

The signatures are the subcommands' arguments.
"""

import json
import logging
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_phi2.callbacks import (
    AdapterCheckpoint,
    PredictionWriter,
    ProgressBar,
    ProgressLines,
    SampleWriter,
    Throughput,
)
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.report import report
from lit_phi2.errors import InputError
from lit_phi2.files import replace_file
from lit_phi2.model.lora import read_adapter, read_checkpoint, save_adapter
from lit_phi2.model.module import LitPhi2
from lit_phi2.runs import open_run, run_folder

log = logging.getLogger(__name__)


class Trainer(pl.Trainer):
    """Lightning's Trainer; the CLI sets the attributes below before it calls a subcommand.

    Attributes:
        run_name: names the folder of a new run.
        run_config: the run as a config file, kept with it.
        wants_tensorboard: whether trainer.logger was left to us.
        wants_checkpoints: trainer.enable_checkpointing.
        wants_progress: trainer.enable_progress_bar.
    """

    run_name = "run"
    run_config = ""
    wants_tensorboard = True
    wants_checkpoints = True
    wants_progress = True

    def fit(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Train the adapter.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: continue this run: a .ckpt, a run folder, or `last` of the newest run.
        """
        self._check("fit", model, datamodule)
        self._warn_about_mixed_data(datamodule)
        throughput = Throughput()
        self.callbacks.insert(0, throughput)
        self._show_progress(throughput)
        if self.fast_dev_run:
            super().fit(model, datamodule=datamodule)
            return
        folder = run_folder(Path(ckpt_path)) if ckpt_path else self._open_run(datamodule)
        log.info("run folder: %s", folder)
        if self.wants_tensorboard:
            # purge_step: curves written after the checkpoint by a run that was killed are not shown twice
            purge_step = _steps_in(Path(ckpt_path)) + 1 if ckpt_path else None
            self.loggers = [EventLog(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)]
        self.callbacks.append(SampleWriter(folder))
        if self.wants_checkpoints:
            self.callbacks.append(AdapterCheckpoint(folder))
        else:
            log.warning("trainer.enable_checkpointing is false: no checkpoint and no adapter will be kept")
        if ckpt_path:
            self.num_sanity_val_steps = 0  # the base's point of the curves is there already
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if self.wants_checkpoints:
            log.info("adapter: %s", folder / "adapter")

    def validate(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Measure loss, perplexity and token accuracy on val_files.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
        """
        self._evaluate("validate", model, datamodule)
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def test(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Measure loss, perplexity and token accuracy on test_files.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
        """
        self._evaluate("test", model, datamodule)
        super().test(model, datamodule=datamodule, verbose=False)
        self._print_metrics()

    def predict(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Answer the records of predict_files, greedily, one JSON object a record in the order of the input.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter answers: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
            output: the file to write; predictions.jsonl in the folder of the run without.
        """
        self._evaluate("predict", model, datamodule)
        file = Path(output) if output else self.folder_of(ckpt_path) / "predictions.jsonl"
        writer = PredictionWriter(file)
        self.callbacks.append(writer)
        super().predict(model, datamodule=datamodule, return_predictions=False)
        split = datamodule.splits["predict"]
        log.info("%d of %d records answered: %s", len(writer.answers), len(split.examples), file)
        self._keep_left_out(datamodule, file.parent)

    def inspect(self, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Print the training and validation data in figures, and one example; no model is loaded.

        Args:
            model: from the config.
            datamodule: from the config.
        """
        datamodule.setup("fit")
        print(report(datamodule))

    def export(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str, output_dir: str) -> None:
        """Write a checkpoint's adapter in PEFT form, for transformers' own Phi.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: a .ckpt, an adapter or run folder, `last` or `best`.
            output_dir: the folder to write.
        """
        save_adapter(read_adapter(Path(ckpt_path)), Path(output_dir))
        log.info("adapter: %s", output_dir)

    def folder_of(self, ckpt_path: str | None) -> Path:
        """Where a subcommand other than fit writes."""
        return run_folder(Path(ckpt_path)) if ckpt_path else Path(self.default_root_dir) / self.run_name / "base"

    def _check(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """First of all: a fault in model or data costs no loading and leaves no folder."""
        datamodule.trainer = self
        model.check()
        datamodule.setup(stage)

    def _evaluate(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        self._check(stage, model, datamodule)
        for use, split in datamodule.splits.items():
            if split.left_out:
                log.warning("data.%s_files: %d records left out", use, len(split.left_out))
        self._show_progress(Throughput())
        self.callbacks.append(DefaultSignals())

    def _print_metrics(self) -> None:
        """Each metric on a line of its own: name and value."""
        for name, value in self.callback_metrics.items():
            print(f"{name} {value:.6f}")

    def _show_progress(self, throughput: Throughput) -> None:
        if self.wants_progress:
            self.callbacks.append(ProgressBar(throughput) if sys.stderr.isatty() else ProgressLines(throughput))

    def _open_run(self, datamodule: ClaimsDataModule) -> Path:
        folder = open_run(Path(self.default_root_dir), self.run_name)
        replace_file(folder / "config.yaml", lambda path: path.write_text(self.run_config, "utf-8"))
        self._keep_left_out(datamodule, folder)
        return folder

    def _keep_left_out(self, datamodule: ClaimsDataModule, folder: Path) -> None:
        """Write records that were left out to rejected.jsonl, with their place and reason."""
        lines = [
            json.dumps({"files": use, "place": fault.place, "fault": fault.message, "record": fault.raw}) + "\n"
            for use, split in datamodule.splits.items()
            for fault in split.left_out
        ]
        if lines:
            file = folder / "rejected.jsonl"
            replace_file(file, lambda path: path.write_text("".join(lines), "utf-8"))
            log.warning("%d records left out, each with its reason: %s", len(lines), file)

    def _warn_about_mixed_data(self, datamodule: ClaimsDataModule) -> None:
        if datamodule.files["val"] == "claims:validation" and datamodule.files["train"] != "claims:train":
            log.warning(
                "data.val_files: validating on the packaged claims while training on other records. Give your own, or "
                "null to hold out data.val_fraction of the training records."
            )


class DefaultSignals(Callback):
    """SIGTERM ends validate, test and predict, as it should; Lightning notes it there and goes on."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_test_start = on_predict_start = on_validation_start


class EventLog(TensorBoardLogger):
    """TensorBoard's event file and nothing else: the run is described by its config.yaml."""

    def save(self) -> None:
        self.experiment.flush()


def _steps_in(checkpoint: Path) -> int:
    if checkpoint.is_dir():
        raise InputError(
            f"--ckpt_path {checkpoint}: an adapter holds no optimizer to continue with. Give the run's last.ckpt, or "
            "start from these weights with --model.adapter."
        )
    steps: int = read_checkpoint(checkpoint)[1]["global_step"]
    return steps
