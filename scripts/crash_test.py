"""Crash test: kill fit and predict repeatedly, resume them, and compare the files with those of an undisturbed run.

    one undisturbed fit and predict                   ->  adapter, samples, curves, predictions, durations
    fit, SIGKILL, fit --ckpt_path last, SIGKILL, ...  ->  the same, bit for bit, every time

    python scripts/crash_test.py                       120 kills, at least 10 in each phase
    python scripts/crash_test.py --kills 0 --each 1    the short form of the tests, which does not depend on the clock

Most kills come at a random time of the run. The kills that a phase still lacks come from the process itself, at a
random file operation of a phase that writes files, and at the beginning of any other. The process reports its phase in
a page of memory that it shares with its parent. The runs have dropout, packing, accumulation windows of several
micro-batches, two epochs and a validation inside each.

Children are forked from a process that has imported everything and computed nothing, so that a start costs little.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pyarrow import parquet  # type: ignore[import-untyped]
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_phi2.cli.main import main as run_cli
from lit_phi2.training import fit
from lit_phi2.training.callbacks import checkpoint, predictions
from lit_phi2.training.module import LitPhi2
from lit_phi2.utils.files import tree_digest

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
PHASES_OF = {
    "fit": ("step", "window", "validation", "checkpoint", "ledger", "export"),
    "predict": ("completions", "predictions"),
}
PHASES = ("other", *PHASES_OF["fit"], *PHASES_OF["predict"])
WRITES = ("checkpoint", "ledger", "export", "predictions")  # phases of which a kill comes at a file operation
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove")  # file operations, as Python's audit events
MAX_SKIPPED = {True: 3, False: 1}  # file operations in WRITES, or phases of another kind, that a kill lets pass
MAX_KILLS = 6  # of one command before it runs to its end
RANDOM_FRACTION = 0.6  # of the kills come at a random time, whatever the phase
# Curves that depend on the clock: their steps must be equal, their values cannot be.
CLOCK_CURVES = ("train/tokens_per_second", "train/supervised_tokens_per_second", "train/memory_gib")
SETTINGS: dict[str, object] = {
    "data.train_files": "claims:train[:36]",
    "data.val_files": "claims:validation[:6]",
    "data.predict_files": "claims:test[:40]",
    "data.batch_size": 2,
    "model.dtype": "float32",  # auto is measured, and a busy machine might choose another one for predict
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
    """Memory that a child shares with its parent: the phase that it is in."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1))

    def write(self, phase: str) -> None:
        self.memory[0] = PHASES.index(phase)

    def read(self) -> str:
        return PHASES[self.memory[0]]


@dataclass
class Death:
    """Where a process kills itself.

    Attributes:
        phase: in which.
        num_skipped: phases of its kind, or file operations in them, that it lets pass.
    """

    phase: str
    num_skipped: int

    def approach(self) -> None:
        if self.num_skipped == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_skipped -= 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="at least this many, over fit and predict")
    parser.add_argument("--each", type=int, default=10, help="at least this many in each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--base", default="tiny", help="model.base")
    args = parser.parse_args()
    SETTINGS["model.base"] = args.base
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rng, kills = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        undisturbed, log = root / "undisturbed", root / "log"
        if args.kills:
            run_undisturbed(root / "first", log)  # slower, because files are read from the disk
        durations = run_undisturbed(undisturbed, log)
        expected = outcome(undisturbed)
        print("\n".join(f"  {name:<20} {value[:16]}" for name, value in expected.items()))
        number = 0
        while sum(kills.values()) < args.kills or any(lacking(kills, c, args.each) for c in PHASES_OF):
            folder = root / f"run {number}"
            for command in PHASES_OF:
                kill_repeatedly(command, folder, log, rng, kills, durations[command], args)
                finish(command, folder, log)
            if (result := outcome(folder)) != expected:
                print_differences(number, result, expected, undisturbed, folder)
                print(log.read_text()[-3000:])
                return 1
            number += 1
            counts = ", ".join(f"{count} in {phase}" for phase, count in sorted(kills.items()))
            print(f"run {number}: equal. Kills so far: {sum(kills.values())}, {counts}", flush=True)
    return 0


def run_undisturbed(folder: Path, log: Path) -> dict[str, float]:
    """Seconds of each command."""
    seconds = {}
    for command in PHASES_OF:
        began = time.monotonic()
        finish(command, folder, log)
        seconds[command] = time.monotonic() - began
        print(f"{command} undisturbed: {seconds[command]:.1f} s", flush=True)
    return seconds


def kill_repeatedly(
    command: str,
    folder: Path,
    log: Path,
    rng: random.Random,
    kills: Counter[str],
    duration: float,
    args: argparse.Namespace,
) -> None:
    """Start the command and kill it, up to MAX_KILLS times or until it ends first."""
    for _ in range(rng.randint(1, MAX_KILLS)):
        missing = lacking(kills, command, args.each)
        at_random = sum(kills.values()) < RANDOM_FRACTION * args.kills or not missing
        if at_random and sum(kills.values()) >= args.kills:
            return
        try:
            if at_random:
                died_in = kill_after(rng.uniform(0, duration), *start(command, folder, log))
            else:
                phase = rng.choice(missing)
                death = Death(phase, rng.randint(0, MAX_SKIPPED[phase in WRITES]))
                died_in = wait_for_death(*start(command, folder, log, death))
        except EarlyEndError as error:
            sys.exit(f"{command} ended before it was killed, with {error}:\n{log.read_text()[-3000:]}")
        if died_in is None:
            return
        kills[died_in] += 1


class EarlyEndError(Exception):
    """A child ended with an error before it was killed; holds the exit code."""


