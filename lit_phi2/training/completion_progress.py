"""CompletionProgress: how many records are completed, how fast, and how long the rest takes, on stderr.

    terminal    completed:  27%|##7       | 120/436 records [00:22<00:58, 512 tokens/s]
    log file    completed: 120 of 436 records  512 tokens/s  0:00:58 left          a line every ten seconds

Nothing is printed of work that takes less than SECONDS.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

from lit_phi2.utils.console import format_seconds

SECONDS = 10.0  # between two lines
BAR_DELAY = 2.0  # seconds before a bar appears


class CompletionProgress:
    """Counts completions and shows their number.

    Args:
        what: begins the line.
        total: records to complete; None if that is not known.
        enabled: false shows nothing, as trainer.enable_progress_bar does.

    Attributes:
        num_records, num_tokens: completed so far.
    """

    def __init__(self, what: str, total: int | None, *, enabled: bool = True) -> None:
        self.what = what
        self.total = total
        self.enabled = enabled
        self.num_records = 0
        self.num_tokens = 0
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        if enabled and sys.stderr.isatty():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} records [{elapsed}<{remaining}{postfix}]"
            layout = layout if total else "{desc}: {n_fmt} records [{elapsed}{postfix}]"
            self.bar = tqdm(total=total, desc=what, bar_format=layout, delay=BAR_DELAY, leave=False, file=sys.stderr)

    def add(self, num_tokens: int) -> None:
        """Count a completion, and show the progress if it is time to."""
        self.num_records += 1
        self.num_tokens += num_tokens
        if self.bar is not None:
            self.bar.set_postfix_str(self._speed(), refresh=False)
            self.bar.update()
        elif self.enabled and time.monotonic() - self.last_line >= SECONDS:
            self.last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def _speed(self) -> str:
        return f"{self.num_tokens / max(self.seconds, 1e-9):,.0f} tokens/s"

    def _line(self) -> str:
        if self.total is None:
            return f"{self.what}: {self.num_records} records  {self._speed()}"
        left = (self.total - self.num_records) * self.seconds / self.num_records
        return f"{self.what}: {self.num_records} of {self.total} records  {self._speed()}  {format_seconds(left)} left"
