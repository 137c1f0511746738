r"""Console: set up logging to stderr, and escape control characters in everything that is printed.

    our log records               -> stderr, above a progress bar; INFO on rank 0, ERROR on other ranks
    log records of dependencies   -> dropped below ERROR, except profiler reports
    "red \x1b[31m" in a record    -> the escape is printed as the four characters \x1b

Records are untrusted text. A control character in one could move the cursor, set the window title or reverse the
writing direction, so every line that may contain text of a record goes through `escape_control_chars`.
"""

import io
import logging
import re
import shlex
import subprocess
import sys
import threading
import warnings
from typing import TextIO

from tqdm import tqdm

RESUME_HINT = "The last checkpoint is intact. Fix this, then continue with fit --ckpt_path last, or run predict again."
PEER_DIED = f"another process of this run died. {RESUME_HINT}"

# C0 except tab and line feed, DEL, C1; direction marks and invisible characters; line and paragraph separators.
_CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def escape_control_chars(text: str) -> str:
    r"""Replace control characters by their escape sequences; line feeds and tabs stay.

    >>> print(escape_control_chars("red \x1b[31m, reversed \u202e"))
    red \x1b[31m, reversed \u202e
    """
    return _CONTROL_CHARS.sub(lambda match: f"{match[0]!a}"[1:-1], text)


def print_text(text: str, file: TextIO | None = None) -> None:
    """Print text without control characters, also where the stream's encoding lacks some of its characters."""
    stream = sys.stdout if file is None else file
    print(to_printable(text, stream), file=stream, flush=file is not None)


def write_text(text: str) -> None:
    """Write a piece of text to standard output at once; on a terminal without its control characters."""
    if text:
        sys.stdout.write(to_printable(text, sys.stdout) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def replace_unencodable() -> None:
    """Let stdout and stderr write the escape of a character that their encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def to_printable(text: str, stream: TextIO) -> str:
    r"""Text that can be written to a stream: control characters, and characters it cannot encode, as escapes.

    >>> print(to_printable("cost 5 \u20ac\x07", io.TextIOWrapper(io.BytesIO(), "latin-1")))
    cost 5 \u20ac\x07
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escape_control_chars(text).encode(encoding, "backslashreplace").decode(encoding)


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> format_seconds(3725.4)
    '1:02:05'
    """
    minutes, seconds_rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_rest:02d}"


def shell_command(*arguments: object) -> str:
    """A command that can be pasted into a shell, whatever its paths contain.

    >>> shell_command("python", "-m", "lit_phi2", "fit", "--config", "my runs/config.yaml")
    "python -m lit_phi2 fit --config 'my runs/config.yaml'"
    """
    parts = [str(argument) for argument in arguments]
    return subprocess.list2cmdline(parts) if sys.platform == "win32" else shlex.join(parts)


def set_up_logging(rank: int) -> None:
    """Send our log records to stderr, and silence tips, advertising and progress of dependencies.

    Args:
        rank: of this process. Only rank 0 logs below ERROR.
    """
    handler = TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lit_phi2")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
    threading.excepthook = _silence_writer_oserror
    _silence_dependencies()


def _silence_dependencies() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    launcher.handlers[:], launcher.propagate = [PeerDeathHandler()], False
    launcher.setLevel(logging.INFO)
    # Whoever sets trainer.profiler wants its report, which is logged at INFO.
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|peft|jsonargparse)\b")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class TqdmHandler(logging.Handler):
    """Writes each log record to stderr on its own line, also while a progress bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(to_printable(self.format(record), sys.stderr), file=sys.stderr)


class PeerDeathHandler(logging.Handler):
    """Prints the reason before Lightning kills the remaining processes of a run, which it does without a message."""

    def emit(self, record: logging.LogRecord) -> None:
        if "terminated with code" in record.getMessage():
            print(f"\nerror: {PEER_DIED}", file=sys.stderr, flush=True)


def _silence_writer_oserror(args: threading.ExceptHookArgs) -> None:
    """Drop an OSError of TensorBoard's writer thread; the main thread raises it again (training/tensorboard.py)."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
