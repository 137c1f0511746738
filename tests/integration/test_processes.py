"""Several processes: the same steps as one process, every record once, and all end when one dies.

Each run is started as a user does, on the packaged tiny Phi in float32. It has no dropout, so only the order of
summation differs.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import ROOT, TINY_CONFIG, relative_difference
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.utils.console import set_up_logging

TOLERANCE = 2e-5  # relative norm after four AdamW steps; measured: 2.1e-6 with two processes, 1.3e-5 with four
SETTINGS = {
    "data.train_files": "claims:train[:23]",
    "data.val_files": "claims:validation[:6]",
    "data.predict_files": "claims:test[:40]",
    "data.test_files": "claims:test[:5]",
    "model.dtype": "float32",
    "model.max_new_tokens": 4,
    "model.lora_r": 2,
    "model.lora_alpha": 4,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 2,
    "trainer.val_check_interval": 1.0,
    "trainer.enable_progress_bar": "false",
    "checkpoint.every_n_steps": 1,
}

pytestmark = pytest.mark.slow


def command(
    subcommand: str, root: Path, *more: str, launch: Sequence[str] = (sys.executable,), **changed: object
) -> list[str]:
    """A command line; `changed` are settings of its data and model, as data__predict_files."""
    settings = {"trainer.default_root_dir": root, **SETTINGS}
    settings |= {name.replace("__", "."): value for name, value in changed.items()}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return [*launch, "-m", "lit_phi2", subcommand, "--config", str(TINY_CONFIG), *flags, *more]


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(arguments: list[str]) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def devices(processes: int, accumulate: int) -> list[str]:
    return [f"--trainer.devices={processes}", f"--trainer.accumulate_grad_batches={accumulate}"]


def scalars(root: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(root / "tiny" / "version_0")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def assert_same_run(root: Path, other: Path) -> None:
    adapter, expected = (
        load_file(folder / "tiny" / "version_0" / "adapter" / "adapter_model.safetensors") for folder in (root, other)
    )
    for name, weight in expected.items():
        assert relative_difference(adapter[name], weight) < TOLERANCE, name
    for tag in ("train/loss", "val/loss", "train/supervised_tokens", "train/grad_norm"):
        actual, reference = scalars(root, tag), scalars(other, tag)
        assert [step for step, _ in actual] == [step for step, _ in reference], tag
        assert [value for _, value in actual] == pytest.approx([value for _, value in reference], rel=1e-4), tag


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process: seven micro-batches in accumulation windows of four and three, twice."""
    root = tmp_path_factory.mktemp("single")
    run(command("fit", root, *devices(1, 4)))
    assert len(scalars(root, "train/loss")) == 4
    return root


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 2), (4, 1)])
def test_several_processes_take_the_steps_of_one(
    processes: int, accumulate: int, single_process: Path, tmp_path: Path
) -> None:
    """Also where the last window is shorter; with one run folder and one set of samples."""
    output = run(command("fit", tmp_path, *devices(processes, accumulate)))
    assert_same_run(tmp_path, single_process)
    assert output.count("run folder:") == 1
    assert [folder.name for folder in (tmp_path / "tiny").iterdir()] == ["version_0"]
    samples, expected = (root / "tiny" / "version_0" / "samples.jsonl" for root in (tmp_path, single_process))
    assert len(samples.read_text().splitlines()) == len(expected.read_text().splitlines())


def test_torchrun_on_two_nodes_takes_the_steps_of_one(single_process: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    nodes = []
    for node in range(2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}"]
        launch += ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
        nodes.append(start(command("fit", tmp_path, *devices(2, 1), "--trainer.num_nodes=2", launch=launch)))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same_run(tmp_path, single_process)


def test_every_record_is_completed_and_measured_once(single_process: Path, tmp_path: Path) -> None:
    adapter = str(single_process / "tiny" / "version_0" / "adapter")
    files, metrics = [], []
    for processes in (1, 2):
        files.append(tmp_path / f"{processes}.jsonl")
        more = [*devices(processes, 1), "--ckpt_path", adapter]
        run(command("predict", tmp_path, *more, "--output", str(files[-1])))
        output = run(command("test", tmp_path, *more))
        metrics.append(dict(re.findall(r"(?m)^(test/\w+) ([\d.]+)$", output)))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_bytes().splitlines()) == 40
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert float(metrics[1][name]) == pytest.approx(float(value), rel=1e-4), name


