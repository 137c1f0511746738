"""Kill fit and predict over and over, let them go on, and hold what comes out against a run that nobody disturbed.

    one undisturbed fit and predict  ->  adapter, samples, curves, predictions, and how long each phase takes
    fit, SIGKILL, fit --ckpt_path last, SIGKILL, ...  ->  the same bytes, every time

    python scripts/crash_test.py                    120 kills, at least 10 in each phase; about a quarter of an hour
    python scripts/crash_test.py --kills 6 --each 0 the short form of the tests

Most kills are drawn over the run's own duration; those that a phase still lacks then wait for it to begin and strike
inside it. A phase is told by the process itself, in a page of memory that it shares with its killer. With dropout,
packing, windows of several micro-batches, two epochs and a validation inside each.

Children are forked from a process that has imported everything and computed nothing, so that a start costs little.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.cli.main import main as run_cli
from lit_phi2.training.callbacks import checkpoint, predictions
from lit_phi2.training.module import LitPhi2

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
PHASES = ("other", "step", "window", "validation", "checkpoint", "export", "answers", "predictions")
NEEDED = {"fit": ("step", "window", "validation", "checkpoint", "export"), "predict": ("answers", "predictions")}
MOST_KILLS = 4  # of one run before it is left to end
# What depends on the clock; its steps must agree, its values cannot.
TIMED = ("train/tokens_per_second", "train/supervised_tokens_per_second", "train/memory_gib")
SETTINGS = {
    "data.train_files": "claims:train[:36]",
    "data.val_files": "claims:validation[:6]",
    "data.predict_files": "claims:test[:40]",
    "data.batch_size": 2,
    "model.lora_dropout": 0.1,
    "model.max_new_tokens": 8,
    "trainer.max_epochs": 2,
    "trainer.accumulate_grad_batches": 3,
    "trainer.val_check_interval": 2,
    "trainer.enable_progress_bar": "false",
    "checkpoint.every_n_steps": 1,
}


@dataclass
class Page:
    """What a child tells of itself: the phase it is in, and how many phases it has begun."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 16))

    def tell(self, phase: str) -> None:
        self.memory[:16] = struct.pack("qq", PHASES.index(phase), self.read()[1] + 1)

    def read(self) -> tuple[str, int]:
        number, begun = struct.unpack("qq", self.memory[:16])
        return PHASES[number], begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="at least so many, over fit and predict")
    parser.add_argument("--each", type=int, default=10, help="at least so many in each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rng, killed = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        seconds = {}
        for undisturbed in (root / "first", root / "undisturbed"):  # the first is slower, for files come from the disk
            for command in NEEDED:
                started = time.monotonic()
                finish(command, undisturbed, root / "log")
                seconds[command] = time.monotonic() - started
                print(f"{command} undisturbed: {seconds[command]:.1f} s", flush=True)
        expected = outcome(undisturbed)
        print("\n".join(f"  {name:<20} {value[:16]}" for name, value in expected.items()))
        number = 0
        while sum(killed.values()) < args.kills or any(lacking(killed, c, args.each) for c in NEEDED):
            folder = root / f"run {number}"
            for command in NEEDED:
                for _ in range(rng.randint(1, MOST_KILLS)):
                    missing = lacking(killed, command, args.each)
                    drawn = sum(killed.values()) < 0.6 * args.kills or not missing
                    pid, page = start(command, folder, root / "log")
                    if drawn:
                        strike = at_a_time(rng.uniform(0, seconds[command]))
                    else:
                        strike = in_phase(rng.choice(missing), rng.randrange(3), rng.random() ** 3 * 0.02)
                    try:
                        phase = strike(pid, page)
                    except EarlyEndError as error:
                        sys.exit(f"a {command} ended by itself with {error}:\n{(root / 'log').read_text()[-3000:]}")
                    if phase is None:
                        break  # it ended first
                    killed[phase] += 1
                finish(command, folder, root / "log")
            found = outcome(folder)
            if found != expected:
                for name in expected:
                    if found.get(name) != expected[name]:
                        print(f"run {number}: {name} differs: {found.get(name)} and not {expected[name]}")
                        show_difference(undisturbed, folder, name)
                print((root / "log").read_text()[-3000:])
                return 1
            number += 1
            told = ", ".join(f"{count} in {phase}" for phase, count in sorted(killed.items()))
            print(f"run {number}: equal. Killed so far: {sum(killed.values())}, {told}", flush=True)
    return 0


class EarlyEndError(Exception):
    """A run was to be killed and ended before with a fault; holds the exit code."""


def lacking(killed: Counter[str], command: str, each: int) -> list[str]:
    return [phase for phase in NEEDED[command] if killed[phase] < each]


# A child


def start(command: str, folder: Path, log: Path) -> tuple[int, Page]:
    """Fork a process that runs the command, from its checkpoint if it has one."""
    page = Page()
    pid = os.fork()
    if pid:
        return pid, page
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tell_phases(page)
    os._exit(run_cli(arguments(command, folder)))


def arguments(command: str, folder: Path) -> list[str]:
    given = {"trainer.default_root_dir": folder, **SETTINGS}
    line = [command, "--config", str(CONFIG), *(f"--{key}={value}" for key, value in given.items())]
    newest = newest_run(folder)
    if newest is not None and (newest / "checkpoints" / "last.ckpt").is_file():
        line += ["--ckpt_path", "last" if command == "fit" else str(newest / "adapter")]
    return line


def newest_run(folder: Path) -> Path | None:
    return max((folder / "tiny").glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]), default=None)


