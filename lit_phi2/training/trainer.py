"""Trainer: Lightning's, with a folder for every run, and the subcommands inspect and export.

    fit         check the data -> open a folder -> validate the base -> steps -> best adapter in PEFT form
    validate    metrics on val_files             test      metrics on test_files, and its completions scored
    predict     predictions.jsonl                inspect   statistics of the data, without a model
    export      the adapter of a checkpoint in PEFT form

The CLI makes its flags from the signatures of these methods, and its help from their docstrings.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.summary import report
from lit_phi2.errors import InputError
from lit_phi2.evaluation.table import format_table, metric_name, to_dict
from lit_phi2.training.callbacks.checkpoint import AdapterCheckpoint, AtomicCheckpointIO
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.callbacks.progress import ProgressBar, ProgressLogger
from lit_phi2.training.callbacks.samples import SampleWriter
from lit_phi2.training.callbacks.signals import DefaultSigterm
from lit_phi2.training.callbacks.throughput import Throughput
from lit_phi2.training.loops import StepAlignedEpochLoop
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.protocols import TrainingData
from lit_phi2.training.rejected import write_rejected
from lit_phi2.training.resume import check_resumable
from lit_phi2.training.run_folder import broadcast_run_dir, check_writable, open_run_dir
from lit_phi2.training.scoring import score_test_completions
from lit_phi2.training.tensorboard import StrictTensorBoardLogger, truncate_events
from lit_phi2.utils.console import escape_control_chars
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import run_dir_of

log = logging.getLogger(__name__)


class Trainer(pl.Trainer):
    """Lightning's Trainer; the CLI sets the attributes below before it calls a subcommand.

    Attributes:
        run_name: names the folder of a new run.
        run_config: the run as a config file, saved in its folder.
        enable_tensorboard: trainer.logger is not set by the user.
        enable_checkpoints: trainer.enable_checkpointing.
        enable_progress: trainer.enable_progress_bar.
        checkpoint_every_n_steps: checkpoint.every_n_steps.
        checkpoint_every_minutes: checkpoint.every_minutes.
    """

    run_name = "run"
    run_config = ""
    enable_tensorboard = True
    enable_checkpoints = True
    enable_progress = True
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_minutes: float | None = None

    def fit(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Train the adapter.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: continue this run: a .ckpt, a run folder, or `last` of the newest run.
        """
        resumed = self._read_resumed(ckpt_path)
        self._prepare("fit", model, datamodule)
        total_steps = model.total_steps()
        if resumed is not None:
            check_resumable(resumed["lit_phi2"]["run"], model.run_fingerprint(), datamodule.batching())
        self._warn_about_mixed_data(datamodule)
        throughput = Throughput()
        self.callbacks.insert(0, throughput)
        self._show_progress(throughput)
        if not self.enable_checkpoints or self.fast_dev_run:
            self.callbacks.append(DefaultSigterm())
        if self.fast_dev_run:
            super().fit(model, datamodule=datamodule)
            return
        run_dir = run_dir_of(Path(ckpt_path)) if ckpt_path else broadcast_run_dir(self, self._open_run)
        log.info("run folder: %s", run_dir)
        self._write_rejected(datamodule, run_dir)
        checkpoints = self._add_run_outputs(run_dir, resumed)
        self.fit_loop.epoch_loop = StepAlignedEpochLoop(self, self.min_steps, self.max_steps)
        if resumed:
            self.num_sanity_val_steps = 0  # the event file already has the step-0 baseline
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if self.global_step < total_steps:
            log.info("stopped early, after step %d of %d", self.global_step, total_steps)
        if checkpoints is not None:
            checkpoints.export(self, model)
            log.info("adapter: %s", run_dir / "adapter")

    def validate(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Measure loss, perplexity and token accuracy on val_files.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
        """
        self._prepare_evaluation("validate", model, datamodule)
        self._write_rejected(datamodule, self.output_dir_for(ckpt_path))
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics({name: value.item() for name, value in self.callback_metrics.items()})

    def test(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        max_completions: int | None = None,
    ) -> None:
        """Measure the loss on test_files, then score completions of its records beside baselines.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
            max_completions: complete only so many records, from the first; 0 measures the loss alone.
        """
        if max_completions is not None and max_completions < 0:
            raise InputError(f"--max_completions {max_completions}: is less than 0; expected a number of records.")
        file = self.output_dir_for(ckpt_path) / "test_metrics.json"
        check_writable(file, str(file))
        self._prepare_evaluation("test", model, datamodule)
        has_adapter = ckpt_path is not None or model.adapter is not None
        collector = TestCompletions(has_adapter=has_adapter, count=max_completions)
        if max_completions != 0:
            datamodule.check_context_length("test", max_completions)
            self.callbacks.append(collector)
        self._write_rejected(datamodule, file.parent)
        super().test(model, datamodule=datamodule, verbose=False)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        if not self.is_global_zero:
            return
        table = score_test_completions(collector.completions, datamodule, max_completions)
        for name, interval in next(iter(table.values()), {}).items():
            if not name.startswith("category "):  # categories are in the table and in the file
                metrics[metric_name(name)] = interval.mean
        self._print_metrics(metrics)
        if table:
            print("\n" + escape_control_chars(format_table(table)))
        atomic_write(file, json.dumps(metrics | {"completions": to_dict(table)}, indent=2) + "\n")
        log.info("test metrics: %s", file)

    def predict(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
    ) -> None:
        """Complete the records of predict_files, greedily: one JSON object a record, in the order of the input.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: the adapter to use: a .ckpt, an adapter or run folder, `last` or `best`; the base by default.
            output: the file to write; by default predictions.jsonl in the run's folder.
        """
        file = Path(output) if output else self.output_dir_for(ckpt_path) / "predictions.jsonl"
        check_writable(file, f"--output {file}")
        self._prepare_evaluation("predict", model, datamodule)
        self._write_rejected(datamodule, file.parent)
        prompts = datamodule.splits["predict"].digest
        writer = PredictionWriter(file, {**model.generation_fingerprint(), "prompts": prompts})
        datamodule.completed = writer.read_completed()
        self.callbacks.append(writer)
        if datamodule.pending():
            super().predict(model, datamodule=datamodule, return_predictions=False)
            self.strategy.barrier()
        if self.is_global_zero:
            writer.finish()
            message = "%d completions, %d of them stopped at max_new_tokens: %s"
            log.info(message, writer.num_completions, writer.num_at_limit, file)

    def inspect(self, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Print statistics of the training and validation data, and one example; no model is loaded.

        Args:
            model: from the config.
            datamodule: from the config.
        """
        datamodule.setup("fit")
        print(escape_control_chars(report(datamodule)))

    def export(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str, output_dir: str) -> None:
        """Write the adapter of a checkpoint in PEFT form, for transformers' own Phi.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: a .ckpt, an adapter or run folder, `last` or `best`.
            output_dir: the folder to write.
        """
        if Path(output_dir).is_file():
            raise InputError(f"--output_dir {output_dir}: is a file; expected a folder, which may be new.")
        save_adapter(read_adapter(Path(ckpt_path)), Path(output_dir))
        log.info("adapter: %s", output_dir)

    def output_dir_for(self, ckpt_path: str | None) -> Path:
        """The folder that a subcommand other than fit writes to."""
        return run_dir_of(Path(ckpt_path)) if ckpt_path else Path(self.default_root_dir) / self.run_name / "base"

    # Steps that subcommands share

    def _read_resumed(self, ckpt_path: str | None) -> dict[str, Any] | None:
        """The checkpoint that fit continues from."""
        if ckpt_path is None:
            return None
        if self.fast_dev_run:
            raise InputError("trainer.fast_dev_run: tries a new run and continues none; leave out --ckpt_path.")
        if Path(ckpt_path).is_dir():
            raise InputError(
                f"--ckpt_path {ckpt_path}: an adapter holds no optimizer state to continue with. Give the run's "
                "last.ckpt, or start from these weights with --model.adapter."
            )
        return read_checkpoint(Path(ckpt_path))[1]

    def _prepare(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Check model and data first: an invalid setting or record then loads no weights and leaves no folder."""
        data: TrainingData = datamodule  # mypy checks the protocol here; Lightning types its attribute as Any
        self.datamodule = data
        datamodule.trainer = model.trainer = self
        model.check()
        datamodule.setup(stage)
        for split_name, split in data.splits.items():
            if split.truncated:
                log.warning(
                    "data.%s_files: the input of %d records was shortened to make them fit", split_name, split.truncated
                )

    def _prepare_evaluation(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        self._prepare(stage, model, datamodule)
        self._show_progress(Throughput())
        self.callbacks.append(DefaultSigterm())

    def _open_run(self) -> Path:
        return open_run_dir(Path(self.default_root_dir), self.run_name, self.run_config)

    def _add_run_outputs(self, run_dir: Path, resumed: dict[str, Any] | None) -> AdapterCheckpoint | None:
        """Write scalars, samples and checkpoints to a run's folder; None if checkpoints are off."""
        if self.enable_tensorboard:
            if resumed and self.is_global_zero:
                truncate_events(run_dir, resumed["global_step"])
            self.loggers = [StrictTensorBoardLogger(run_dir, name="", version="", default_hp_metric=False)]
        self.callbacks.append(SampleWriter(run_dir))
        if not self.enable_checkpoints:
            log.warning("trainer.enable_checkpointing is false: no checkpoint and no adapter will be kept")
            return None
        self.strategy.checkpoint_io = AtomicCheckpointIO()
        steps, minutes = self.checkpoint_every_n_steps, self.checkpoint_every_minutes
        checkpoints = AdapterCheckpoint(run_dir, every_n_steps=steps, every_minutes=minutes)
        self.callbacks.append(checkpoints)
        return checkpoints

    def _show_progress(self, throughput: Throughput) -> None:
        if self.enable_progress:
            self.callbacks.append(ProgressBar(throughput) if sys.stderr.isatty() else ProgressLogger(throughput))

    def _write_rejected(self, datamodule: ClaimsDataModule, folder: Path) -> None:
        if self.is_global_zero:
            write_rejected(datamodule.splits, folder)

    def _print_metrics(self, metrics: dict[str, float]) -> None:
        """Print one metric a line: name and value."""
        if not self.is_global_zero:
            return
        for name, value in metrics.items():
            print(escape_control_chars(f"{name} {value:.6f}"))

    def _warn_about_mixed_data(self, datamodule: ClaimsDataModule) -> None:
        packaged = str(datamodule.files["train"]).startswith("claims:")
        if str(datamodule.files["val"]).startswith("claims:") and not packaged:
            log.warning(
                "data.val_files: validating on the packaged claims while training on other records. Give your own, or "
                "null to hold out data.val_fraction of the training records."
            )
