"""What a process of forked_runs.py does to itself, in a certain call of a certain function."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG = 1800.0  # seconds that a halted process, or a step that does not end, would take


@dataclass
class Act:
    """What a process does in a call of a phase's function, after it wrote a byte to its mark.

    Attributes:
        phase: one of _phases().
        call: the number of that call, from 1. Each later call writes a byte, too.
        mark: a file.
        number: the signal that the process sends itself; None halts it.
        rank: of the process; None for all, each with a mark of its own.
        to_all: the signal goes to all processes of the run.
    """

    phase: str
    call: int
    mark: Path
    number: int | None = None
    rank: int | None = 0
    to_all: bool = False

    def mark_of(self, rank: int) -> Path:
        return self.mark.with_name(f"{self.mark.name}.{rank}")


def _phases() -> dict[str, tuple[Any, str]]:
    """Name of a phase -> class or module, and function."""
    from lit_phi2.data import load_split
    from lit_phi2.generation.engine import Engine
    from lit_phi2.training import base
    from lit_phi2.training.module import LitPhi2

    return {
        "reading": (load_split, "iter_records"),
        "loading": (base, "load_phi2"),
        "validation": (LitPhi2, "validation_step"),
        "test": (LitPhi2, "test_step"),
        "generation": (Engine, "step"),  # one call a decode step
        "training": (LitPhi2, "training_step"),
        "one long step": (LitPhi2, "training_step"),
    }


LONG_PHASES = ("reading", "loading", "one long step")  # which one call would make LONG


def install(act: Act, rank: int) -> None:
    """Replace the function of the phase by one that acts."""
    owner, name = _phases()[act.phase]
    function: Callable[..., Any] = getattr(owner, name)
    mark = act.mark_of(rank)
    called = 0

    def do() -> None:
        nonlocal called
        called += 1
        if called >= act.call:
            with mark.open("ab") as file:
                file.write(b".")
        if called == act.call:
            if act.number is None:
                _halt()
            elif act.to_all:
                os.killpg(0, act.number)
            else:
                os.kill(os.getpid(), act.number)
            if act.phase in LONG_PHASES:
                _halt()

    def with_act(*args: Any, **kwargs: Any) -> Any:
        do()
        return function(*args, **kwargs)

    def rows_with_act(*args: Any, **kwargs: Any) -> Iterator[Any]:
        do()
        yield from function(*args, **kwargs)

    setattr(owner, name, rows_with_act if act.phase == "reading" else with_act)


def _halt() -> None:
    """Do nothing for LONG, or until the tests have ended."""
    parent, end = os.getppid(), time.monotonic() + LONG
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)