def tell_phases(page: Page) -> None:
    """Wrap the places where each phase begins and ends."""

    @contextmanager
    def during(phase: str) -> Iterator[None]:
        before = page.read()[0]
        page.tell(phase)
        yield
        page.tell(before)

    def wrap(owner: Any, name: str, phase: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with during(phase(*args)):
                return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    training_step = LitPhi2.training_step

    def step(module: LitPhi2, batch: Any, index: int) -> Any:  # the phase goes on through backward and the optimizer
        page.tell("window" if index % module.trainer.accumulate_grad_batches else "step")
        return training_step(module, batch, index)

    setattr(LitPhi2, "training_step", step)  # noqa: B010  mypy knows of no other way to replace a method
    wrap(LitPhi2, "validation_step", lambda *_: "validation")
    wrap(LitPhi2, "predict_step", lambda *_: "answers")
    wrap(checkpoint, "replace_file", lambda path, *_: "checkpoint")
    wrap(checkpoint, "save_adapter", lambda *_: "export")
    wrap(predictions.PredictionWriter, "finish", lambda *_: "predictions")


# A killer


def at_a_time(seconds: float) -> Callable[[int, Page], str | None]:
    """Kills after so many seconds, whatever is going on."""

    def strike(pid: int, page: Page) -> str | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if ended(pid):
                return None
            time.sleep(0.002)
        return kill(pid, page)

    return strike


def in_phase(phase: str, skipped: int, seconds: float) -> Callable[[int, Page], str | None]:
    """Kills so many seconds into a phase, having let some of its kind go by."""

    def strike(pid: int, page: Page) -> str | None:
        seen, left = -1, skipped
        while True:
            now, begun = page.read()
            if now == phase and begun != seen:
                seen = begun
                left -= 1
                if left < 0:
                    break
            if ended(pid):
                return None
            time.sleep(0.0002)  # the core that this would keep busy is one of those that it waits for
        time.sleep(seconds)
        return kill(pid, page)

    return strike


def ended(pid: int) -> bool:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        raise EarlyEndError(os.waitstatus_to_exitcode(status))
    return bool(done)


def kill(pid: int, page: Page) -> str | None:
    os.kill(pid, signal.SIGSTOP)  # so that the phase that is read is the one that it dies in
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):  # it ended in the meantime
        if status:
            raise EarlyEndError(os.waitstatus_to_exitcode(status))
        return None
    phase = page.read()[0]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return phase


def finish(command: str, folder: Path, log: Path) -> None:
    pid, _ = start(command, folder, log)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")


# What came out


def outcome(folder: Path) -> dict[str, str]:
    """Name -> digest of everything that must be the same."""
    run = newest_run(folder)
    assert run is not None
    names = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "samples.jsonl", "predictions.jsonl")
    found = {name: sha256((run / name).read_bytes()) for name in names}
    events = EventAccumulator(str(run), purge_orphaned_data=True)
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        points = [(event.step, None if tag in TIMED else event.value) for event in events.Scalars(tag)]
        found[tag] = sha256(json.dumps(points).encode())
    texts = {tag: [event.step for event in events.Tensors(tag)] for tag in sorted(events.Tags()["tensors"])}
    found["texts"] = sha256(json.dumps(texts).encode())
    left = sorted(path.name for path in run.rglob("*") if path.suffix == ".part")
    found["left over"] = ", ".join(left)
    return found


def show_difference(undisturbed: Path, folder: Path, name: str) -> None:
    """The first line that is another one, of a file of lines."""
    files = [run / name for run in (newest_run(undisturbed), newest_run(folder)) if run is not None]
    if name.endswith(".jsonl"):
        both = zip_longest(*(file.read_text("utf-8").splitlines() for file in files))
        print(*next(lines for lines in both if lines[0] != lines[1]), sep="\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
