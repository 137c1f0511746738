"""Arrivals: the items of a source that another thread reads, without waiting for them while there is other work.

source   a b ... c     ->  a b None None c     None: nothing has arrived, and the caller is not idle
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_POLL_SECONDS = 1.0  # Windows delivers Ctrl-C only between two waits


def arrivals(source: Iterable[Item], is_idle: Callable[[], bool], *, ahead: int) -> Iterator[Item | None]:
    """The items of a source in order, as they arrive.

    Args:
        source: iterated in another thread, which ends with the process if the source never does.
        is_idle: whether the caller can do nothing but wait.
        ahead: items that are read before they are asked for.

    Raises:
        BaseException: that of the source, after its items.
    """
    items: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)

    def read() -> None:
        try:
            for item in source:
                items.put((item, None))
            items.put((None, StopIteration()))
        except BaseException as error:
            items.put((None, error))

    threading.Thread(target=read, daemon=True).start()
    while True:
        idle = is_idle()
        try:
            item, error = items.get(idle, _POLL_SECONDS)
        except queue.Empty:
            if not idle:
                yield None
            continue
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        yield item
