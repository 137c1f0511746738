"""Main: run one command line and return its exit code.

    0            done
    1            a defect, a problem of the machine, or a non-finite loss
    2            config, arguments or data must change
    130, 143     stopped by Ctrl-C or SIGTERM, after saving

Errors that the user can fix are printed as a few lines without a traceback; LIT_PHI2_TRACEBACK=1 shows the traceback.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_phi2.cli.app import CLI
from lit_phi2.cli.arguments import classes_allowed, configs_first, pop_allow_classes
from lit_phi2.errors import InputError, NonFiniteError, RunInterrupted
from lit_phi2.utils.console import PEER_DIED, RESUME_HINT, escape_control_chars, set_up_logging

_PEER_ERROR = re.compile(r"(?i)gloo|nccl|connection (closed|reset)|broken pipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    set_up_logging(rank_zero_only.rank)
    try:
        rest, classes = pop_allow_classes(sys.argv[1:] if arguments is None else arguments)
        with classes_allowed(classes):
            CLI(configs_first(rest))
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


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether Ctrl-C caused this; Lightning turns its KeyboardInterrupt into SystemExit(1)."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _report(error: Exception) -> int | None:
    """Print the message of an error that the user can act on.

    Returns:
        The exit code; None for any other error; main raises it again with its traceback.
    """
    if isinstance(error, InputError | MisconfigurationException | NonFiniteError | RunInterrupted):
        label = "stopped" if isinstance(error, RunInterrupted) else "error"
        if rank_zero_only.rank == 0:  # every rank raises the same error
            _print_error(f"{label}: {error}")
        return getattr(error, "exit_code", InputError.exit_code)
    if isinstance(error, RuntimeError) and _PEER_ERROR.search(str(error)):
        print(f"\nerror: rank {rank_zero_only.rank}: {PEER_DIED}", file=sys.stderr, flush=True)
        os._exit(1)  # exit handlers would wait forever for the process that died
    if isinstance(error, OSError):  # a full disk, a lost permission, a folder that was removed
        source = f"{error.filename}: " if error.filename else ""
        _print_error(f"error: {source}{error.strerror or error}. {RESUME_HINT}")
        return 1
    return None


def _print_error(message: str) -> None:
    print(escape_control_chars(f"\n{message}"), file=sys.stderr)