def lacking(kills: Counter[str], command: str, each: int) -> list[str]:
    """The phases of a command that have had fewer kills."""
    return [phase for phase in PHASES_OF[command] if kills[phase] < each]


# A child


def start(command: str, folder: Path, log: Path, death: Death | None = None) -> tuple[int, Page]:
    """Fork a process that runs the command, from its checkpoint if it has one, perhaps to its death."""
    page = Page()
    pid = os.fork()
    if pid:
        return pid, page
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    report_phases(page, death)
    os._exit(run_cli(arguments(command, folder)))


def arguments(command: str, folder: Path) -> list[str]:
    settings = {"trainer.default_root_dir": folder, **SETTINGS}
    argv = [command, "--config", str(CONFIG), *(f"--{key}={value}" for key, value in settings.items())]
    run = newest_run(folder)
    if run is not None and (run / "checkpoints" / "last.ckpt").is_file():
        argv += ["--ckpt_path", "last" if command == "fit" else str(run / "adapter")]
    return argv


def newest_run(folder: Path) -> Path | None:
    return max((folder / "tiny").glob("version_*"), key=lambda run: int(run.name.rpartition("_")[2]), default=None)


def report_phases(page: Page, death: Death | None) -> None:
    """Wrap the functions in which each phase begins and ends, and die at the chosen one."""

    def begin(phase: str) -> None:
        page.write(phase)
        if death is not None and death.phase == phase and phase not in WRITES:
            death.approach()

    def on_audit_event(event: str, args: object) -> None:
        if death is not None and event in OPERATIONS and death.phase == page.read() and death.phase in WRITES:
            death.approach()

    sys.addaudithook(on_audit_event)

    @contextmanager
    def during(phase: str) -> Iterator[None]:
        before = page.read()
        begin(phase)
        yield
        page.write(before)

    def wrap(owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with during(phase):
                return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    training_step = LitPhi2.training_step

    def step(module: LitPhi2, batch: Any, index: int) -> Any:  # the phase lasts through backward and the optimizer
        begin("window" if index % module.trainer.accumulate_grad_batches else "step")
        return training_step(module, batch, index)

    setattr(LitPhi2, "training_step", step)  # noqa: B010  mypy accepts no other way to replace a method
    wrap(LitPhi2, "validation_step", "validation")
    wrap(LitPhi2, "predict_step", "completions")
    wrap(checkpoint, "atomic_write", "checkpoint")
    wrap(fit, "write_fit_ledger", "ledger")
    wrap(checkpoint, "save_adapter", "export")
    wrap(predictions.PredictionWriter, "finish", "predictions")


# Kills


def kill_after(seconds: float, pid: int, page: Page) -> str | None:
    """Kill a child after a time, in any phase; the phase that it died in, None if it ended first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ended(pid):
            return None
        time.sleep(0.002)
    return kill(pid, page)


def wait_for_death(pid: int, page: Page) -> str | None:
    """The phase in which a child killed itself; None if it ended first."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise EarlyEndError(code)
    return page.read() if code else None


def ended(pid: int) -> bool:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        raise EarlyEndError(os.waitstatus_to_exitcode(status))
    return bool(done)


def kill(pid: int, page: Page) -> str | None:
    """Kill a child; the phase that it died in, or None if it ended first."""
    os.kill(pid, signal.SIGSTOP)  # so that it dies in the phase that is read
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):  # it ended in the meantime
        if status:
            raise EarlyEndError(os.waitstatus_to_exitcode(status))
        return None
    phase = page.read()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return phase


def finish(command: str, folder: Path, log: Path) -> None:
    """Run a command to its end."""
    pid, _ = start(command, folder, log)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")


# The outcome of a run


def outcome(folder: Path) -> dict[str, str]:
    """Name -> digest of everything that must be equal."""
    run = newest_run(folder)
    assert run is not None
    names = ("adapter/adapter_config.json", "samples.jsonl", "predictions.jsonl")
    digests = {name: sha256((run / name).read_bytes()) for name in names}
    ledger = parquet.read_table(run / "ledger.parquet").drop_columns(["content_sha256"])  # salted
    digests["ledger.parquet"] = sha256(json.dumps(ledger.to_pylist()).encode())
    # Its tensors alone: its metadata name the provenance of the run, and so the salt of the ledger.
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    digests["adapter/adapter_model.safetensors"] = tree_digest(dict(sorted(tensors.items())))
    events = EventAccumulator(str(run), purge_orphaned_data=True)
    events.Reload()
    for tag in sorted(events.Tags()["scalars"]):
        points = [(event.step, None if tag in CLOCK_CURVES else event.value) for event in events.Scalars(tag)]
        digests[tag] = sha256(json.dumps(points).encode())
    texts = {tag: [event.step for event in events.Tensors(tag)] for tag in sorted(events.Tags()["tensors"])}
    digests["texts"] = sha256(json.dumps(texts).encode())
    left_over = (path.name for path in run.rglob("*") if re.fullmatch(r"\..*|.*\.(part\d+|new|lock)", path.name))
    digests["left over"] = ", ".join(sorted(left_over))
    return digests


def print_differences(
    number: int, result: dict[str, str], expected: dict[str, str], undisturbed: Path, folder: Path
) -> None:
    """What differs; of a file of lines, the first line that does."""
    for name in expected:
        if result.get(name) == expected[name]:
            continue
        print(f"run {number}: {name} differs: {result.get(name)} instead of {expected[name]}")
        files = [run / name for run in (newest_run(undisturbed), newest_run(folder)) if run is not None]
        if name.endswith(".jsonl"):
            pairs = zip_longest(*(file.read_text("utf-8").split("\n") for file in files))
            print(*next(lines for lines in pairs if lines[0] != lines[1]), sep="\n")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
