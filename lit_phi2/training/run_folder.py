"""Run folder: rank 0 opens runs/<run_name>/version_<n>, and every rank of the run writes there.

    one process                              opens it
    processes that Lightning starts          the first opens it before the others start; they inherit its environment
    processes that torchrun or SLURM start   rank 0 opens it and broadcasts the path

Every rank must use the same path: version_<n> is a new number at each call, so only rank 0 may open a folder.
What rank 0 refuses, every rank that is running refuses, or the others would wait for it.
One command at a time trains in a folder, or writes a file of predictions: rank 0 holds a lock for all ranks.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl

from lit_phi2.errors import InputError
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.locks import LockedError, file_lock
from lit_phi2.utils.paths import create_run_dir

T = TypeVar("T")

RUN_FOLDER_VARIABLE = "LIT_PHI2_RUN_FOLDER"  # passes the path to processes that Lightning starts
STARTS_LATER_VARIABLE = "LIT_PHI2_STARTS_LATER"  # tells them that rank 0 did not wait for them


def open_run_dir(root: Path, run_name: str, config: str) -> Path:
    """A new run folder that holds the run's config."""
    run_dir = create_run_dir(root, run_name)
    atomic_write(run_dir / "config.yaml", config)
    return run_dir


def broadcast_run_dir(trainer: pl.Trainer, open_dir: Callable[[], Path]) -> Path:
    """The folder that rank 0 opens, on every rank.

    Raises:
        InputError: several machines, without torchrun or SLURM.
    """
    if trainer.world_size == 1:
        return open_dir()
    if not trainer.is_global_zero and RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])
    if all_ranks_run(trainer):
        run_dir = on_rank_zero(trainer, open_dir)
        assert run_dir is not None
        return run_dir
    if not trainer.is_global_zero:
        raise InputError("trainer.num_nodes: the processes of several machines are started by torchrun or SLURM.")
    run_dir = open_dir()
    os.environ[RUN_FOLDER_VARIABLE] = str(run_dir)  # Lightning starts the other ranks after this
    return run_dir


def on_rank_zero(trainer: pl.Trainer, function: Callable[[], T]) -> T | None:
    """What a function returns on rank 0, on every rank that is running; None on those that start later.

    Raises:
        InputError, OSError: from the function, on every rank that is running.
    """
    if not all_ranks_run(trainer):
        return function() if trainer.is_global_zero else None
    trainer.strategy.setup_environment()
    result, error = None, None
    if trainer.is_global_zero:
        try:
            result = function()
        except (InputError, OSError) as raised:
            error = raised
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        raise error
    return result


def all_ranks_run(trainer: pl.Trainer) -> bool:
    """Whether several processes run already: those of torchrun and SLURM; Lightning starts its own later.

    In a process that Lightning started everything looks as under torchrun, so the first says what it is.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None:
        return False
    if trainer.is_global_zero:
        if not environment.creates_processes_externally:
            os.environ[STARTS_LATER_VARIABLE] = "1"
            return False
        os.environ.pop(STARTS_LATER_VARIABLE, None)
    return STARTS_LATER_VARIABLE not in os.environ


def check_writable(file: Path, source: str) -> None:
    """Refuse an output file before hours of generation, not after them.

    Args:
        file: to write.
        source: begins the message: the file or the flag that names it.

    Raises:
        InputError: the file is a folder, or its folder is a file.
    """
    if file.is_dir() or any(parent.is_file() for parent in file.parents):
        raise InputError(f"{source}: cannot be written; it is a folder, or lies below a file.")


def partial_file(file: Path) -> Path:
    """The file for the output of a part of the batches, which never replaces that of all.

    >>> partial_file(Path("run", "predictions.jsonl")).name
    'predictions.partial.jsonl'
    """
    return file.with_name(f"{file.stem}.partial{file.suffix}")


@contextlib.contextmanager
def locked(trainer: pl.Trainer, file: Path, problem: str) -> Iterator[None]:
    """Keep other commands away from a file or folder.

    Args:
        trainer: only its rank 0 locks.
        file: the lock file.
        problem: the message if another command holds it.

    Raises:
        LockedError: another command holds it.
    """
    with contextlib.ExitStack() as lock:

        def acquire() -> None:
            try:
                lock.enter_context(file_lock(file, waiting=None))
            except LockedError as error:
                raise LockedError(problem) from error

        on_rank_zero(trainer, acquire)
        yield
