"""Workers: a loaded system in a process of its own, called by name.

    worker = Worker(settings) -> worker.call("complete", prompts=..., limits=...) -> (result, seconds)

Two systems at once in one process would share allocator, threads and memory. In a short run (`in_process`) they do.
"""

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from generation_parts.systems import SYSTEMS, SystemSettings


class Worker:
    """Loads a system and calls its methods; a context manager.

    Args:
        settings: of the system.
        in_process: without a process of its own.
    """

    def __init__(self, settings: SystemSettings, *, in_process: bool = False) -> None:
        self.settings = settings
        self._system = SYSTEMS[settings.name](settings) if in_process else None
        if self._system is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, settings), daemon=True)
            self._process.start()
            other.close()
            self._receive()  # loaded

    def call(self, name: str, **arguments: Any) -> tuple[Any, float]:
        """The result of a method, and its seconds."""
        if self._system is not None:
            return _timed(self._system, name, arguments)
        self._connection.send((name, arguments))
        result: tuple[Any, float] = self._receive()
        return result

    def _receive(self) -> Any:
        try:
            result, error = self._connection.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(
                f"bench: {self.settings} ended with {self._process.exitcode}; is there enough memory?"
            ) from None
        if error:
            raise SystemExit(f"bench: {self.settings} failed:\n{error}")
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._system is None:
            self._connection.close()
            self._process.join()


def _serve(connection: Connection, settings: SystemSettings) -> None:
    try:
        system = SYSTEMS[settings.name](settings)
        connection.send((None, ""))
        while True:
            name, arguments = connection.recv()
            connection.send((_timed(system, name, arguments), ""))
    except EOFError:
        return  # the parent has closed its end
    except BaseException:
        connection.send((None, traceback.format_exc()))


def _timed(system: Any, name: str, arguments: dict[str, Any]) -> tuple[Any, float]:
    began = system.now()
    result = getattr(system, name)(**arguments)
    return result, system.now() - began
