"""What the processes of forked_runs.py do: take over folder, environment and output, and run a command line.

Surroundings -> main(arguments), which Lightning's launcher or torchrun's agent may start several times -> exit code
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forked_acts import LONG, Act, install

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Node:
    """A node of torchrun's.

    Attributes:
        rank: of the node.
        port: of the first node.
        num_nodes: in all.
        num_processes: on each node.
    """

    rank: int
    port: int
    num_nodes: int = 2
    num_processes: int = 2


@dataclass
class Surroundings:
    """What a process started by the test itself would have: folder, environment and output."""

    folder: Path
    variables: dict[str, str]
    log: Path
    encoding: str

    @classmethod
    def here(cls, log: Path, encoding: str = "utf-8") -> "Surroundings":
        variables = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
        return cls(Path.cwd(), variables, log.absolute(), encoding)

    def enter(self) -> None:
        os.setpgid(0, 0)
        with self.log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.__stdout__ = sys.stdout = os.fdopen(1, "w", encoding=self.encoding)  # type: ignore[misc]
        errors = os.fdopen(2, "w", buffering=1, encoding=self.encoding, errors="backslashreplace")
        sys.__stderr__ = sys.stderr = errors  # type: ignore[misc]
        os.chdir(self.folder)
        _replace_environment(self.variables)


def enter(surroundings: Surroundings, function: Callable[..., int], *args: object) -> None:
    surroundings.enter()
    _finish(function, *args)


def _finish(function: Callable[..., int], *args: object) -> None:
    """Call the function, and end the process with the exit code that it returns."""
    code = 1
    try:
        code = function(*args)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script_main(name: str, arguments: list[str]) -> int:
    """The exit code of a program in scripts/; programs that it or a part of the GPU check starts are forked."""
    import torch

    torch.set_num_threads(1)
    sys.argv = [name, *arguments]
    module = importlib.import_module(name)
    fork_programs_of(module)
    if "processes" in arguments:
        fork_programs_of(importlib.import_module("gpu_parts.processes"))
    return int(module.main() or 0)


def fork_programs_of(module: Any) -> None:
    """Let a module fork the programs in scripts/ that it would start."""
    if hasattr(module, "subprocess"):
        module.subprocess = SimpleNamespace(Popen=ForkedScript, TimeoutExpired=subprocess.TimeoutExpired)


class ForkedScript:
    """Takes the place of the Popen of `python scripts/NAME.py ...`, and does not import everything again."""

    returncode: int | None = None

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, env: Mapping[str, str], cwd: Path, **_: Any):
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        os.chdir(cwd)
        _replace_environment(env)
        _finish(run_script_main, Path(command[1]).stem, command[2:])

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; the timeout is left to the test."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def run_program(program: str, arguments: list[str]) -> int:
    sys.argv = ["-c", *arguments]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    return 0


def run_command(arguments: list[str], act: Act | None, node: Node | None, num_processes: int) -> int:
    if node is not None:
        _launch_node(node, arguments, act)
        return 0
    ranks = [_ForkedRank(arguments, act) for _ in range(num_processes - 1)]
    waiting = iter(ranks)
    _launch_by(lambda command, env, cwd: next(waiting).begin(env))
    code = _run_main(arguments, act)
    for rank in ranks:
        rank.wait()
    return code


def _replace_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _run_main(arguments: Sequence[str], act: Act | None) -> int:
    """The exit code."""
    import torch
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lit_phi2.cli.main import main

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    rank_zero_only.rank = rank  # which Lightning reads from the environment when it is imported
    if act is not None and act.rank in (None, rank):
        install(act, rank)
    code = 1
    with contextlib.suppress(SystemExit):
        code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class _ForkedRank:
    """Takes the place of the Popen of a further process in Lightning's launcher.

    It is forked before the command line runs, and waits for its environment.
    """

    returncode: int | None = None

    def __init__(self, arguments: Sequence[str], act: Act | None) -> None:
        read, self._write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            return
        os.close(self._write)
        with os.fdopen(read) as pipe:
            variables = pipe.readline()
        if variables:
            _replace_environment(json.loads(variables))
        os._exit(_run_main(arguments, act) if variables else 0)

    def begin(self, variables: Mapping[str, str]) -> "_ForkedRank":
        os.write(self._write, json.dumps(dict(variables)).encode() + b"\n")
        os.close(self._write)
        self._write = -1
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = LONG) -> int:
        if self._write != -1:  # it was not launched
            os.close(self._write)
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _launch_by(popen: Callable[..., _ForkedRank]) -> None:
    """Let Lightning's launcher start its further processes by this function, and look for dead ones often."""
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
    from lightning.pytorch.strategies.launchers import subprocess_script

    subprocess_script.subprocess = SimpleNamespace(Popen=popen)
    _ChildProcessObserver.__init__.__defaults__ = (0.2,)  # seconds instead of 5


def _launch_node(node: Node, arguments: list[str], act: Act | None) -> None:
    """As torchrun does, except that it forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        run_id="none",  # as torchrun's
        min_nodes=node.num_nodes,
        max_nodes=node.num_nodes,
        nproc_per_node=node.num_processes,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{node.port}",
        rdzv_configs={"rank": node.rank, "timeout": LONG},
        max_restarts=0,
        start_method="fork",
    )
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  which may start others
    elastic_launch(config, _worker)(arguments, act)


def _worker(arguments: list[str], act: Act | None) -> None:
    code = _run_main(arguments, act)
    if code:
        os._exit(code)
