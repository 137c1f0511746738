"""Command lines in processes of their own, forked from a process that has imported everything and computed nothing.

    start(arguments)  ->  one process, or as many as Lightning or torchrun launches  ->  exit code and what they print

A fresh interpreter would take seconds to import. What a test does to a run, the run does to itself in a certain call of
a function, so that the place does not depend on how busy the machine is.
"""

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

from forked_acts import Act
from forked_child import Node, Surroundings, enter, run_command, run_program, run_script_main

LIMIT = 800.0  # seconds for a run on any machine; pytest's limit is larger

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    [
        "lit_phi2.cli.app",
        "lit_phi2.cli.main",
        "torch.distributed.launcher.api",
        "torch.utils.tensorboard",
        "sklearn",
    ]
)


class Run:
    """A command line that runs.

    Attributes:
        process: its first process, which leads a process group of all.
        log: where all of them print.
    """

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.is_file() else ""

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code; negative if a signal ended the first process, which the limit in seconds does."""
        self.process.join(limit)
        if self.process.is_alive():
            self.kill()
        self.process.join()
        return self.process.exitcode or 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, which it must before the process ends."""
        while not condition():
            is_alive = self.process.is_alive()
            assert is_alive or condition(), self.output
            time.sleep(0.01)

    def kill(self) -> None:
        """All of its processes."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    act: Act | None = None,
    node: Node | None = None,
    num_processes: int = 1,
    variables: Mapping[str, str] = MappingProxyType({}),
    encoding: str = "utf-8",
) -> Run:
    """Start a command line of lit_phi2.

    Args:
        arguments: of lit_phi2.
        log: where it prints.
        act: what it does to itself.
        node: torchrun's agent of this node starts the processes.
        num_processes: that Lightning starts, the first one included.
        variables: of the environment, beside those that are here.
        encoding: of what it prints.
    """
    surroundings = Surroundings.here(log, encoding)
    surroundings.variables |= variables
    if num_processes > 1:
        surroundings.variables["MASTER_PORT"] = str(unused_port())
    return _start(surroundings, run_command, list(arguments), act, node, num_processes)


def unused_port() -> int:
    """Below those that the system gives to whoever asks for any, so that nobody else takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def run(arguments: Sequence[str], log: Path, **settings: Any) -> str:
    """Run a command line to its end, without an error; returns what it printed."""
    started = start(arguments, log, **settings)
    assert started.wait() == 0, started.output
    return started.output


def run_script(name: str, arguments: Sequence[str], log: Path) -> Run:
    """Run the main() of a program in scripts/ to its end."""
    started = _start(Surroundings.here(log), run_script_main, name, list(arguments))
    started.wait()
    return started


def start_program(program: str, arguments: Sequence[str], log: Path) -> Run:
    """Start a Python program, as `python -c` does."""
    return _start(Surroundings.here(log), run_program, program, list(arguments))


def _start(surroundings: Surroundings, function: Callable[..., int], *args: object) -> Run:
    process = _forkserver.Process(target=enter, args=(surroundings, function, *args), daemon=True)
    process.start()
    return Run(process, surroundings.log)
