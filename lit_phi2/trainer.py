"""Trainer: Lightning's, with a folder for every run and the subcommands inspect and export.

    fit         check the data -> open a folder -> base's validation -> steps -> best adapter in PEFT form
    validate    metrics on val_files           test      metrics on test_files, and its answers judged
    predict     predictions.jsonl              inspect   the data in figures, without a model
    export      a checkpoint's adapter in PEFT form

The signatures are the subcommands' arguments.
"""

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lit_phi2.callbacks import (
    AdapterCheckpoint,
    PredictionWriter,
    ProgressBar,
    ProgressLines,
    SampleWriter,
    TestAnswers,
    Throughput,
    WholeFiles,
)
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.report import report
from lit_phi2.errors import InputError
from lit_phi2.files import replace_file
from lit_phi2.loops import WindowEpochLoop
from lit_phi2.model.lora import read_adapter, read_checkpoint, save_adapter
from lit_phi2.model.module import LitPhi2
from lit_phi2.quality import Table, as_plain, compare, metric_name, table
from lit_phi2.runs import open_run, run_folder
from lit_phi2.terminal import printable

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
    wants_tensorboard = True
    wants_checkpoints = True
    wants_progress = True
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
            model.check_same_run(resumed)
        self._warn_about_mixed_data(datamodule)
        throughput = Throughput()
        self.callbacks.insert(0, throughput)
        self._show_progress(throughput)
        if not self.wants_checkpoints or self.fast_dev_run:
            self.callbacks.append(DefaultSignals())
        if self.fast_dev_run:
            super().fit(model, datamodule=datamodule)
            return
        folder = run_folder(Path(ckpt_path)) if ckpt_path else self._agree(self._open_run)
        log.info("run folder: %s", folder)
        self._keep_left_out(datamodule, folder)
        if self.wants_tensorboard:
            if resumed and self.is_global_zero:
                cut_back_events(folder, resumed["global_step"])
            self.loggers = [EventLog(folder, name="", version="", default_hp_metric=False)]
        self.callbacks.append(SampleWriter(folder))
        if self.wants_checkpoints:
            steps, minutes = self.checkpoint_every_n_steps, self.checkpoint_every_minutes
            self.strategy.checkpoint_io = WholeFiles()
            checkpoints = AdapterCheckpoint(folder, every_n_steps=steps, every_minutes=minutes)
            self.callbacks.append(checkpoints)
        else:
            log.warning("trainer.enable_checkpointing is false: no checkpoint and no adapter will be kept")
        self.fit_loop.epoch_loop = WindowEpochLoop(self, self.min_steps, self.max_steps)
        if resumed:
            self.num_sanity_val_steps = 0  # the base's point of the curves is there already
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        if self.global_step < total_steps:
            log.info("stopped early, after step %d of %d", self.global_step, total_steps)
        if self.wants_checkpoints:
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
        self._keep_left_out(datamodule, self.folder_of(ckpt_path))
        super().validate(model, datamodule=datamodule, verbose=False)
        self._print_metrics({name: value.item() for name, value in self.callback_metrics.items()})

    def test(
        self,
        model: LitPhi2,
        datamodule: ClaimsDataModule,
        ckpt_path: str | None = None,
        answers: int | None = None,
    ) -> None:
        """Measure the loss on test_files, then answer the records and judge the answers, beside plain baselines.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: whose adapter to measure: a .ckpt, an adapter or run folder, `last` or `best`; the base without.
            answers: how many records to answer, from the first; all without, 0 for the loss alone.
        """
        if answers is not None and answers < 0:
            raise InputError(f"--answers {answers}: is less than 0; expected a number of records.")
        file = self.folder_of(ckpt_path) / "test_metrics.json"
        _check_writable(file, str(file))
        self._evaluate("test", model, datamodule)
        if answers != 0:
            datamodule.check_room("test", answers)
        self._keep_left_out(datamodule, file.parent)
        adapted = ckpt_path is not None or model.adapter is not None
        answered = TestAnswers(adapted=adapted, count=answers)
        if answers != 0:
            self.callbacks.append(answered)
        super().test(model, datamodule=datamodule, verbose=False)
        metrics = {name: value.item() for name, value in self.callback_metrics.items()}
        if not self.is_global_zero:
            return
        columns = self._judge(answered, datamodule)
        for name, interval in next(iter(columns.values()), {}).items():
            if not name.startswith("category "):  # those are in the table and in the file
                metrics[metric_name(name)] = interval.mean
        self._print_metrics(metrics)
        if columns:
            print("\n" + printable(table(columns)))
        written = metrics | {"answers": as_plain(columns)}
        replace_file(file, json.dumps(written, indent=2) + "\n")
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
        file = Path(output) if output else self.folder_of(ckpt_path) / "predictions.jsonl"
        _check_writable(file, f"--output {file}")
        self._evaluate("predict", model, datamodule)
        self._keep_left_out(datamodule, file.parent)
        prompts = datamodule.splits["predict"].digest
        writer = PredictionWriter(file, {**model.answering_identity(), "prompts": prompts})
        datamodule.answered = writer.read_answered()
        self.callbacks.append(writer)
        if datamodule.unanswered():
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
        print(printable(report(datamodule)))

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

    def folder_of(self, ckpt_path: str | None) -> Path:
        """Where a subcommand other than fit writes."""
        return run_folder(Path(ckpt_path)) if ckpt_path else Path(self.default_root_dir) / self.run_name / "base"

    def _check(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """First of all: a fault in model or data costs no loading and leaves no folder."""
        self.datamodule = datamodule
        datamodule.trainer = model.trainer = self
        model.check()
        datamodule.setup(stage)
        for use, split in datamodule.splits.items():
            if split.trimmed:
                log.warning("data.%s_files: the input of %d records was shortened to make them fit", use, split.trimmed)

    def _evaluate(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        self._check(stage, model, datamodule)
        self._show_progress(Throughput())
        self.callbacks.append(DefaultSignals())

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
            print(printable(f"{name} {value:.6f}"))

    def _judge(self, answered: TestAnswers, datamodule: ClaimsDataModule) -> Table:
        """Figures of what was answered, beside the baselines; empty where nothing was."""
        if not answered.answers:
            return {}
        assert datamodule.tokenizer is not None
        texts = {
            name: (
                datamodule.tokenizer.batch_decode([answer.ids for answer in answers]),
                [answer.finish_reason == "stop" for answer in answers],
            )
            for name, answers in answered.answers.items()
        }
        try:
            train = datamodule.training_records()
        except InputError as error:
            log.warning("the nearest training record is left out of the baselines: %s", error)
            train = []
        return compare(datamodule.splits["test"].records[: answered.count], texts, train)

    def _show_progress(self, throughput: Throughput) -> None:
        if self.wants_progress:
            self.callbacks.append(ProgressBar(throughput) if sys.stderr.isatty() else ProgressLines(throughput))

    def _open_run(self) -> Path:
        folder = open_run(Path(self.default_root_dir), self.run_name)
        replace_file(folder / "config.yaml", self.run_config)
        return folder

    def _agree(self, open_run: Callable[[], Path]) -> Path:
        """The folder that rank 0 opens, on every rank."""
        if self.world_size == 1:
            return open_run()
        if not self.is_global_zero and _RUN_FOLDER in os.environ:
            return Path(os.environ[_RUN_FOLDER])
        if self.strategy.cluster_environment.creates_processes_externally:  # torchrun, SLURM: all are here
            self.strategy.setup_environment()
            told: Path = self.strategy.broadcast(open_run() if self.is_global_zero else None)
            return told
        if not self.is_global_zero:
            raise InputError("trainer.num_nodes: the processes of several machines are started by torchrun or SLURM.")
        folder = open_run()
        os.environ[_RUN_FOLDER] = str(folder)  # the others are started by Lightning from here on, and inherit it
        return folder

    def _keep_left_out(self, datamodule: ClaimsDataModule, folder: Path) -> None:
        """Write records that were left out to rejected.jsonl, with place and reason; keep those of others."""
        file = folder / "rejected.jsonl"
        rows = [
            {"files": use, "place": fault.place, "fault": fault.message, "record": fault.raw}
            for use, split in datamodule.splits.items()
            for fault in split.left_out
        ]
        if not rows or not self.is_global_zero:
            return
        log.warning("records left out: %d, each with its reason in %s", len(rows), file)
        if file.is_file():
            earlier = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            rows = [row for row in earlier if row["files"] not in datamodule.splits] + rows
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        replace_file(file, lines)

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


class DefaultSignals(Callback):
    """SIGTERM ends at once what has no checkpoint to write; Lightning would note it and go on."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_train_start = on_test_start = on_predict_start = on_validation_start


def cut_back_events(folder: Path, step: int) -> None:
    """Drop curves and samples that a run which was killed wrote after its last checkpoint; they will come again.

    Nothing but this keeps samples from standing there twice: TensorBoard's own purge leaves texts alone.
    """
    for file in folder.glob("events.out.tfevents*"):
        kept = io.BytesIO()
        writer = RecordWriter(kept)
        for record in RawEventFileLoader(str(file)).Load():  # ends at a record that the kill has cut
            if Event.FromString(record).step <= step:
                writer.write(record)
        replace_file(file, kept.getvalue())


class EventLog(TensorBoardLogger):
    """TensorBoard's event file and nothing else: the run is described by its config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():  # Lightning's own would tell a full disk as a value it cannot log
            self.experiment.add_scalar(name, value, step)

    def save(self) -> None:
        self.experiment.flush()
