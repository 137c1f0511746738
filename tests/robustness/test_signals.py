"""Ctrl-C and SIGTERM end a run within seconds in every phase, and a resumed run is the undisturbed one.

The runs are processes of their own, and send themselves real signals in a certain call of a function.
"""

import json
import os
import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked_acts import Act
from forked_runs import run, start
from helpers import digest_of_tensors
from lit_phi2.adapters.checkpoint import read_checkpoint

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve records."""
    folder = tmp_path_factory.mktemp("signals")
    words = "claim denied appeal letter plan review records date service coverage notice send".split()  # noqa: SIM905
    records = [
        {"instruction": " ".join(words[: 2 + n % 5]), "response": " ".join(words[n % 3 : 4 + n % 7])} for n in range(12)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def arguments(subcommand: str, root: Path, phi_dir: Path, files: Path, **settings: object) -> list[str]:
    """A run of two epochs, each of twelve micro-batches in windows of three, with a validation in its middle."""
    defaults = {
        "run_name": "run",
        "model.base": phi_dir,
        "model.dtype": "float32",
        "model.max_new_tokens": 8,
        "model.lora_dropout": 0.1,
        "data.max_length": 128,
        "data.packing": "false",
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 2,
        "trainer.accumulate_grad_batches": 3,
        "trainer.val_check_interval": 6,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_steps": 1,
    }
    defaults |= {f"data.{name}_files": files / "records.jsonl" for name in ("train", "val", "test", "predict")}
    return [subcommand, *(f"--{key}={value}" for key, value in (defaults | settings).items())]


@dataclass
class StoppedRun:
    """How a run ended.

    Attributes:
        exit_code: negative if the system ended it.
        further_calls: of the phase's function, after the one in which the signal came.
        output: what it printed.
    """

    exit_code: int
    further_calls: int
    output: str

    def check(self, number: signal.Signals) -> None:
        assert self.exit_code == EXIT_CODES[number], self.output
        assert self.further_calls == 0
        assert "Traceback" not in self.output


def stop(arguments: Sequence[str], log: Path, phase: str, number: int = signal.SIGTERM, *, call: int = 1) -> StoppedRun:
    """Run a command line that sends itself a signal in a call of a phase's function.

    The call lasts half an hour if the phase has only one, so the run must end before.
    """
    act = Act(phase, call, log.with_suffix(".sent"), number)
    stopped = start(arguments, log, act=act)
    exit_code = stopped.wait()
    return StoppedRun(exit_code, len(act.mark_of(0).read_bytes()) - 1, stopped.output)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("reading", signal.SIGTERM),
        ("loading", signal.SIGINT),
        ("validation", signal.SIGTERM),  # of the base, before the first step
        ("generation", signal.SIGINT),  # its samples
    ],
)
def test_a_signal_before_the_first_step_ends_fit_and_says_so(
    phase: str, number: signal.Signals, phi_dir: Path, files: Path, tmp_path: Path
) -> None:
    result = stop(arguments("fit", tmp_path, phi_dir, files), tmp_path / "log", phase, number)
    result.check(number)
    assert "stopped before the first optimizer step; nothing is saved yet" in result.output
    assert not list(tmp_path.rglob("*.ckpt"))


def outcome(root: Path) -> dict[str, object]:
    """Everything of a run that a stop must not change."""
    folder = root / "run" / "version_0"
    events = EventAccumulator(str(folder)).Reload()
    curves = ("train/loss", "train/grad_norm", "lr", "val/loss", "val/perplexity")
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    return {
        "adapter": digest_of_tensors(folder / "adapter" / "adapter_model.safetensors"),
        "samples": (folder / "samples.jsonl").read_bytes(),
        "curves": {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in curves},
        "texts": {tag: [event.step for event in events.Tensors(tag)] for tag in sorted(texts)},
        "best": read_checkpoint(folder / "checkpoints" / "best.ckpt")[1]["global_step"],
    }


@pytest.fixture(scope="module")
def undisturbed(
    phi_dir: Path, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, object]]:
    """What a run with these settings leaves that nobody stops; each is run once."""
    known: dict[str, dict[str, object]] = {}

    def outcome_with(**settings: object) -> dict[str, object]:
        key = json.dumps(settings)
        if key not in known:
            root = tmp_path_factory.mktemp("undisturbed")
            run(arguments("fit", root, phi_dir, files, **settings), root / "log")
            known[key] = outcome(root)
        return known[key]

    return outcome_with


SANITY = 12  # batches of the validation before training; each validation has as many
MAX_STEPS = {"trainer.max_steps": 3}


@pytest.mark.parametrize(
    ("phase", "call", "settings", "step"),
    [
        pytest.param("training", 8, {}, 2, id="inside a window"),
        pytest.param("validation", SANITY + 5, {}, 2, id="in a validation"),
        pytest.param("validation", 2 * SANITY + 1, {}, 4, id="in the validation at the end of an epoch"),
        pytest.param("validation", 4 * SANITY + 12, {}, 8, id="in the last validation"),
        pytest.param("validation", 2 * SANITY + 3, MAX_STEPS, 3, id="in the last validation, after max_steps"),
        pytest.param("generation", 10, {}, 2, id="in samples"),
        pytest.param("generation", 10, {"trainer.val_check_interval": 1.0}, 4, id="in samples at the end of an epoch"),
    ],
)
def test_a_stopped_run_saves_its_step_and_resumes_as_undisturbed(
    phase: str,
    call: int,
    settings: dict[str, object],
    step: int,
    phi_dir: Path,
    files: Path,
    tmp_path: Path,
    undisturbed: Callable[..., dict[str, object]],
) -> None:
    """The run continues by the command that it prints, in a folder whose name needs quotes."""
    root = tmp_path / "my runs"
    root.mkdir()
    result = stop(arguments("fit", root, phi_dir, files, **settings), root / "log", phase, call=call)
    result.check(signal.SIGTERM)
    assert f"stopped after optimizer step {step}, which is saved. To continue:" in result.output
    last = root / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)[1]["global_step"] == step

    command = shlex.split(result.output.strip().splitlines()[-1])
    assert command[:3] == ["python", "-m", "lit_phi2"]
    run(command[3:], root / "log")
    assert outcome(root) == undisturbed(**settings)


@pytest.mark.parametrize(
    ("subcommand", "phase", "message"),
    [
        ("validate", "validation", "Nothing was written"),
        ("test", "test", "Nothing was written"),
        ("test", "generation", "Nothing was written"),
        ("predict", "generation", "The same command continues"),
        ("predict", "reading", "The same command continues"),
    ],
)
def test_a_signal_ends_other_subcommands_within_seconds(
    subcommand: str, phase: str, message: str, phi_dir: Path, files: Path, tmp_path: Path
) -> None:
    number = signal.SIGINT if phase == "generation" else signal.SIGTERM
    result = stop(arguments(subcommand, tmp_path, phi_dir, files), tmp_path / "log", phase, number)
    result.check(number)
    assert message in result.output


def test_a_second_signal_ends_a_step_that_does_not_end(phi_dir: Path, files: Path, tmp_path: Path) -> None:
    """The first one waits for the micro-batch, which takes half an hour here."""
    act = Act("one long step", 1, tmp_path / "sent", signal.SIGINT)
    stopped = start(arguments("fit", tmp_path, phi_dir, files), tmp_path / "log", act=act)
    stopped.wait_until(lambda: "a second signal stops at once" in stopped.output)
    os.kill(stopped.pid, signal.SIGINT)
    assert stopped.wait() == -signal.SIGINT, stopped.output
