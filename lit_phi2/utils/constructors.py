"""Constructors: an object remembers the arguments of its own, so that a run can be described as a config.

    LitPhi2(base="tiny", lora_r=4).arguments  ->  {"base": "tiny", "adapter": None, "lora_r": 4, ...}

`training/program_config.py` describes a run by them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def keep_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate __init__: `self.arguments` has every argument by name, defaults included.

    >>> class Point:
    ...     @keep_arguments
    ...     def __init__(self, x: int, y: int = 2) -> None: ...
    >>> Point(1).arguments
    {'x': 1, 'y': 2}
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        init(self, *args, **kwargs)
        self.arguments = dict(list(bound.arguments.items())[1:])

    return wrapper
