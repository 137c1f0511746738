"""Contenders: peers that train the same rows in alternating rounds, each with the micro-batch that is fastest for it.

    rows of L random tokens, half of each supervised: no peer pads, so only the step differs

    for each contender: 1, 2, 4, ... rows in a micro-batch until one is slower or does not fit  -> its fastest
    matmul rate -> epoch of the first, epoch of the second, ... in rounds -> matmul rate         -> tokens/s, share

Where the device has space for all of them they stay there, and the memory of a peer is counted without the others'
weights; elsewhere only the one that trains is on the device.
"""

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from gpu_parts.memory import planned_bytes
from gpu_parts.settings import Settings
from lit_phi2.pretrained import read_model_config, resolve_base_model
from lit_phi2.training.memory_terms import PhiSizes
from peers.registry import Peer
from peers.task import NUM_CHECKED, SEED, Example, Ledger, LoadedPeer, Task, totals
from timers import matmul_rates, peak_gib, reset_peak_memory

SHARED_DEVICE_BYTES = 40 * 2**30  # a device with more keeps the weights of all peers
IDS = 4000  # of the random tokens, below the vocabulary of every base

Results = dict[str, Any]


@dataclass(slots=True)
class Contender:
    """A peer in a dtype, and what it has measured on rows of one length.

    Attributes:
        peer: how it is loaded.
        dtype: of its base, as model.dtype.
        variants: options of the peer that are tried, by a name for the table; the faster is measured.
        options: of its load in every variant.
        reusable: its weights, once they are loaded.
    """

    peer: Peer
    dtype: str
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    options: dict[str, Any] = field(default_factory=dict)
    reusable: Any = None
    loaded: LoadedPeer | None = None
    task: Task | None = None
    variant: str = ""
    loss_before: float = 0.0
    speeds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    tried: dict[str, float | None] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.peer.module == "ours"

    @property
    def model(self) -> Any:
        assert self.loaded is not None
        return self.loaded.model


