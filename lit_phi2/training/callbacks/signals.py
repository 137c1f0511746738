"""training/callbacks/signals.py."""

import signal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class DefaultSigterm(Callback):
    """SIGTERM ends at once what has no checkpoint to write; Lightning would note it and go on."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_train_start = on_test_start = on_predict_start = on_validation_start
