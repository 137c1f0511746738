"""Task: what every peer trains on, and what it reports.

    Example (ids, prompt_length) x n  +  base, dtype, device, rows in a step   ->  Task
    Task -> load of a peer's module -> LoadedPeer (nats, train) -> Ledger (seconds, steps, tokens)

Only the standard library is imported at the top: the environment of each peer lacks what the others need.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timers import now

Report = dict[str, Any]  # JSON values

LORA_R, LORA_ALPHA = 2, 4
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 0.01
ROW_LENGTH = 512  # of a task that names no other
NUM_CHECKED = 8  # records whose loss is compared, from the first
SEED = 42
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A record as ids.

    Attributes:
        ids: prompt, response and EOS token.
        prompt_length: tokens of the prompt, which are not supervised.
    """

    ids: list[int]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        return [IGNORE_INDEX] * self.prompt_length + self.ids[self.prompt_length :]

    @property
    def supervised_tokens(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass(slots=True)
class Ledger:
    """What a peer has trained in the last epoch, counted from the batches that it made, and when.

    Attributes:
        device: which must have finished before a time is read.
        began: just before the first batch is made, in seconds.
        ended: when the last optimizer step has finished.
        steps: optimizer steps.
        records, tokens, supervised_tokens: without padding.
        checksum: sum of all token ids; padding has id 0.
    """

    device: str
    began: float = 0.0
    ended: float = 0.0
    steps: int = 0
    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    checksum: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def begin(self) -> None:
        """Start an epoch."""
        self.steps = self.records = self.tokens = self.supervised_tokens = self.checksum = 0
        self.began = self.ended = now(self.device)

    def add(self, records: int, tokens: int, supervised_tokens: int, checksum: int) -> None:
        """Count a batch."""
        self.records += records
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.checksum += checksum

    def add_examples(self, examples: list[Example]) -> None:
        """Count a batch of whole examples."""
        self.add(**totals(examples))

    def end_step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self.ended = now(self.device)


@dataclass(frozen=True, slots=True)
class Task:
    """What every peer is given.

    Attributes:
        base: folder of the base.
        examples: to train on, each once an epoch.
        dtype: bfloat16 or float32.
        device: cpu, cuda or mps.
        records_per_step: in an optimizer step.
        rows: in a micro-batch of lit_phi2.
        ledger: the peer writes into it.
        litgpt_dir: folder of the base in LitGPT's form.
        scratch_dir: where a tool may write; nothing in it is read.
        quantization: of lit_phi2's base; int8 or None.
        row_length: tokens in a packed row of lit_phi2, and the most that a record may have.
    """

    base: str
    examples: list[Example]
    dtype: str
    device: str
    records_per_step: int
    rows: int
    ledger: Ledger
    litgpt_dir: Path = field(default_factory=Path)
    scratch_dir: Path = field(default_factory=Path)
    quantization: str | None = None
    row_length: int = ROW_LENGTH

    def accumulate(self, row_length: int) -> int:
        """Rows of `row_length` tokens that hold about records_per_step records."""
        tokens = sum(len(example.ids) for example in self.examples)
        return max(1, round(self.records_per_step * tokens / len(self.examples) / row_length))


@dataclass(frozen=True, slots=True)
class LoadedPeer:
    """A peer that is ready to train.

    Attributes:
        model: the module with base and adapter.
        nats: of each of the first NUM_CHECKED examples, summed over its response, without dropout.
        train: one epoch, counted in the task's ledger; a second call continues from the weights of the first.
        metrics: further measurements, after training.
        reusable: what a load for another task may take over, so that weights are loaded once.
    """

    model: Any
    nats: Callable[[], list[float]]
    train: Callable[[], object]
    metrics: Callable[[], Report] = dict
    reusable: Any = None

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def totals(examples: list[Example]) -> dict[str, int]:
    """What the ledger must hold after each of these has been trained once."""
    return {
        "records": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "supervised_tokens": sum(example.supervised_tokens for example in examples),
        "checksum": sum(sum(example.ids) for example in examples),
    }
