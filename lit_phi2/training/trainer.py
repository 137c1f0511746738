"""Trainer: Lightning's, with a folder for every run and the subcommands inspect and export.

    fit         check the data -> open a folder -> base's validation -> steps -> best adapter in PEFT form
    validate    metrics on val_files           test      metrics on test_files, and its answers judged
    predict     predictions.jsonl              inspect   the data in figures, without a model
    export      a checkpoint's adapter in PEFT form

The signatures are the subcommands' arguments.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.summary import report
from lit_phi2.errors import InputError
from lit_phi2.evaluation.metrics import Table, compare_with_baselines
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
from lit_phi2.training.tensorboard import StrictTensorBoardLogger, truncate_events
from lit_phi2.utils.console import escape_control_chars
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.paths import create_run_dir, run_dir_of

log = logging.getLogger(__name__)

_RUN_FOLDER = "LIT_PHI2_RUN_FOLDER"  # tells processes that Lightning starts which folder the first has opened


class Trainer(pl.Trainer):
    """Lightning's Trainer; the CLI sets the attributes below before it calls a subcommand.

    Attributes:
        run_name: names the folder of a new run.
        run_config: the run as a config file, kept with it.
        wants_tensorboard: whether trainer.logger was left to us.
        wants_checkpoints: trainer.enable_checkpointing.
        wants_progress: trainer.enable_progress_bar.
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
        self._check("fit", model, datamodule)
        total_steps = model.total_steps()
        if resumed is not None:
            model.check_resumable(resumed)
        self._warn_about_mixed_data(datamodule)
        throughput = Throughput()
        self.callbacks.insert(0, throughput)
        self._show_progress(throughput)
        if not self.enable_checkpoints or self.fast_dev_run:
            self.callbacks.append(DefaultSigterm())
        if self.fast_dev_run:
            super().fit(model, datamodule=datamodule)
            return
        folder = run_dir_of(Path(ckpt_path)) if ckpt_path else self._agree(self._open_run)
        log.info("run folder: %s", folder)
        self._write_rejected(datamodule, folder)
        if self.enable_tensorboard:
            if resumed and self.is_global_zero:
                truncate_events(folder, resumed["global_step"])
            self.loggers = [StrictTensorBoardLogger(folder, name="", version="", default_hp_metric=False)]
        self.callbacks.append(SampleWriter(folder))
        if self.enable_checkpoints:
            steps, minutes = self.checkpoint_every_n_steps, self.checkpoint_every_minutes
            self.strategy.checkpoint_io = AtomicCheckpointIO()
            checkpoints = AdapterCheckpoint(folder, every_n_steps=steps, every_minutes=minutes)
            self.callbacks.append(checkpoints)
        else:
            log.warning("trainer.enable_checkpointing is false: no checkpoint and no adapter will be kept")
        self.fit_loop.epoch_loop = StepAlignedEpochLoop(self, self.min_steps, self.max_steps)
        if resumed:
            self.num_sanity_val_steps = 0  # the base's point of the curves is there already
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if self.global_step < total_steps:
            log.info("stopped early, after step %d of %d", self.global_step, total_steps)
        if self.enable_checkpoints:
            checkpoints.export(self, model)
            log.info("adapter: %s", folder / "adapter")

    def validate(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Measure loss, perplexity and token accuracy on val_files.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
        """
        self._evaluate("validate", model, datamodule)
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
        """Measure the loss on test_files, then answer the records and judge the answers, beside plain baselines.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
            max_completions: how many records to answer, from the first; all without, 0 for the loss alone.
        """
        if max_completions is not None and max_completions < 0:
            raise InputError(f"--max_completions {max_completions}: is less than 0; expected a number of records.")
        file = self.output_dir_for(ckpt_path) / "test_metrics.json"
        _check_writable(file, str(file))
        self._evaluate("test", model, datamodule)
        if max_completions != 0:
            datamodule.check_context_length("test", max_completions)
        self._write_rejected(datamodule, file.parent)
        adapted = ckpt_path is not None or model.adapter is not None
        completed = TestCompletions(adapted=adapted, count=max_completions)
        if max_completions != 0:
            self.callbacks.append(completed)
        super().test(model, datamodule=datamodule, verbose=False)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        if not self.is_global_zero:
            return
        columns = self._score_completions(completed, datamodule)
        for name, interval in next(iter(columns.values()), {}).items():
            if not name.startswith("category "):  # those are in the table and in the file
                metrics[metric_name(name)] = interval.mean
        self._print_metrics(metrics)
        if columns:
            print("\n" + escape_control_chars(format_table(columns)))
        written = metrics | {"completions": to_dict(columns)}
        atomic_write(file, json.dumps(written, indent=2) + "\n")
        log.info("test metrics: %s", file)

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
        file = Path(output) if output else self.output_dir_for(ckpt_path) / "predictions.jsonl"
        _check_writable(file, f"--output {file}")
        self._evaluate("predict", model, datamodule)
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
            log.info("%d records answered, %d of them cut at max_new_tokens: %s", writer.written, writer.cut, file)

    def inspect(self, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Print the training and validation data in figures, and one example; no model is loaded.

        Args:
            model: from the config.
            datamodule: from the config.
        """
        datamodule.setup("fit")
        print(escape_control_chars(report(datamodule)))

    def export(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str, output_dir: str) -> None:
        """Write a checkpoint's adapter in PEFT form, for transformers' own Phi.

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
        """Where a subcommand other than fit writes."""
        return run_dir_of(Path(ckpt_path)) if ckpt_path else Path(self.default_root_dir) / self.run_name / "base"

    def _check(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """First of all: a fault in model or data costs no loading and leaves no folder."""
        self.datamodule = datamodule
        datamodule.trainer = model.trainer = self
        model.check()
        datamodule.setup(stage)
        for split_name, split in datamodule.splits.items():
            if split.truncated:
                log.warning(
                    "data.%s_files: the input of %d records was shortened to make them fit", split_name, split.truncated
                )

    def _evaluate(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        self._check(stage, model, datamodule)
        self._show_progress(Throughput())
        self.callbacks.append(DefaultSigterm())

    def _read_resumed(self, ckpt_path: str | None) -> dict[str, Any] | None:
        """The checkpoint that fit continues from."""
        if ckpt_path is None:
            return None
        if self.fast_dev_run:
            raise InputError("trainer.fast_dev_run: tries a new run and continues none; leave out --ckpt_path.")
        if Path(ckpt_path).is_dir():
            raise InputError(
                f"--ckpt_path {ckpt_path}: an adapter holds no optimizer to continue with. Give the run's last.ckpt, "
                "or start from these weights with --model.adapter."
            )
        return read_checkpoint(Path(ckpt_path))[1]

    def _print_metrics(self, metrics: dict[str, float]) -> None:
        """Each metric on a line of its own: name and value."""
        if not self.is_global_zero:
            return
        for name, value in metrics.items():
            print(escape_control_chars(f"{name} {value:.6f}"))

    def _score_completions(self, completed: TestCompletions, datamodule: ClaimsDataModule) -> Table:
        """Figures of what was answered, beside the baselines; empty where nothing was."""
        if not completed.answers:
            return {}
        assert datamodule.tokenizer is not None
        texts = {
            name: (
                datamodule.tokenizer.batch_decode([answer.ids for answer in answers]),
                [answer.finish_reason == "stop" for answer in answers],
            )
            for name, answers in completed.answers.items()
        }
        try:
            train = datamodule.training_records()
        except InputError as error:
            log.warning("the nearest training record is left out of the baselines: %s", error)
            train = []
        return compare_with_baselines(datamodule.splits["test"].records[: completed.count], texts, train)

    def _show_progress(self, throughput: Throughput) -> None:
        if self.enable_progress:
            self.callbacks.append(ProgressBar(throughput) if sys.stderr.isatty() else ProgressLogger(throughput))

    def _open_run(self) -> Path:
        folder = create_run_dir(Path(self.default_root_dir), self.run_name)
        atomic_write(folder / "config.yaml", self.run_config)
        return folder

    def _agree(self, create_run_dir: Callable[[], Path]) -> Path:
        """The folder that rank 0 opens, on every rank."""
        if self.world_size == 1:
            return create_run_dir()
        if not self.is_global_zero and _RUN_FOLDER in os.environ:
            return Path(os.environ[_RUN_FOLDER])
        if self.strategy.cluster_environment.creates_processes_externally:  # torchrun, SLURM: all are here
            self.strategy.setup_environment()
            told: Path = self.strategy.broadcast(create_run_dir() if self.is_global_zero else None)
            return told
        if not self.is_global_zero:
            raise InputError("trainer.num_nodes: the processes of several machines are started by torchrun or SLURM.")
        folder = create_run_dir()
        os.environ[_RUN_FOLDER] = str(folder)  # the others are started by Lightning from here on, and inherit it
        return folder

    def _write_rejected(self, datamodule: ClaimsDataModule, folder: Path) -> None:
        """Write records that were left out to rejected.jsonl, with place and reason; keep those of others."""
        file = folder / "rejected.jsonl"
        rows = [
            {"split": split_name, "location": fault.location, "message": fault.message, "record": fault.raw}
            for split_name, split in datamodule.splits.items()
            for fault in split.left_out
        ]
        if not rows or not self.is_global_zero:
            return
        log.warning("records left out: %d, each with its reason in %s", len(rows), file)
        if file.is_file():
            earlier = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            rows = [row for row in earlier if row["split"] not in datamodule.splits] + rows
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic_write(file, lines)

    def _warn_about_mixed_data(self, datamodule: ClaimsDataModule) -> None:
        packaged = str(datamodule.files["train"]).startswith("claims:")
        if str(datamodule.files["val"]).startswith("claims:") and not packaged:
            log.warning(
                "data.val_files: validating on the packaged claims while training on other records. Give your own, or "
                "null to hold out data.val_fraction of the training records."
            )


def _check_writable(file: Path, source: str) -> None:
    """Asked before hours of answering, and not after them."""
    if file.is_dir() or any(parent.is_file() for parent in file.parents):
        raise InputError(f"{source}: cannot be written; it is a folder, or lies below a file.")
