"""Runs in processes of their own that a test stops with real signals, forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SECONDS = 60.0  # that a run would stay in the phase where it is stopped
LIMIT = 15.0  # seconds in which a stopped run must end; the machine may be busy

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["lit_phi2.cli.app", "lit_phi2.cli.main", "torch.utils.tensorboard", "sklearn"])


@dataclass
class StoppedRun:
    """How a run ended.

    Attributes:
        exit_code: negative if the system ended it.
        seconds: from the signal to the end.
        output: what it printed.
    """

    exit_code: int
    seconds: float
    output: str


@dataclass
class Signal:
    """A signal that a run sends itself in a call of a phase's function, after it wrote the file `sent`."""

    number: int
    phase: str
    call: int
    sent: Path


def run(arguments: Sequence[str], log: Path) -> StoppedRun:
    """Run a command line to its end."""
    process = _start(arguments, log, None)
    process.join()
    return StoppedRun(process.exitcode or 0, 0.0, log.read_text())


def stop(
    arguments: Sequence[str],
    log: Path,
    phase: str,
    number: int = signal.SIGTERM,
    *,
    calls: int = 1,
    again: bool = False,
) -> StoppedRun:
    """Run a command line that sends itself a signal in a phase that would last SECONDS.

    The run itself sends it, so that the place does not depend on how busy the machine is.

    Args:
        arguments: of lit_phi2.
        log: where it prints.
        phase: one of PHASES.
        number: of the signal.
        calls: the signal comes in this call of the phase's function.
        again: send the signal a second time, after a second.
    """
    sent_file = log.with_suffix(".sent")
    sent_file.unlink(missing_ok=True)
    process = _start(arguments, log, Signal(number, phase, calls, sent_file))
    while not sent_file.is_file():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    sent = time.monotonic()
    assert process.pid is not None
    if again:
        time.sleep(1.0)
        os.kill(process.pid, number)
    process.join(LIMIT)
    seconds = time.monotonic() - sent
    if process.is_alive():
        process.kill()
    process.join()
    return StoppedRun(process.exitcode or 0, seconds, log.read_text())


def _start(arguments: Sequence[str], log: Path, stop_signal: Signal | None) -> BaseProcess:
    process = _forkserver.Process(target=_child, args=(list(arguments), log, stop_signal))
    process.start()
    return process


def _child(arguments: list[str], log: Path, stop_signal: Signal | None) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.__stderr__ = sys.stderr = os.fdopen(2, "w", buffering=1)  # type: ignore[misc]
    from lit_phi2.cli.main import main

    if stop_signal is not None:
        _slow_down(stop_signal)
    code = 1
    with contextlib.suppress(SystemExit):
        code = main(arguments)
    sys.stderr.flush()
    os._exit(code)


def _phases() -> dict[str, tuple[Any, str, int]]:
    """Name of a phase -> class or module, function, and into how many calls the function divides it."""
    from lit_phi2.data import load_split
    from lit_phi2.generation.engine import Engine
    from lit_phi2.training import base
    from lit_phi2.training.module import LitPhi2

    return {
        "reading": (load_split, "iter_records", 1),
        "loading": (base, "load_phi2", 1),
        "validation": (LitPhi2, "validation_step", 300),
        "test": (LitPhi2, "test_step", 300),
        "generation": (Engine, "step", 300),  # one call a decode step
        "training": (LitPhi2, "training_step", 300),
        "one long step": (LitPhi2, "training_step", 1),
    }


def _slow_down(stop_signal: Signal) -> None:
    """From the call of the signal on, the function of its phase takes SECONDS in all."""
    owner, name, num_calls = _phases()[stop_signal.phase]
    function: Callable[..., Any] = getattr(owner, name)
    called = 0

    def send() -> None:
        stop_signal.sent.touch()
        os.kill(os.getpid(), stop_signal.number)

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if called == stop_signal.call:
            send()
        if called >= stop_signal.call:
            time.sleep(SECONDS / num_calls)
        return function(*args, **kwargs)

    def slow_rows(*args: Any, **kwargs: Any) -> Iterator[Any]:
        send()
        for row in function(*args, **kwargs):
            time.sleep(SECONDS / 10)
            yield row

    setattr(owner, name, slow_rows if stop_signal.phase == "reading" else slow)
