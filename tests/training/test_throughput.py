"""The memory that a run reports, on every system."""

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lit_phi2.training.callbacks import throughput
from lit_phi2.training.callbacks.throughput import peak_resident_bytes

STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.is_file(), reason="reads the peak from /proc")
def test_peak_memory_is_that_of_the_kernel() -> None:
    """Within a tenth: this process may use more memory at the second reading."""
    match = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    assert peak_resident_bytes() == pytest.approx(int(match[1]) * 1024, rel=0.1)


def test_peak_memory_on_windows_is_the_peak_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(throughput, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
    assert peak_resident_bytes() == 7
    del memory.peak_wset
    assert peak_resident_bytes() == 5, "a system without both tells the memory now"
