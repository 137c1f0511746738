"""Settings: the sizes of every part, for the true size and for the tiny one.

The standard library only: the driver on a bare machine reads them too.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Part -> seconds that it may take: 420 together, which leaves 60 of 8 minutes to install wheels.
PARTS = {"machine": 20.0, "tests": 90.0, "base": 40.0, "training": 140.0, "prediction": 75.0, "resume": 55.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parts measure.

    Attributes:
        device: cuda, mps or cpu.
        tiny: small sizes, to test the program; the numbers have no meaning.
        work_dir: for logs, results and the base.
        dtype: of the base, as model.dtype.
        layers: of the base.
        rows: of 512 tokens in a micro-batch, of either peer.
        records_per_step: records of 512 tokens in an optimizer step.
        num_records: in an epoch, which is one timed round.
        num_prompts: to generate from, of the packaged test records.
        max_new_tokens: of each completion.
        rounds: timed rounds, after an untimed one.
    """

    device: str
    tiny: bool
    work_dir: str
    dtype: str
    layers: int
    rows: int
    records_per_step: int
    num_records: int
    num_prompts: int
    max_new_tokens: int
    rounds: int

    @property
    def work_path(self) -> Path:
        return Path(self.work_dir)

    @property
    def base_dir(self) -> Path:
        return self.work_path / "base"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def new_settings(*, tiny: bool, device: str, work_dir: Path, rows: int | None = None) -> Settings:
    """The settings of a size.

    Args:
        tiny: the small one.
        device: cuda, mps or cpu.
        work_dir: for logs, results and the base.
        rows: in a micro-batch, for a card with little memory.

    Raises:
        ValueError: rows does not divide an optimizer step.
    """
    sizes: dict[str, Any] = {
        "dtype": "auto",
        "layers": 32,
        "rows": 8,
        "records_per_step": 32,
        "num_records": 64,
        "num_prompts": 32,
        "max_new_tokens": 64,
        "rounds": 3,
    }
    if tiny:
        sizes = {
            "dtype": "float32",
            "layers": 2,
            "rows": 2,
            "records_per_step": 4,
            "num_records": 8,
            "num_prompts": 4,
            "max_new_tokens": 8,
            "rounds": 2,
        }
    sizes["rows"] = rows or sizes["rows"]
    if sizes["rows"] < 1 or sizes["records_per_step"] % sizes["rows"]:
        raise ValueError(f"--rows: {rows} does not divide the {sizes['records_per_step']} records of an optimizer step")
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
