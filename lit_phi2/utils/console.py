"""What a person reads on a terminal: our own lines, and nothing in them that could act on it.

Records are other people's text. A control character in one (an escape that moves the cursor or sets the title, a mark
that turns the writing round) is shown as its number instead: \\x1b, \\u202e.
"""

import logging
import re
import sys
import threading
import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

# C0 but for tab and line feed, DEL and C1; marks of direction and invisible ones; line and paragraph separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def escape_control_chars(text: str) -> str:
    r"""The text with its control characters as numbers; lines and tabs stay.

    >>> print(escape_control_chars("red \x1b[31m, turned \u202e"))
    red \x1b[31m, turned \u202e
    """
    return _CONTROLS.sub(lambda found: f"{found[0]!a}"[1:-1], text)


RESUME_HINT = "The last checkpoint is whole; mend this and go on with fit --ckpt_path last, or run predict again."
PEER_DIED = f"another process of this run is gone. {RESUME_HINT}"


class TqdmHandler(logging.Handler):
    """Writes lines to stderr, each on a line of its own even while a progress bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(escape_control_chars(self.format(record)), file=sys.stderr)


class PeerDeathHandler(logging.Handler):
    """Says why, before Lightning kills what is left of a run of several processes, which it does in silence."""

    def emit(self, record: logging.LogRecord) -> None:
        if "terminated with code" in record.getMessage():
            print(f"\nerror: {PEER_DIED}", file=sys.stderr, flush=True)


def _silence_writer_oserror(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; what the disk refuses there is raised again where the run is."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def set_up_logging() -> None:
    """Our own lines go to stderr; tips, advertising and progress of dependencies go nowhere."""
    handler = TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("lit_phi2")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)  # of several, one tells
    ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    observer = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    observer.handlers[:], observer.propagate = [PeerDeathHandler()], False
    observer.setLevel(logging.INFO)
    threading.excepthook = _silence_writer_oserror
    profilers = logging.getLogger("lightning.pytorch.profilers")
    profilers.setLevel(logging.INFO)  # who sets trainer.profiler wants its report
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|peft|jsonargparse)\b")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
