"""SignalHandlers: our signal handlers in place of Lightning's while a loop runs, and the end of the other processes.

Lightning's handler records SIGTERM, acts on it inside an accumulation window, and with several processes calls a
collective, which can wait forever. It is installed after `setup`, so it is replaced at the first hook of a loop. When
the loop is over, Lightning restores the handlers that it found.
"""

import contextlib
import signal
import subprocess

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_phi2.errors import RunInterrupted
from lit_phi2.utils.signals import stop_request

LEAVE_SECONDS = 10.0  # for processes that got the signal too; one that waits for another in a collective never leaves


class SignalHandlers(Callback):
    """Installs the handlers of `stop_request` when a loop starts."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop_request.install()

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, RunInterrupted):
            end_started_processes(getattr(trainer.strategy.launcher, "procs", []))


def end_started_processes(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes that Lightning started for the other ranks.

    Args:
        processes: emptied, so that the thread in which Lightning watches them does not kill this process.
    """
    ending = list(processes)
    processes.clear()
    for process in ending:
        process.send_signal(signal.SIGTERM)
    for process in ending:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_SECONDS)
        process.kill()  # does nothing if it has left
