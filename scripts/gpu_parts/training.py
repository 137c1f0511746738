"""Training: lit_phi2 and HF Trainer + PEFT on the same rows of 512 tokens, in alternating rounds in one process.

    records of exactly 512 tokens, half of each supervised: no peer pads, so only the step differs

    untimed epoch each -> matmul rate -> epoch of ours, epoch of HF Trainer, ... -> matmul rate

Only the peer that trains is on the device, so that the peak of memory is its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from gpu_parts.machine import compute_dtype
from gpu_parts.settings import Settings
from peers.ours import step_flops, step_matmul_rates
from peers.registry import PEERS, Peer
from peers.task import NUM_CHECKED, ROW_LENGTH, SEED, Example, Ledger, LoadedPeer, Task, totals
from timers import peak_gib, reset_peak_memory

LOSS_TOLERANCE = 0.02  # of the loss before training: the peers round in other places
RATE_SECONDS = 0.2  # for each of the ten matmuls


@dataclass(slots=True)
class Contender:
    """A peer and what it has measured."""

    peer: LoadedPeer
    task: Task
    tokens_per_second: list[float]
    seconds: list[float]
    peak_gib: float = 0.0


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure both.

    Raises:
        SystemExit: they do not have the same loss before training, or a record was not trained exactly once.
    """
    dtype = compute_dtype(settings)
    yield {"dtype": dtype, "rows": settings.rows, "records_per_step": settings.records_per_step}
    contenders = {name: load(peer, settings, dtype) for name, peer in peers(settings).items()}
    yield compare_losses(contenders)
    for contender in contenders.values():
        train_epoch(contender, settings.device)  # untimed: compiles kernels and fills the allocator's cache
        contender.tokens_per_second.clear()
        contender.seconds.clear()
    rates = [best_matmul_rate(contenders["lit_phi2"], settings)]
    yield {"matmul_tflops": [rate / 1e12 for rate in rates]}
    for _ in range(settings.rounds):
        for contender in contenders.values():
            train_epoch(contender, settings.device)
        yield summarize(contenders, rates)
    rates.append(best_matmul_rate(contenders["lit_phi2"], settings))
    yield summarize(contenders, rates)


def peers(settings: Settings) -> dict[str, Peer]:
    hf_trainer = Peer("hf", "hf_trainer", options={"batch_size": settings.rows})
    return {"lit_phi2": PEERS["ours"], "hf_trainer": hf_trainer}


def load(peer: Peer, settings: Settings, dtype: str) -> Contender:
    task = Task(
        base=str(settings.base_dir),
        examples=full_rows(settings.num_records),
        dtype=dtype,
        device=settings.device,
        records_per_step=settings.records_per_step,
        rows=settings.rows,
        ledger=Ledger(settings.device),
        scratch_dir=settings.work_path,
    )
    return Contender(peer.load(task), task, [], [])


def full_rows(count: int) -> list[Example]:
    """Examples of ROW_LENGTH random tokens; 0 is left out, because it is padding."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, 4000, (count, ROW_LENGTH), generator=generator).tolist()
    return [Example(row, ROW_LENGTH // 2) for row in ids]


def compare_losses(contenders: dict[str, Contender]) -> dict[str, Any]:
    losses = {}
    for name, contender in contenders.items():
        supervised_tokens = sum(example.supervised_tokens for example in contender.task.examples[:NUM_CHECKED])
        contender.peer.model.to(contender.task.device)
        losses[name] = sum(contender.peer.nats()) / supervised_tokens
        offload(contender)
    if abs(losses["lit_phi2"] / losses["hf_trainer"] - 1) > LOSS_TOLERANCE:
        raise SystemExit(f"the losses before training differ: {losses}")
    return {"loss_before": losses}


def train_epoch(contender: Contender, device: str) -> None:
    """An epoch of one peer; its speed and its peak of memory are appended."""
    contender.peer.model.to(device)
    reset_peak_memory(device)
    contender.peer.train()
    contender.peak_gib = max(contender.peak_gib, peak_gib(device))
    ledger = contender.task.ledger
    for key, expected in totals(contender.task.examples).items():
        if (trained := getattr(ledger, key)) != expected:
            raise SystemExit(f"trained {trained} {key} instead of {expected}")
    contender.seconds.append(ledger.seconds)
    contender.tokens_per_second.append(ledger.tokens / ledger.seconds)
    offload(contender)


def offload(contender: Contender) -> None:
    """Move a peer to the CPU. What it leaves in the allocator's cache is reused by the other, not allocated again."""
    contender.peer.model.to("cpu")


def best_matmul_rate(contender: Contender, settings: Settings) -> float:
    """FLOP/s of the device in the best of the matmul shapes of a step."""
    module = contender.peer.model.to(settings.device)
    tokens = settings.rows * ROW_LENGTH
    rates = step_matmul_rates(module, tokens, tokens // 2, seconds=RATE_SECONDS)
    offload(contender)
    return max(rates.values())


def summarize(contenders: dict[str, Contender], rates: list[float]) -> dict[str, Any]:
    speeds = {name: contender.tokens_per_second for name, contender in contenders.items()}
    ledger = contenders["lit_phi2"].task.ledger
    flops = step_flops(contenders["lit_phi2"].peer.model, ledger.tokens, ledger.supervised_tokens)
    best_rate = max(rates)
    ratio = median(ours / theirs for ours, theirs in zip(*speeds.values(), strict=True))
    utilization = {name: flops / median(c.seconds) / best_rate for name, c in contenders.items()}
    medians = {name: median(values) for name, values in speeds.items()}
    return {
        "tokens_per_second": speeds,
        "speedup": ratio,
        "matmul_tflops": [rate / 1e12 for rate in rates],
        "matmul_utilization": utilization,
        "peak_gib": {name: contender.peak_gib for name, contender in contenders.items()},
        "summary": f"{medians['lit_phi2']:,.0f} tokens/s, {ratio:.2f} times HF Trainer, "
        f"{utilization['lit_phi2']:.2f} of {best_rate / 1e12:.3g} TFLOP/s, "
        f"{contenders['lit_phi2'].peak_gib:.1f} GiB",
    }
