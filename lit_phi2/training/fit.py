"""FitTrainer: Lightning's Trainer, with a folder for every run.

    check model, data and checkpoint -> open a folder -> validate the base -> steps -> best adapter in PEFT form

Everything that a run leaves is written by callbacks and a logger that are added here, so Lightning's own checkpoints,
progress bar and logger are off. The same Trainer may run again; every fit begins at step 0 or at its checkpoint.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_phi2.adapters.adapter import check_adapter
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.audit.leakage import LeakageLimits
from lit_phi2.audit.provenance import check_provenance
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError, RunInterrupted
from lit_phi2.model.device import DTYPES
from lit_phi2.training.batch_size import use_batch_size, with_batch_size
from lit_phi2.training.callbacks.checkpoint import NOTHING_SAVED, AdapterCheckpoint, AtomicCheckpointIO, stop_message
from lit_phi2.training.callbacks.completions import TestCompletions
from lit_phi2.training.callbacks.predictions import PredictionWriter
from lit_phi2.training.callbacks.progress import ProgressBar, ProgressLogger
from lit_phi2.training.callbacks.samples import SampleWriter, truncate_samples
from lit_phi2.training.callbacks.signals import SignalHandlers
from lit_phi2.training.callbacks.throughput import Throughput
from lit_phi2.training.draft_index import write_draft_index
from lit_phi2.training.ledger import open_ledger, write_fit_ledger
from lit_phi2.training.limits import check_limits
from lit_phi2.training.loops import new_loops
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.program_config import program_config
from lit_phi2.training.protocols import TrainingData
from lit_phi2.training.rejected import write_rejected
from lit_phi2.training.reporting import write_report
from lit_phi2.training.resume import check_resumable, repeated_outputs
from lit_phi2.training.run_folder import broadcast_run_dir, locked, on_rank_zero, open_run_dir
from lit_phi2.training.tensorboard import StrictTensorBoardLogger, truncate_events
from lit_phi2.training.whole_base import log_whole_base_loss
from lit_phi2.utils.console import shell_command
from lit_phi2.utils.paths import GGUF_SUFFIX, find_checkpoint, run_dir_of
from lit_phi2.utils.signals import stop_request

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # all of val_files: every curve starts with the base at step 0
    "use_distributed_sampler": False,  # data/schedule.py distributes records to ranks
    "enable_model_summary": False,  # training/base.py logs the number of trained and frozen weights
}
ONE_FIT = (
    "Wait until it ends, or train its weights further in a run of their own, with --model.adapter instead of "
    "--ckpt_path."
)
_ADDED = (  # callbacks of an earlier subcommand of the same Trainer
    Throughput,
    ProgressBar,
    ProgressLogger,
    SampleWriter,
    AdapterCheckpoint,
    SignalHandlers,
    TestCompletions,
    PredictionWriter,
)


class FitTrainer(pl.Trainer):
    """Lightning's Trainer with our defaults; the CLI sets the attributes below before it calls a subcommand.

    Attributes:
        run_name: names the folder of a new run.
        run_config: the run as a config file, saved in its folder; empty if a program built model and data.
        enable_tensorboard: trainer.logger is not set by the user.
        enable_checkpoints: trainer.enable_checkpointing.
        enable_progress: trainer.enable_progress_bar.
        checkpoint_every_n_steps: checkpoint.every_n_steps.
        checkpoint_every_minutes: checkpoint.every_minutes.
        leakage_limits: the section leakage of the config.
        config_run: the folder of the run whose config.yaml this one has; None for another config.
        run_dir: of the last fit.
    """

    run_name = "run"
    run_config = ""
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_minutes: float | None = 5.0
    leakage_limits = LeakageLimits()
    config_run: Path | None = None
    run_dir: Path | None = None
    _resumed_run: Mapping[str, Any] | None = None
    num_sanity_val_steps: float
    loggers: list[Any]

    @functools.wraps(pl.Trainer.__init__)  # type: ignore[misc]  # the CLI makes its flags from the signature
    def __init__(self, **settings: Any) -> None:
        settings = TRAINER_DEFAULTS | settings
        self.settings = settings
        self.enable_tensorboard = settings.get("logger") in (None, True)
        self.enable_checkpoints = settings.get("enable_checkpointing") is not False
        self.enable_progress = settings.get("enable_progress_bar") is not False
        off = {"enable_checkpointing": False, "enable_progress_bar": False}
        # fast_dev_run writes no curves; Lightning replaces the logger, and callbacks that need one can be tried.
        off |= {"logger": False} if self.enable_tensorboard and not settings.get("fast_dev_run") else {}
        super().__init__(**(settings | off))
        self._num_sanity_val_steps = self.num_sanity_val_steps

    def fit(self, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None = None) -> None:
        """Train the adapter.

        Args:
            model: from the config.
            datamodule: from the config.
            ckpt_path: continue this run: a .ckpt, a run folder, or `last` of the newest run.
        """
        ckpt_path = self.find(ckpt_path, prefer="last")
        resumed = self._read_resumed(ckpt_path)
        self.fit_loop = new_loops(self)
        self._resumed_run = None if resumed is None else resumed["lit_phi2"]["run"]
        if self._resumed_run is not None:
            _keep_dtype(model, self._resumed_run)
        if resumed is not None and model.phi is None:
            model.quantization_table = resumed["lit_phi2"].get("quantization")
        self.prepare("fit", model, datamodule)
        model.total_steps()  # raises InputError before a folder is opened
        if resumed is not None:
            check_resumable(resumed["lit_phi2"]["run"], model.run_fingerprint(), datamodule.batching())
            adapter = read_checkpoint(Path(str(ckpt_path)))[0]
            check_adapter(adapter, model.lora_settings, model.checked.model, source=f"--ckpt_path {ckpt_path}")
        self._warn_about_mixed_data(datamodule)
        throughput = Throughput()
        self.callbacks.insert(0, throughput)
        self.show_progress(throughput)
        if self.fast_dev_run:
            super().fit(model, datamodule=datamodule)
            return
        config = with_batch_size(self.run_config or program_config(self, model, datamodule), self, datamodule)
        run_dir = run_dir_of(Path(ckpt_path)) if ckpt_path else broadcast_run_dir(self, lambda: self._open_run(config))
        log.info("run folder: %s", run_dir)
        with locked(self, run_dir / "fit.lock", f"--ckpt_path {ckpt_path}: another fit trains this run now. {ONE_FIT}"):
            self._fit_in(run_dir, model, datamodule, ckpt_path)

    def _fit_in(self, run_dir: Path, model: LitPhi2, datamodule: ClaimsDataModule, ckpt_path: str | None) -> None:
        """Train in a folder that no other fit writes to."""
        resumed = self._read_resumed(ckpt_path)  # again: the fit that held the lock may have written it since
        on_rank_zero(self, lambda: self._prepare_folder(run_dir, datamodule))
        checkpoints = self._add_run_outputs(run_dir, resumed)
        self.run_dir = run_dir
        if model.drafts and self.is_global_zero:
            model.draft_index = write_draft_index(run_dir, datamodule.splits["train"].examples)
        # A resumed run has the step-0 baseline in its event file.
        self.num_sanity_val_steps = 0 if resumed else self._num_sanity_val_steps
        try:
            super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        except RunInterrupted:  # the checkpoint is written; a second signal ends the process at once
            write_fit_ledger(self, run_dir)
            if self.global_step:
                write_report(self, run_dir)
            raise
        write_fit_ledger(self, run_dir)
        if self.global_step < model.total_steps():
            log.info("stopped early, after step %d of %d", self.global_step, model.total_steps())
        if checkpoints is not None:
            checkpoints.export(self, model)
            log.info("adapter: %s", run_dir / "adapter")
            if model.quantization is not None and checkpoints.best.is_file():
                log_whole_base_loss(self, model, datamodule, run_dir / "adapter", checkpoints.best_loss)
        write_report(self, run_dir)

    def _prepare_folder(self, run_dir: Path, datamodule: ClaimsDataModule) -> None:
        check_provenance(run_dir)
        self.write_rejected(datamodule, run_dir)
        open_ledger(self, run_dir, self.config_run)

    # Steps that subcommands share

    def find(self, ckpt_path: str | None, *, prefer: str = "best") -> str | None:
        """The path of a checkpoint or adapter that a name refers to; the CLI has looked it up already."""
        if ckpt_path is None:
            return None
        return str(find_checkpoint(ckpt_path, Path(self.default_root_dir), self.run_name, prefer=prefer))

    def prepare(self, stage: str, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Check model and data first: an invalid setting or record then loads no weights and leaves no folder."""
        self.callbacks[:] = [callback for callback in self.callbacks if not isinstance(callback, _ADDED)]
        self.callbacks.append(SignalHandlers())
        stop_request.number = 0  # a signal that stopped an earlier run of this program
        if self.enable_tensorboard and not self.fast_dev_run:
            self.loggers = []  # the event file of an earlier fit
        data: TrainingData = datamodule  # mypy checks the protocol here; Lightning types its attribute as Any
        self.datamodule = data
        datamodule.trainer = model.trainer = self
        model.check()
        model.check_data(data)
        datamodule.setup(stage)
        if stage == "fit":
            use_batch_size(self, model, datamodule, self._resumed_run)
        check_limits(self, datamodule, stage)

    def try_batch_size(self, model: LitPhi2, datamodule: ClaimsDataModule) -> None:
        """Choose the batch size that fit would; where not even one row fits, the memory plan says what to change."""
        with contextlib.suppress(InputError):
            use_batch_size(self, model, datamodule, None)

    def show_progress(self, throughput: Throughput) -> None:
        """Add a progress bar on a terminal, and progress lines elsewhere."""
        if self.enable_progress:
            self.callbacks.append(ProgressBar(throughput) if sys.stderr.isatty() else ProgressLogger(throughput))

    def write_rejected(self, datamodule: ClaimsDataModule, folder: Path) -> None:
        """Write the records that are left out to the folder."""
        if self.is_global_zero:
            write_rejected(datamodule.splits, folder)

    # Steps of fit

    def _read_resumed(self, ckpt_path: str | None) -> dict[str, Any] | None:
        """The checkpoint that fit continues from; also sets what fit says if a signal stops it early."""
        stop_request.message = NOTHING_SAVED
        if ckpt_path is None:
            return None
        if self.fast_dev_run:
            raise InputError("trainer.fast_dev_run: tries a new run and continues none; leave out --ckpt_path.")
        if Path(ckpt_path).is_dir() or Path(ckpt_path).suffix == GGUF_SUFFIX:
            raise InputError(
                f"--ckpt_path {ckpt_path}: an adapter holds no optimizer state to continue with. Give the run's "
                "last.ckpt, or start from these weights with --model.adapter."
            )
        checkpoint = read_checkpoint(Path(ckpt_path))[1]
        stop_request.message = stop_message(checkpoint["global_step"], Path(ckpt_path))
        return checkpoint

    def _open_run(self, config: str) -> Path:
        return open_run_dir(Path(self.default_root_dir), self.run_name, config)

    def _add_run_outputs(self, run_dir: Path, resumed: dict[str, Any] | None) -> AdapterCheckpoint | None:
        """Write scalars, samples and checkpoints to a run's folder; None if checkpoints are off."""
        if resumed and self.is_global_zero:
            step, repeated = resumed["global_step"], repeated_outputs(resumed)
            truncate_samples(run_dir, step - 1 if "samples/" in repeated else step)
            if self.enable_tensorboard:
                truncate_events(run_dir, step, repeated)
        if self.enable_tensorboard:
            logger = StrictTensorBoardLogger(run_dir, name="", version="", default_hp_metric=False)
            if not resumed:
                logger.log_layout()
            log.info(
                "curves: %s, then localhost:6006/#custom_scalars",
                shell_command("tensorboard", "--logdir", self.default_root_dir),
            )
            self.loggers = [logger]
        self.callbacks.append(SampleWriter(run_dir))
        if not self.enable_checkpoints:
            log.warning("trainer.enable_checkpointing is false: no checkpoint and no adapter will be kept")
            stop_request.message = "stopped. Nothing is saved: trainer.enable_checkpointing is false."
            return None
        self.strategy.checkpoint_io = AtomicCheckpointIO()
        steps, minutes = self.checkpoint_every_n_steps, self.checkpoint_every_minutes
        checkpoints = AdapterCheckpoint(run_dir, every_n_steps=steps, every_minutes=minutes)
        self.callbacks.append(checkpoints)
        return checkpoints

    def _warn_about_mixed_data(self, datamodule: ClaimsDataModule) -> None:
        packaged = str(datamodule.files["train"]).startswith("claims:")
        if str(datamodule.files["val"]).startswith("claims:") and not packaged:
            log.warning(
                "data.val_files: validating on the packaged claims while training on other records. Give your own, or "
                "null to hold out data.val_fraction of the training records."
            )


def _keep_dtype(model: LitPhi2, run: Mapping[str, Any]) -> None:
    """Continue in the dtype of the run: `auto` might choose another one here, or on a busier machine."""
    if model.compute_dtype == "auto" and model.phi is None and run.get("compute_dtype") in DTYPES[1:]:
        model.compute_dtype = run["compute_dtype"]
        log.info("model.dtype: %s, as in the checkpoint", model.compute_dtype)
