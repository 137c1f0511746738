"""Signals: Ctrl-C and SIGTERM stop a command at once, or where its loop can stop.

    at first            a signal raises RunInterrupted in the line that runs: data is read, a model is loaded
    while deferred      a signal is only recorded, because a step or a file must not end halfway; the loop checks for it
    a second signal     ends the process at once

A process has one handler for each signal, so it has one StopRequest too: `stop_request`.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lit_phi2.errors import RunInterrupted

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handlers = dict[signal.Signals, Any]


class StopRequest:
    """Whether a signal asked this process to stop.

    Attributes:
        number: of the first signal; 0 for none.
        deferred: signals are recorded, and raise nothing.
        message: of the RunInterrupted that a signal raises: what is saved, and how to continue.
    """

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False
        self.message = "stopped."

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside the block, beginning without any."""
        self.number, self.deferred, self.message = 0, False, "stopped."
        previous = self.install()
        try:
            yield
        finally:
            restore(previous)

    def install(self) -> Handlers:
        """Handle signals from here on; returns the handlers so far. Outside the main thread Python allows none."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Inside the block a signal raises, also one that was recorded before it.

        Raises:
            RunInterrupted: a signal arrived.
        """
        deferred, self.deferred = self.deferred, False
        try:
            if self.number:
                raise RunInterrupted(self.message, self.number)
            yield
        finally:
            self.deferred = deferred

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self.number:
            signal.raise_signal(number)
        self.number = number
        if not self.deferred:
            raise RunInterrupted(self.message, number)
        if log.isEnabledFor(logging.INFO):
            # Not through the logger: the signal may have interrupted a write to the same stream.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping; a second signal stops at once\n")


def restore(handlers: Handlers) -> None:
    """Undo StopRequest.install."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


stop_request = StopRequest()
