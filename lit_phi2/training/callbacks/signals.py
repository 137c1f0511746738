"""DefaultSigterm: SIGTERM ends at once a run that has no checkpoint to write.

Lightning installs a handler that only records the signal, and continues. It does so after `setup`, so the default
handler is restored at the first hook of the loop.
"""

import signal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class DefaultSigterm(Callback):
    """Restores the default handler of SIGTERM when a loop starts."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_train_start = on_test_start = on_predict_start = on_validation_start
