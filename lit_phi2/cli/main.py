"""Main: run one command line and return its exit code.

    0            done
    1            a defect, a problem of the machine, or a non-finite loss
    2            config, arguments or data must change
    3            verify found something changed
    130, 143     stopped by Ctrl-C or SIGTERM
    141          what reads standard output wants no more of it

Errors that the user can fix are printed as a few lines without a traceback; LIT_PHI2_TRACEBACK=1 shows the traceback.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence

from lit_phi2.cli.subcommands import early_answer
from lit_phi2.errors import IncompleteError, InputError, NonFiniteError, RunInterrupted, VerificationError
from lit_phi2.utils.console import PEER_DIED, RESUME_HINT, print_text, replace_unencodable, set_up_logging
from lit_phi2.utils.signals import stop_request

BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended
OUT_OF_MEMORY = (
    "out of memory. inspect with the same settings prints what each part needs, and which key to change: "
    "data.batch_size, data.max_length, model.activation_checkpointing, model.dtype, model.quantization; for "
    "completions model.max_slots."
)
_NO_MEMORY = re.compile(r"(?i)out of memory|not enough memory|can't allocate memory")
_PEER_ERROR = re.compile(r"(?i)gloo|nccl|connection (closed|reset)|broken pipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    replace_unencodable()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with stop_request.handled():
            return _run(arguments)
    except RunInterrupted as stop:
        if _rank() == 0:  # every rank stops
            _print_error(str(stop))
        return stop.exit_code


def _run(arguments: Sequence[str]) -> int:
    try:
        answer = early_answer(arguments)
        if answer is None:
            _run_subcommand(arguments)
        else:
            print_text(answer)
    except (KeyboardInterrupt, SystemExit) as error:
        if not _is_ctrl_c(error):
            raise
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1":
            raise
        exit_code = _report(error)
        if exit_code is None:
            raise
        return exit_code
    return 0


def _run_subcommand(arguments: Sequence[str]) -> None:
    # Imported here, so that --help and --version need no torch.
    from lit_phi2.cli.app import CLI
    from lit_phi2.cli.arguments import classes_allowed, configs_first, pop_allow_classes

    set_up_logging(_rank())
    rest, classes = pop_allow_classes(arguments)
    with classes_allowed(classes):
        CLI(configs_first(rest))


def _rank() -> int:
    """The rank of this process, as Lightning finds it; 0 before it is imported."""
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    return getattr(lightning.rank_zero_only, "rank", 0) if lightning else 0


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether Ctrl-C caused this; Lightning turns its KeyboardInterrupt into SystemExit(1)."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _report(error: Exception) -> int | None:
    """Print the message of an error that the user can act on.

    Returns:
        The exit code; None for any other error; main raises it again with its traceback.
    """
    if isinstance(error, InputError | IncompleteError | NonFiniteError | VerificationError) or _is_lightnings(error):
        if _rank() == 0:  # every rank raises the same error
            _print_error(f"error: {error}")
        return getattr(error, "exit_code", InputError.exit_code)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        _print_error(f"error: {OUT_OF_MEMORY}")
        return 1
    if isinstance(error, RuntimeError) and _PEER_ERROR.search(str(error)):
        if stop_request.number:  # every process got the signal, and another one has ended already
            os._exit(128 + stop_request.number)
        print(f"\nerror: rank {_rank()}: {PEER_DIED}", file=sys.stderr, flush=True)
        os._exit(1)  # exit handlers would wait forever for the process that died
    file_names = sys.getfilesystemencoding()
    if isinstance(error, UnicodeEncodeError) and error.encoding == file_names and file_names != "utf-8":
        _print_error(f"error: a path has a character that file names here, in {file_names}, lack. Set PYTHONUTF8=1.")
        return InputError.exit_code
    if isinstance(error, BrokenPipeError):  # head, less: what reads our output wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    if isinstance(error, OSError):  # a full disk, a lost permission, a folder that was removed
        source = f"{error.filename}: " if error.filename else ""
        _print_error(f"error: {source}{error.strerror or error}. {RESUME_HINT}")
        return 1
    return None


def _is_lightnings(error: Exception) -> bool:
    """Whether Lightning refuses a setting, or a combination of settings."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


def _print_error(message: str) -> None:
    print_text(f"\n{message}", sys.stderr)
