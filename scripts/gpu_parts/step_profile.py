"""Step profile: where the time of an optimizer step goes, and how often the host waits for the device.

one optimizer step of lit_phi2 under torch.profiler -> ms by kind of operator, the longest kernels, synchronizations
"""

from collections import Counter
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts.contenders import Arena, Contender
from profiles.step import kind_of

NUM_KERNELS = 15
# Calls in which the host waits, by their names in CUDA's runtime.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def profile_step(arena: Arena, contender: Contender, length: int, rows: int) -> dict[str, Any]:
    """Profile one optimizer step over rows of a length, after an unprofiled one."""
    settings = arena.settings
    arena.load(contender, length, rows, contender.variant, settings.step_tokens)
    arena.train(contender)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        arena.train(contender)
    assert contender.task is not None
    seconds = contender.task.ledger.seconds
    return {"seconds": seconds, **summarize_events(profiler.key_averages(), on_gpu=settings.device == "cuda")}


def summarize_events(events: Any, *, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds by kind, the longest kernels (operators on a CPU), and counts of waits."""
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for event in events:
        is_operator = event.device_type == DeviceType.CPU
        self_ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if is_operator:
            kinds[kind_of(event.key)] += self_ms
        if is_operator != on_gpu:
            kernels[event.key[:100]] += self_ms
        if event.key in WAITS:
            waits[event.key] += event.count
    return {
        "device_ms": sum(kernels.values()),
        "ms_by_kind": {kind: round(ms, 3) for kind, ms in kinds.most_common() if ms},
        "longest": {name: round(ms, 3) for name, ms in kernels.most_common(NUM_KERNELS)},
        "waits": dict(waits),
    }
