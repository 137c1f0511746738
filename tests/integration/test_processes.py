"""Several processes: the same steps as one process, every record once, and all end when one dies.

Float32 on a small Phi without dropout, so that only the order of summation differs. One run is started as a user does;
the others are forked instead, which takes no imports, and torchrun's agent and Lightning's launcher are the real ones.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked_acts import Act
from forked_child import Node
from forked_runs import Run, run, start, unused_port
from helpers import ROOT, TINY_CONFIG, relative_difference
from lit_phi2.adapters.checkpoint import read_checkpoint
from lit_phi2.cli.main import main
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


class Commands:
    """Command lines on a base, in one folder."""

    def __init__(self, base: Path, root: Path) -> None:
        self.base = base
        self.root = root
        self.version = root / "tiny" / "version_0"
        self.last = self.version / "checkpoints" / "last.ckpt"
        self.num_runs = 0

    def arguments(self, subcommand: str, *more: str, **changed: object) -> list[str]:
        """`changed` are settings of data and model, as data__predict_files."""
        settings = {"model.base": self.base, "trainer.default_root_dir": self.root, **SETTINGS}
        settings |= {name.replace("__", "."): value for name, value in changed.items()}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        return [subcommand, "--config", str(TINY_CONFIG), *flags, *more]

    def log(self) -> Path:
        self.num_runs += 1
        return self.root / f"log{self.num_runs}"

    def start(self, arguments: list[str], processes: int = 1, *, act: Act | None = None) -> Run:
        more = [f"--trainer.devices={processes}"]
        return start([*arguments, *more], self.log(), act=act, num_processes=processes)

    def run(self, arguments: list[str], processes: int = 1) -> str:
        return run([*arguments, f"--trainer.devices={processes}"], self.log(), num_processes=processes)

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(self.version)).Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    def assert_same_run(self, other: "Commands") -> None:
        adapter, expected = (
            load_file(commands.version / "adapter" / "adapter_model.safetensors") for commands in (self, other)
        )
        for name, weight in expected.items():
            assert relative_difference(adapter[name], weight) < TOLERANCE, name
        for tag in ("train/loss", "val/loss", "train/supervised_tokens", "train/grad_norm"):
            actual, reference = self.scalars(tag), other.scalars(tag)
            assert [step for step, _ in actual] == [step for step, _ in reference], tag
            assert [value for _, value in actual] == pytest.approx([value for _, value in reference], rel=1e-4), tag


def windows_of(micro_batches: int) -> str:
    return f"--trainer.accumulate_grad_batches={micro_batches}"


@pytest.fixture
def commands(claims_phi_dir: Path, tmp_path: Path) -> Commands:
    return Commands(claims_phi_dir, tmp_path)


@pytest.fixture(scope="module")
def single_process(claims_phi_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """A run of one process: seven micro-batches in accumulation windows of four and three, twice."""
    single = Commands(claims_phi_dir, tmp_path_factory.mktemp("single"))
    single.run(single.arguments("fit", windows_of(4)))
    assert len(single.scalars("train/loss")) == 4
    return single


@pytest.mark.parametrize(("processes", "accumulate", "forked"), [(2, 2, False), (4, 1, True)])
def test_several_processes_take_the_steps_of_one(
    processes: int, accumulate: int, forked: bool, single_process: Commands, commands: Commands
) -> None:
    """Also where the last window is shorter; with one run folder and one set of samples."""
    arguments = commands.arguments("fit", windows_of(accumulate))
    output = commands.run(arguments, processes) if forked else run_as_a_user([*arguments, "--trainer.devices=2"])
    commands.assert_same_run(single_process)
    assert output.count("run folder:") == 1
    assert [folder.name for folder in (commands.root / "tiny").iterdir()] == ["version_0"]
    samples, expected = (run.version / "samples.jsonl" for run in (commands, single_process))
    assert len(samples.read_text().splitlines()) == len(expected.read_text().splitlines())


def test_two_processes_in_8_bits_take_the_steps_of_one(claims_phi_dir: Path, tmp_path: Path) -> None:
    """Weights that differ in their last bits may round an input to the other side: later steps are near."""
    runs = [Commands(claims_phi_dir, tmp_path / name) for name in ("one", "two")]
    for number, commands in enumerate(runs, 1):
        commands.root.mkdir()
        more = [windows_of(4 // number), "--model.quantization=int8"]
        commands.run(commands.arguments("fit", *more), number)
    losses, expected = ([value for _, value in commands.scalars("train/loss")] for commands in reversed(runs))
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-3)
    one, two = (commands.scalars("val/loss")[-1][1] for commands in runs)
    assert two == pytest.approx(one, rel=1e-3)


def run_as_a_user(arguments: list[str]) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "lit_phi2", *arguments],
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_torchrun_on_two_nodes_takes_the_steps_of_one(single_process: Commands, commands: Commands) -> None:
    port = unused_port()
    arguments = commands.arguments("fit", windows_of(1), "--trainer.devices=2", "--trainer.num_nodes=2")
    nodes = [start(arguments, commands.log(), node=Node(rank, port)) for rank in range(2)]
    assert [node.wait() for node in nodes] == [0, 0], [node.output for node in nodes]
    commands.assert_same_run(single_process)


def test_every_record_is_completed_and_measured_once(single_process: Commands, commands: Commands) -> None:
    adapter = ["--ckpt_path", str(single_process.version / "adapter")]
    files, metrics = [], []
    for processes in (1, 2):
        files.append(commands.root / f"{processes}.jsonl")
        commands.run(commands.arguments("predict", *adapter, "--output", str(files[-1])), processes)
        output = commands.run(commands.arguments("test", *adapter), processes)
        metrics.append(dict(re.findall(r"(?m)^(test/\w+) ([\d.]+)$", output)))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_bytes().splitlines()) == 40
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert float(metrics[1][name]) == pytest.approx(float(value), rel=1e-4), name


def test_more_processes_than_records_predict_and_measure(commands: Commands) -> None:
    """One record: all processes but one have none."""
    one = {f"data__{name}_files": "claims:test[:1]" for name in ("predict", "test")}
    files = [commands.root / "1.jsonl", commands.root / "4.jsonl"]
    for file in files:
        commands.run(commands.arguments("predict", "--output", str(file), **one), int(file.stem))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().count(b"\n") == 1
    outputs = [commands.run(commands.arguments("test", **one), processes) for processes in (1, 2)]
    losses = [re.findall(r"(?m)^test/loss ([\d.]+)$", output) for output in outputs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


def test_a_killed_predict_continues_on_more_processes_than_batches(commands: Commands) -> None:
    """Each of two processes has 35 records and 32 slots; it is killed with the last 3 in work, and four continue."""
    settings = {"data__predict_files": "claims:test[:70]", "model__max_new_tokens": 16, "model__max_slots": 32}
    expected, out = commands.root / "expected.jsonl", commands.root / "out.jsonl"
    commands.run(commands.arguments("predict", "--output", str(expected), **settings))
    predict = commands.arguments("predict", "--output", str(out), **settings)
    halt = Act("generation", 20, commands.root / "halted")
    halted = commands.start(predict, 2, act=halt)
    halted.wait_until(halt.mark_of(0).is_file)
    halted.kill()
    assert not out.exists()
    assert list(commands.root.glob("out.jsonl.*.part*"))
    commands.run(predict, 4)
    assert out.read_bytes() == expected.read_bytes()
    assert not list(commands.root.glob("out.jsonl.*"))


def test_one_command_at_a_time_continues_a_run(single_process: Commands, commands: Commands) -> None:
    """The first is halted, so that it cannot end before the second asks; then it is killed, as by a lost machine."""
    fit = commands.arguments("fit", windows_of(4))
    halt = Act("training", 6, commands.root / "halted")
    first = commands.start(fit, act=halt)
    first.wait_until(halt.mark_of(0).is_file)
    assert commands.last.is_file()
    second = commands.start([*fit, "--ckpt_path", "last"])
    code = second.wait()
    first.kill()
    assert code == 2, second.output
    assert f"error: --ckpt_path {commands.last}: another fit trains this run now." in second.output
    assert "Traceback" not in second.output
    commands.run([*fit, "--ckpt_path", "last"])
    commands.assert_same_run(single_process)


def test_a_killed_rank_ends_the_run_and_one_process_resumes_it(single_process: Commands, commands: Commands) -> None:
    """In its fourth micro-batch, which is in the second window."""
    kill = Act("training", 4, commands.root / "killed", signal.SIGKILL, rank=1)
    killed = commands.start(commands.arguments("fit", windows_of(2)), 2, act=kill)
    assert killed.wait() != 0, killed.output
    assert "another process of this run died" in killed.output
    assert "Traceback" not in killed.output

    resume = ["fit", "--config", str(commands.version / "config.yaml"), "--ckpt_path", str(commands.last)]
    refused = commands.start([*resume, windows_of(3)])
    assert refused.wait() == 2
    assert "rows_per_step: 4 in the checkpoint, 3 now" in refused.output
    assert "data.batch_size 1 x trainer.accumulate_grad_batches 3 x 1 processes" in refused.output
    commands.run([*resume, windows_of(4)])
    commands.assert_same_run(single_process)


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


def test_all_ranks_refuse_what_rank_zero_refuses(single_process: Commands, commands: Commands, tmp_path: Path) -> None:
    """Two processes without an agent that would end the second, which would otherwise wait for the first."""
    run_dir = tmp_path / "changed"
    shutil.copytree(single_process.version, run_dir)
    with (run_dir / "config.yaml").open("a") as file:
        file.write("# changed\n")
    for subcommand in ("test", "fit"):
        checkpoint = run_dir / "checkpoints" / "last.ckpt"
        flags = commands.arguments(subcommand, windows_of(2), "--trainer.devices=2", f"--ckpt_path={checkpoint}")
        port = str(unused_port())
        ranks = []
        for rank in ("0", "1"):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2"}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
            ranks.append(start(flags, commands.log(), variables=variables))
        assert [rank.wait(120) for rank in ranks] == [2, 2], [rank.output for rank in ranks]
        assert "config.yaml changed since provenance.json was written" in ranks[0].output
        assert "error" not in ranks[1].output


def test_strategies_other_than_ddp_are_refused(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(commands.arguments("fit", "--trainer.strategy=ddp_spawn", "--trainer.devices=2")) == 2
    assert "Use auto or ddp" in capsys.readouterr().err


@pytest.mark.parametrize("to_all", [True, False])
def test_processes_stop_together_inside_a_validation(to_all: bool, commands: Commands) -> None:
    """SLURM and Ctrl-C reach every process, `kill` only the first; in the second of three batches that each has."""
    settings = {"data__packing": "false", "trainer__num_sanity_val_steps": 0, "trainer__val_check_interval": 2}
    stop = Act("validation", 2, commands.root / "stopped", signal.SIGTERM, to_all=to_all)
    stopped = commands.start(commands.arguments("fit", windows_of(1), **settings), 2, act=stop)
    assert stopped.wait() == 143, stopped.output
    assert "stopped after optimizer step 2, which is saved" in stopped.output, stopped.output
    assert stopped.output.count("stopped after") == 1
    assert "another process" not in stopped.output
    assert "Traceback" not in stopped.output
    checkpoint = read_checkpoint(commands.last)[1]
    assert checkpoint["global_step"] == 2
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["validation_due"]
