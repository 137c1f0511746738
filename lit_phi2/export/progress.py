"""Progress: how much of a model is written, as a bar in a terminal and as lines of the log elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from lit_phi2.export.gguf_reader import TENSOR_TYPES
from lit_phi2.export.weights import ModelWeights

log = logging.getLogger(__name__)

_SECONDS = 5.0  # between two lines


@contextlib.contextmanager
def write_progress(weights: ModelWeights, dtype: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes of each tensor that is written."""
    total = sum(TENSOR_TYPES[dtype].num_bytes(shape.numel()) for shape in weights.shapes.values())
    done, last_line = 0, time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not sys.stderr.isatty()) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done, last_line
            done += num_bytes
            bar.update(num_bytes)
            if bar.disable and time.monotonic() - last_line > _SECONDS:
                last_line = time.monotonic()
                log.info("written %.1f of %.1f GB", done / 1e9, total / 1e9)

        yield advance