class Arena:
    """The contenders on one device.

    Args:
        settings: of the check.
        contenders: by name; the first is the one that the others are compared with.
    """

    def __init__(self, settings: Settings, contenders: Mapping[str, Contender]) -> None:
        self.settings, self.contenders = settings, dict(contenders)
        self.phi = PhiSizes.from_config(read_model_config(resolve_base_model(str(settings.base_dir))))
        self.shares_device = shares_device(settings.device)

    def measure(self, length: int) -> Iterator[Results]:
        """Rounds over rows of one length; yields what is known so far."""
        failed: Results = {}
        for name in list(self.contenders):
            if error := self.prepare(name, length):
                failed[name] = {"failed": error}
                del self.contenders[name]
            yield {**failed, **{name: {"tried": dict(c.tried)} for name, c in self.contenders.items()}}
        rates = [self.matmul_rate(length)]
        for _ in range(self.settings.rounds):
            for contender in self.contenders.values():
                self.train(contender)
            yield {**failed, **self.results(length, rates)}
        rates.append(self.matmul_rate(length))
        yield {**failed, **self.results(length, rates)}

    # Before the rounds

    def prepare(self, name: str, length: int) -> str:
        """Measure the loss before training, and choose the micro-batch; returns what went wrong with another peer."""
        contender = self.contenders[name]
        try:
            self.load(contender, length, 1, next(iter(contender.variants)), length * NUM_CHECKED)
            contender.loss_before = self.loss_before(contender)
            self.choose_batch(contender, length)
        except (Exception, SystemExit) as error:
            if contender.is_ours:
                raise
            traceback.print_exc()
            contender.loaded = contender.reusable = None
            return f"{type(error).__name__}: {error}"[:300]
        return ""

    def loss_before(self, contender: Contender) -> float:
        """Of the first records under the base: every B is set to zero."""
        assert contender.loaded is not None
        assert contender.task is not None
        contender.model.to(self.settings.device)
        with torch.no_grad():
            for name, parameter in contender.model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        nats = contender.loaded.nats()
        return sum(nats) / sum(example.supervised_tokens for example in contender.task.examples[: len(nats)])

    def choose_batch(self, contender: Contender, length: int) -> None:
        """Keep the fastest micro-batch of a contender, loaded with the task of a whole epoch.

        Raises:
            SystemExit: one row does not fit.
        """
        contender.tried, variants = {}, list(contender.variants)
        sizes = sorted({max(1, tokens // length) for tokens in self.settings.batch_tokens})
        rows = sizes.pop(0)
        best, contender.variant = self.try_variants(contender, length, rows, variants)
        while best is None and rows > 1:
            rows, sizes = rows // 2, []
            best, contender.variant = self.try_variants(contender, length, rows, variants)
        if best is None:
            raise SystemExit(f"one row of {length} tokens does not fit into the memory")
        for larger in sizes:
            speed, _ = self.try_variants(contender, length, larger, [contender.variant])
            if speed is None or speed <= best:
                break
            best, rows = speed, larger
        self.load(contender, length, rows, contender.variant, self.settings.epoch_tokens)
        contender.speeds.clear()
        contender.peak_gib = 0.0

    def try_variants(
        self, contender: Contender, length: int, rows: int, variants: Sequence[str]
    ) -> tuple[float | None, str]:
        """The speed of the fastest variant with that many rows, and its name; None if none fits."""
        speeds = {variant: self.try_batch(contender, length, rows, variant) for variant in variants}
        fastest = max(speeds, key=lambda variant: speeds[variant] or 0.0)
        return speeds[fastest], fastest

    def try_batch(self, contender: Contender, length: int, rows: int, variant: str) -> float | None:
        """Tokens per second of an optimizer step after an untimed one; None if it does not fit."""
        speed = None
        try:
            self.load(contender, length, rows, variant, self.settings.step_tokens)
            self.train(contender)
            speed = self.train(contender)
        except RuntimeError as error:
            if "out of memory" not in str(error):  # torch.OutOfMemoryError of CUDA; MPS has no class for it
                raise
            contender.loaded = None
        if speed is None:  # outside of except, whose traceback holds the activations
            gc.collect()
            empty_cache(self.settings.device)
        contender.tried[f"{rows} rows{', ' * bool(variant)}{variant}"] = speed
        return speed

    def load(self, contender: Contender, length: int, rows: int, variant: str, num_tokens: int) -> None:
        """Make the loop of a contender for some rows; its weights are loaded once."""
        settings = self.settings
        contender.task = Task(
            base=str(settings.base_dir),
            examples=full_rows(max(num_tokens // length, rows), length),
            dtype=contender.dtype,
            device=settings.device,
            records_per_step=max(settings.step_tokens // length, rows),
            rows=rows,
            ledger=Ledger(settings.device),
            litgpt_dir=settings.work_path / "litgpt",
            scratch_dir=settings.work_path,
            row_length=length,
        )
        self.make_room(contender)
        options = contender.options | contender.variants[variant] | ({} if contender.is_ours else {"batch_size": rows})
        contender.loaded = contender.peer.load(contender.task, reuse=contender.reusable, **options)
        contender.reusable = contender.loaded.reusable

    # Rounds

    def train(self, contender: Contender) -> float:
        """An epoch; its tokens per second."""
        assert contender.loaded is not None
        assert contender.task is not None
        device = self.settings.device
        self.make_room(contender)
        contender.model.to(device)
        others = sum(model_bytes(c.model, device) for c in self.contenders.values() if c is not contender and c.loaded)
        reset_peak_memory(device)
        contender.loaded.train()
        peak = peak_gib(device) - (others / 2**30 if device == "cuda" else 0.0)
        contender.peak_gib = max(contender.peak_gib, peak)
        ledger = contender.task.ledger
        for key, expected in totals(contender.task.examples).items():
            if (trained := getattr(ledger, key)) != expected:
                raise SystemExit(f"{contender.peer.module} trained {trained} {key} instead of {expected}")
        contender.speeds.append(ledger.tokens / ledger.seconds)
        return contender.speeds[-1]

    def make_room(self, contender: Contender) -> None:
        """Move the others to the CPU, where the device has not space for all."""
        for other in self.contenders.values():
            if other is not contender and other.loaded is not None and not self.shares_device:
                other.model.to("cpu")

    def matmul_rate(self, length: int) -> float:
        """FLOP/s of the device in the best of the matmul shapes of a step of the first contender."""
        first = next(iter(self.contenders.values()))
        assert first.task is not None
        options = {"dtype": getattr(torch, first.dtype), "device": self.settings.device}
        rates: dict[str, float] = {}
        for name, (num_in, num_out) in self.phi.linear_layers.items():
            weight = torch.empty(num_out, num_in, **options)
            rates |= matmul_rates(name, first.task.rows * length, weight, seconds=self.settings.matmul_seconds)
        return max(rates.values())

    # Results

    def flops_per_token(self) -> float:
        """Of the frozen matmuls of rows whose second half is supervised: forward, and backward to the input."""
        return 4 * (self.phi.num_layers * self.phi.num_block_weights + self.phi.vocab_size * self.phi.width / 2)

    def results(self, length: int, rates: list[float]) -> Results:
        rate, results = max(rates), {}
        first = next(iter(self.contenders.values()))
        for name, contender in self.contenders.items():
            assert contender.task is not None
            result: Results = {
                "dtype": contender.dtype,
                "rows": contender.task.rows,
                "variant": contender.variant,
                "tried": dict(contender.tried),
                "loss_before": contender.loss_before,
                "tokens_per_second": list(contender.speeds),
                "matmul_share": median(contender.speeds) * self.flops_per_token() / rate,
                "peak_gib": contender.peak_gib,
                "speedup": median(a / b for a, b in zip(first.speeds, contender.speeds, strict=True)),
            }
            if contender.is_ours:
                planned = planned_bytes(
                    self.phi, contender.dtype, self.settings.device, contender.task.rows, length, **contender.options
                )
                result["planned_gib"] = planned / 2**30
                if self.settings.device == "cuda":  # the peak elsewhere is that of the process
                    result["plan_deviation"] = planned / 2**30 / result["peak_gib"] - 1
            results[name] = result
        return {**results, "matmul_tflops": [rate / 1e12 for rate in rates]}


def full_rows(count: int, length: int) -> list[Example]:
    """Examples of random tokens; 0 is left out, because it is padding."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, IDS, (count, length), generator=generator).tolist()
    return [Example(row, length // 2) for row in ids]


def model_bytes(model: Any, device: str) -> int:
    """Of the weights that are on the device."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == torch.device(device).type)


def shares_device(device: str) -> bool:
    """Whether all peers have space there; a CPU is a copy of itself."""
    if device == "cuda":
        return bool(torch.cuda.get_device_properties(0).total_memory > SHARED_DEVICE_BYTES)
    return device == "cpu"


def empty_cache(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()
