"""Reporting: report.html of a run, at the end of fit and test and from the subcommand report.

A page that cannot be written is no reason to lose a fit or a test: it is one line of the log, and the subcommand can
try again.
"""

import logging
from pathlib import Path

import lightning.pytorch as pl

from lit_phi2.errors import InputError
from lit_phi2.report.page import REPORT_FILE
from lit_phi2.report.page import write_report as write_page
from lit_phi2.utils.paths import expand_user, run_dir_of

log = logging.getLogger(__name__)


def write_report(trainer: pl.Trainer, folder: Path) -> None:
    """Write the page of a run into its folder, or log why not; only rank 0 writes.

    Args:
        trainer: of the fit or test that ends.
        folder: of the run.
    """
    if not trainer.is_global_zero:
        return
    try:
        write_page(folder, folder / REPORT_FILE)
    except Exception as error:  # whatever it is, the adapter and the metrics are there
        # The message of any other error may quote a record.
        reason = str(error) if isinstance(error, InputError | OSError | ImportError) else type(error).__name__
        log.warning("report: not written (%s); everything else is. The subcommand report tries again.", reason)
    else:
        log.info("report: %s", folder / REPORT_FILE)


def report_file(output: str | None, folder: Path) -> Path:
    """The file that the subcommand report writes.

    Args:
        output: --output; None is report.html in the folder.
        folder: of the run.

    Raises:
        InputError: the name does not end in .html.
    """
    if output is None:
        return folder / REPORT_FILE
    file = expand_user(output, "--output")
    if file.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {output}: has the ending {file.suffix!r}; expected .html.")
    return file


def reported_folder(path: Path) -> Path:
    """The folder that a page is about: a run, or an adapter or export that belongs to none.

    Args:
        path: a checkpoint or a folder.
    """
    is_run = path.is_dir() and ((path / "config.yaml").is_file() or not (path.parent / "config.yaml").is_file())
    return path if is_run else run_dir_of(path)
