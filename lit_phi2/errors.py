"""Errors that end a run, each with the exit code that a shell sees.

Whoever reads one of these can act on it, so the command line prints the message alone. Anything else is a
fault of ours and shows its traceback.
"""


class InputError(ValueError):
    """A fault in config, arguments or data: where, what was found, what was expected, what to change."""

    exit_code = 2


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm that is NaN or infinite; raised before the optimizer step is taken."""

    exit_code = 1


class RunInterrupted(Exception):  # noqa: N818  not an error: the run was asked to stop and has saved what it had
    """The run was stopped by a signal, after saving."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
