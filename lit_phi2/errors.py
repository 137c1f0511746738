"""Errors that end a run, each with its exit code.

    2           InputError       config, arguments or data must change
    3           VerificationError  `verify` found files that are not what they were
    3           LeakageError     `audit` found more leakage than its threshold allows
    1           NonFiniteError   a loss, a gradient norm or logits are NaN or infinite
    1           IncompleteError  an output would lack a part
    130, 143    RunInterrupted   Ctrl-C or SIGTERM

The reader can act on the message of each, so the command line prints that message without a traceback.
"""


class InputError(ValueError):
    """Config, arguments or data cannot be used: where, what was found, what was expected, what to change."""

    exit_code = 2


class VerificationError(RuntimeError):
    """`verify` found files, data or code that are not what provenance.json says."""

    exit_code = 3


class LeakageError(VerificationError):
    """`audit --what leakage` found more than its threshold allows."""


class NonFiniteError(RuntimeError):
    """A loss, or a gradient norm before its step is taken, or the logits of a completion are NaN or infinite."""

    exit_code = 1


class IncompleteError(RuntimeError):
    """An output would lack a part of what it must hold, so it is not written."""

    exit_code = 1


class RunInterrupted(BaseException):
    """A signal stopped the run.

    Not an Exception, as KeyboardInterrupt is not: a library that handles every Exception must not continue the run.

    Args:
        message: what is saved and how to continue.
        signal_number: the exit code is 128 plus this number, as in a shell.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
