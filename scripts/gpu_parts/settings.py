"""Settings: the sizes of every part, for a GPU, for a Mac and for a try on a CPU.

The standard library only: the driver on a bare machine reads them too.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Part -> seconds that it may take, the most valuable first: what does not fit into --minutes is left out at the end.
PARTS = {
    "machine": 25.0,
    "base": 50.0,
    "training": 210.0,
    "int8": 70.0,
    "tests": 90.0,
    "float16": 60.0,
    "prediction": 75.0,
    "processes": 60.0,
    "resume": 60.0,
}
MINUTES = 8.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parts measure.

    Attributes:
        device: cuda, mps or cpu.
        tiny: small sizes, to test the program; the numbers have no meaning.
        work_dir: for logs, results and the base.
        dtype: of the base, as model.dtype.
        layers: of the base; fewer where the device has too little memory.
        lengths: of the rows that are trained, in tokens.
        batch_tokens: of the micro-batches that are tried; the fastest is measured.
        step_tokens: of an optimizer step.
        epoch_tokens: of an epoch, which is one timed round.
        num_prompts: to generate from, of the packaged test records.
        max_new_tokens: of each completion.
        rounds: timed rounds, after the untimed ones.
        matmul_seconds: for each of the matmuls that give the device's rate.
    """

    device: str
    tiny: bool
    work_dir: str
    dtype: str
    layers: int
    lengths: tuple[int, ...]
    batch_tokens: tuple[int, ...]
    step_tokens: int
    epoch_tokens: int
    num_prompts: int
    max_new_tokens: int
    rounds: int
    matmul_seconds: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """From JSON, which has no tuples."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    @property
    def work_path(self) -> Path:
        return Path(self.work_dir)

    @property
    def base_dir(self) -> Path:
        return self.work_path / "base"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


GPU: dict[str, Any] = {
    "dtype": "auto",
    "layers": 32,
    "lengths": (512, 2048),
    "batch_tokens": (8192, 16384, 32768),
    "step_tokens": 32768,
    "epoch_tokens": 65536,
    "num_prompts": 32,
    "max_new_tokens": 64,
    "rounds": 2,
    "matmul_seconds": 0.2,
}
# A tenth to a hundredth of a server's GPU.
MAC = GPU | {
    "lengths": (512,),
    "batch_tokens": (512, 1024),
    "step_tokens": 1024,
    "epoch_tokens": 2048,
    "num_prompts": 8,
    "max_new_tokens": 32,
}
TINY = GPU | {
    "dtype": "float32",
    "layers": 2,
    "lengths": (32, 64),
    "batch_tokens": (64, 128),
    "step_tokens": 128,
    "epoch_tokens": 256,
    "num_prompts": 4,
    "max_new_tokens": 8,
    "matmul_seconds": 0.01,
}


def new_settings(*, tiny: bool, device: str, work_dir: Path) -> Settings:
    """The settings of a device.

    Args:
        tiny: small sizes.
        device: cuda, mps or cpu.
        work_dir: for logs, results and the base.
    """
    sizes = TINY if tiny else MAC if device == "mps" else GPU
    return Settings(device=device, tiny=tiny, work_dir=str(work_dir.resolve()), **sizes)


def parse_limits(overrides: Iterable[str]) -> dict[str, float]:
    """Seconds for each part; an override is PART=SECONDS.

    Raises:
        ValueError: an override of another form.

    >>> parse_limits(["base=5"])["base"]
    5.0
    """
    limits = dict(PARTS)
    for override in overrides:
        name, _, seconds = override.partition("=")
        if name not in PARTS:
            raise ValueError(
                f"--limit: {override!r} names no part; expected PART=SECONDS with one of {', '.join(PARTS)}"
            )
        try:
            limits[name] = float(seconds)
        except ValueError as error:
            raise ValueError(f"--limit: {override!r} has no number of seconds") from error
    return limits
