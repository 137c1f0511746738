"""cli/main.py."""

import os
import re
import signal
import sys
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_phi2.cli.app import CLI
from lit_phi2.cli.arguments import allow_classes, configs_first, pop_allow_classes
from lit_phi2.errors import InputError, NonFiniteError, RunInterrupted
from lit_phi2.utils.console import PEER_DIED, RESUME_HINT, escape_control_chars, set_up_logging

_PEER_ERROR = re.compile(r"(?i)gloo|nccl|connection (closed|reset)|broken pipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    set_up_logging()
    try:
        rest, classes = pop_allow_classes(sys.argv[1:] if arguments is None else arguments)
        allow_classes(classes)
        CLI(configs_first(rest))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, MisconfigurationException, NonFiniteError, RunInterrupted) as error:
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1":
            raise
        said = "stopped" if isinstance(error, RunInterrupted) else "error"
        if rank_zero_only.rank == 0:  # every rank of several finds the same
            print(escape_control_chars(f"\n{said}: {error}"), file=sys.stderr)
        return getattr(error, "exit_code", InputError.exit_code)
    except RuntimeError as error:
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1" or not _PEER_ERROR.search(str(error)):
            raise
        print(f"\nerror: rank {rank_zero_only.rank}: {PEER_DIED}", file=sys.stderr, flush=True)
        os._exit(1)  # what waits for the others at exit would wait in vain
    except OSError as error:  # a full disk, a lost permission, a folder that went away
        if os.environ.get("LIT_PHI2_TRACEBACK") == "1":
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(escape_control_chars(f"\nerror: {where}{error.strerror or error}. {RESUME_HINT}"), file=sys.stderr)
        return 1
    return 0