def test_more_processes_than_records_predict_and_measure(tmp_path: Path) -> None:
    """One record: all processes but one have none."""
    one = {f"data__{name}_files": "claims:test[:1]" for name in ("predict", "test")}
    files = [tmp_path / "1.jsonl", tmp_path / "4.jsonl"]
    for file in files:
        run(command("predict", tmp_path, *devices(int(file.stem), 1), "--output", str(file), **one))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().count(b"\n") == 1
    outputs = [run(command("test", tmp_path, *devices(processes, 1), **one)) for processes in (1, 2)]
    losses = [re.findall(r"(?m)^test/loss ([\d.]+)$", output) for output in outputs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


def test_a_killed_predict_continues_on_more_processes_than_batches(tmp_path: Path) -> None:
    """70 records are three batches; two processes are killed after the first, and four continue."""
    settings = {"data__predict_files": "claims:test[:70]", "model__max_new_tokens": 16}
    expected, out = tmp_path / "expected.jsonl", tmp_path / "out.jsonl"
    run(command("predict", tmp_path, "--output", str(expected), **settings))
    process = start(command("predict", tmp_path, *devices(2, 1), "--output", str(out), **settings))
    while not list(tmp_path.glob("out.jsonl.*.part*")) and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    run(command("predict", tmp_path, *devices(4, 1), "--output", str(out), **settings))
    assert out.read_bytes() == expected.read_bytes()
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_one_command_at_a_time_continues_a_run(single_process: Path, tmp_path: Path) -> None:
    """The first is halted, so that it cannot end before the second asks; then it is killed, as by a lost machine."""
    process = start(command("fit", tmp_path, *devices(1, 4)))
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    resume = command("fit", tmp_path, *devices(1, 4), "--ckpt_path", "last")
    second = start(resume)
    output, _ = second.communicate(timeout=100)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert second.returncode == 2
    assert f"error: --ckpt_path {last}: another fit trains this run now." in output
    assert "Traceback" not in output
    run(resume)
    assert_same_run(tmp_path, single_process)


def test_a_killed_rank_ends_the_run_and_one_process_resumes_it(single_process: Path, tmp_path: Path) -> None:
    process = start(command("fit", tmp_path, *devices(2, 2)))
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "another process of this run died" in output, output
    assert "Traceback" not in output

    config = str(tmp_path / "tiny" / "version_0" / "config.yaml")
    resume = [sys.executable, "-m", "lit_phi2", "fit", "--config", config, "--ckpt_path", str(last)]
    refused = start([*resume, *devices(1, 3)])
    message, _ = refused.communicate(timeout=100)
    assert refused.returncode == 2
    assert "rows_per_step: 4 in the checkpoint, 3 now" in message
    assert "data.batch_size 1 x trainer.accumulate_grad_batches 3 x 1 processes" in message
    run([*resume, *devices(1, 4)])
    assert_same_run(tmp_path, single_process)


def test_a_dead_process_is_reported_before_the_run_is_killed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's observer kills the run without a message, perhaps before a collective fails."""
    set_up_logging(rank=0)
    kills: list[tuple[int, int]] = []
    monkeypatch.setattr(subprocess_script.os, "kill", lambda *args: kills.append(args))
    dead = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    dead.wait()
    assert subprocess_script._ChildProcessObserver(12345, [dead])._run()
    assert kills == [(12345, signal.SIGKILL)]
    assert "error: another process of this run died. The last checkpoint is intact" in capsys.readouterr().err


def test_strategies_other_than_ddp_are_refused(tmp_path: Path) -> None:
    process = start(command("fit", tmp_path, "--trainer.strategy=ddp_spawn", "--trainer.devices=2"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "Use auto or ddp" in output


@pytest.mark.parametrize("to_all", [True, False])
def test_processes_stop_together_inside_a_validation(to_all: bool, tmp_path: Path) -> None:
    """SLURM and Ctrl-C reach every process, `kill` only the first. The validation after step 2 lasts half a minute."""
    settings = {
        "data__val_files": "claims:validation",
        "data__packing": "false",
        "trainer__num_sanity_val_steps": 0,
        "trainer__val_check_interval": 2,
    }
    process = start(command("fit", tmp_path, *devices(2, 1), **settings))
    last = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"  # written after step 1
    deadline = time.monotonic() + 200
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4)
    stopped = time.monotonic()
    if to_all:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert time.monotonic() - stopped < 20
    assert "stopped after optimizer step 2, which is saved" in output, output
    assert output.count("stopped after") == 1
    assert "another process" not in output
    assert "Traceback" not in output
    checkpoint = read_checkpoint(last)[1]
    assert checkpoint["global_step"] == 2
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["validation_due"]
