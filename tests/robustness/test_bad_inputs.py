"""Mistakes of a new user: exit code 2, and a few lines that name the location and the fix.

Each case runs a whole command line in this process. None reaches training; those of the data do not load the base.
"""

import json
import logging
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_phi2.cli.main import main

TINY_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SECRET = "Zanzibar"  # in every text of every record below; it is never printed

GOOD = {"id": "g1", "instruction": f"Why was {SECRET} denied?", "response": f"{SECRET} is included (café)."}


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets up logging and warnings for a process of its own."""
    monkeypatch.delenv("LIT_PHI2_TRACEBACK", raising=False)
    logger = logging.getLogger("lit_phi2")
    before = logger.handlers[:], logger.level, logger.propagate
    with warnings.catch_warnings():
        yield
    logger.handlers[:], logger.level, logger.propagate = before


@dataclass
class CliResult:
    """Exit code and output of a command, and where its runs would be."""

    code: int
    stdout: str
    stderr: str
    runs: Path

    def check(self, *expected: str) -> None:
        """Exit code 2; at most 8 lines with every expected text; no traceback, no usage, no text of a record."""
        assert self.code == 2, self.stderr
        lines = self.stderr.strip().splitlines()
        assert 0 < len(lines) <= 8, self.stderr
        assert "error: " in self.stderr
        for text in expected:
            assert text in self.stderr
        for unwanted in ("Traceback", "usage:", "<class", SECRET):
            assert unwanted not in self.stderr + self.stdout


@pytest.fixture
def fit(
    phi_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CliResult]:
    """Runs fit with configs/tiny.yaml on the small base, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> CliResult:
        runs = tmp_path / "runs"
        flags: dict[str, object] = {"--config": TINY_CONFIG, "--trainer.default_root_dir": runs}
        flags |= {"--model.base": phi_dir, "--data.max_length": 512}  # the context of the small base
        fixed = [
            part
            for flag, value in flags.items()
            if flag not in arguments or flag == "--config"
            for part in (flag, value)
        ]
        code = main(["fit", *map(str, fixed), *map(str, arguments)])
        captured = capsys.readouterr()
        return CliResult(code, captured.out, captured.err, runs)

    return run


Fit = Callable[..., CliResult]


# Records: line 2 of a file, after a good record; then what stderr must contain besides its location

FIX = "Fix it, or set data.on_bad_record to 'skip'"
INVALID_RECORDS: dict[str, tuple[object, list[str]]] = {
    "not JSON": (f'{{"instruction": "{SECRET}" "response"', ["is not valid JSON", "expected one object on the line"]),
    "not UTF-8": (f'{{"instruction": "{SECRET}\xe9"}}'.encode("latin-1"), ["is not UTF-8", "Save it as UTF-8"]),
    "not an object": ([SECRET, SECRET], ["is a list; expected an object with the fields of a record"]),
    "missing field": (
        {"instruction": SECRET},
        ["has no field 'response'; it has 'instruction'", "data.*_field renames"],
    ),
    "empty field": ({"instruction": "", "response": SECRET}, ["field 'instruction' is empty; expected text"]),
    "blank field": ({"instruction": SECRET, "response": " \n"}, ["field 'response' is blank; expected text"]),
    "field that is not text": (
        {"instruction": SECRET, "response": {SECRET: SECRET}},
        ["field 'response' is an object; expected text"],
    ),
    "response too long": (
        {"instruction": SECRET, "response": f"{SECRET} " * 512},
        ["tokens, EOS included; the limit is 512", "Raise data.max_length, or shorten the record"],
    ),
    "duplicate id": ({**GOOD, "instruction": SECRET}, ["its id was already used at ", ":1; ids must be unique"]),
    "header in a field": (
        {"instruction": SECRET, "response": f"{SECRET}\n### Response:\n{SECRET}"},
        ["field 'response' has a line that begins with '### Response:'", "Reword or indent it"],
    ),
}


@pytest.mark.parametrize("kind", INVALID_RECORDS)
def test_an_invalid_record_is_reported_with_path_line_and_fix(kind: str, fit: Fit, tmp_path: Path) -> None:
    record, expected = INVALID_RECORDS[kind]
    line = record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
    path = tmp_path / "claims.jsonl"
    # Characters as they are: where no line has any beyond ASCII, one that is not UTF-8 is another encoding.
    path.write_bytes(json.dumps(GOOD, ensure_ascii=False).encode() + b"\n" + line + b"\n")
    result = fit("--data.train_files", path)
    result.check(f"{path}:2: ", "1 invalid record in data.train_files", FIX, *expected)
    assert not result.runs.exists(), "invalid data creates no run folder"


def test_all_invalid_records_are_reported_at_once(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{SECRET} {n}"}) + "\n" for n in range(5)), "utf-8")
    fit("--data.train_files", path).check(*[f"{path}:{line}: " for line in range(1, 6)], "5 invalid records")


def test_an_invalid_val_record_is_reported_before_training(fit: Fit, write_jsonl: Callable[..., Path]) -> None:
    train, val = write_jsonl([GOOD], "train.jsonl"), write_jsonl([GOOD, {"instruction": SECRET}], "val.jsonl")
    result = fit("--data.train_files", train, "--data.val_files", val)
    result.check(f"{val}:2: has no field 'response'", "1 invalid record in data.val_files")
    assert not result.runs.exists()


# Files

BAD_FILES: dict[str, tuple[str, str | None, list[str]]] = {
    "missing": ("claims.jsonl", None, ["claims.jsonl: no such file. Paths are taken from the folder you are in, "]),
    "empty": ("claims.jsonl", "\n", ["claims.jsonl: is empty; expected at least one record"]),
    "other columns": (
        "claims.csv",
        f"question,answer\n{SECRET},{SECRET}\n",
        ["claims.csv: has no columns of a known form; its columns are 'question', 'answer'", "data.instruction_field"],
    ),
    "other format": (
        "claims.txt",
        SECRET,
        ["unknown format '.txt'; expected a file ending in .jsonl, .ndjson, .json, "],
    ),
    "broken array": (
        "claims.json",
        f'[\n{{"instruction" "{SECRET}"}}]',
        ["claims.json:2: is not valid JSON", "expected"],
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_reported_with_its_path_and_fix(kind: str, fit: Fit, tmp_path: Path) -> None:
    name, content, expected = BAD_FILES[kind]
    path = tmp_path / name
    if content is not None:
        path.write_text(content, "utf-8")
    result = fit("--data.train_files", path)
    result.check(str(path), *expected)
    assert not result.runs.exists()


# Configs: a file, then what stderr must contain besides its path

BAD_CONFIGS: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("data:\n  batchsize: 2\n", ["unknown key 'data.batchsize'. Did you mean 'data.batch_size'?"]),
    "key of another section": ("data:\n  lora_r: 2\n", ["unknown key 'data.lora_r'. Did you mean 'model.lora_r'?"]),
    "key without its section": ("max_epochs: 2\n", ["unknown key 'max_epochs'. Did you mean 'trainer.max_epochs'?"]),
    "unknown section": ("optimizer:\n  lr: 2\n", ["unknown key 'optimizer'"]),
    "empty section": ("model:\n", ["section 'model' has no keys; give it at least one, or remove it"]),
    "not YAML": ("model: [\n", ["is not valid YAML", "line 2"]),
    "not keys": ("- model\n", ["has no keys; expected sections such as model:, data: and trainer:"]),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_bad_config_is_reported_with_path_key_and_fix(kind: str, fit: Fit, tmp_path: Path) -> None:
    content, expected = BAD_CONFIGS[kind]
    path = tmp_path / "mine.yaml"
    path.write_text(content, "utf-8")
    result = fit("--config", path)
    result.check(f"{path}: ", *expected)
    assert not result.runs.exists()


def test_a_missing_config_lists_the_packaged_ones(fit: Fit) -> None:
    fit("--config", "mine.yaml").check("--config mine.yaml: no such file", "tiny.yaml")


def test_a_wrong_type_in_a_config_is_reported_with_its_key(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_epochs: many\n", "utf-8")
    fit("--config", tmp_path / "mine.yaml").check('"trainer.max_epochs"', "Expected one of int, null. Got value: many")


# Flags

BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["--model.lora_rank", "2"], ["--model.lora_rank", "Did you mean 'model.lora_r'?"]),
    "wrong type": (["--model.lora_r", "abc"], ['"model.lora_r"', "Expected int. Got value: abc"]),
    "rank of zero": (["--model.lora_r", "0"], ["model.lora_r: 0 is less than 1"]),
    "unknown choice": (
        ["--data.on_overlong", "cut"],
        ["data.on_overlong: 'cut'", "expected 'truncate', 'skip' or 'error'"],
    ),
    "LoRA target that is part of Wqkv": (
        ["--model.target_modules", "[q_proj, fc1]"],
        ["model.target_modules: 'q_proj' names no linear layer", "Wqkv, fc1, fc2", "name Wqkv"],
    ),
    "LoRA target that does not exist": (
        ["--model.target_modules", "[Wqkv, gate]"],
        ["model.target_modules: 'gate' names no linear layer of this base; a block has dense, Wqkv, fc1, fc2"],
    ),
    "a dtype that no device has": (["--model.dtype", "float8"], ["model.dtype: 'float8' is unknown"]),
    "an unknown quantization": (["--model.quantization", "nf4"], ["model.quantization: is 'nf4'; expected int8"]),
    "Lightning's mixed precision": (
        ["--trainer.precision", "bf16-mixed"],
        ["trainer.precision: bf16-mixed", "model.dtype (auto, bfloat16, float16 or float32)"],
    ),
    "unknown accelerator": (["--trainer.accelerator", "gpux"], ["trainer.accelerator: 'gpux' is unknown", "auto, cpu"]),
    "negative seed": (["--seed_everything", "-1"], ["seed_everything: -1 is not between 0 and 4294967295"]),
    "unknown base": (
        ["--model.base", "phi2"],
        ["model.base: 'phi2' is neither a folder nor a hub id", "hf download microsoft/phi-2", "--model.base tiny"],
    ),
    "examples longer than the context of the base": (
        ["--data.max_length", "513"],
        ["data.max_length: 513 is more than the 512 positions of base"],
    ),
    "missing checkpoint": (
        ["--ckpt_path", "nowhere.ckpt"],
        ["--ckpt_path nowhere.ckpt: does not exist; expected"],
    ),
    "no run to continue": (["--ckpt_path", "last"], ["--ckpt_path last: no run of 'tiny' under", "Train one with fit"]),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_a_bad_flag_is_reported_with_its_key_and_fix(kind: str, fit: Fit) -> None:
    flags, expected = BAD_FLAGS[kind]
    fit(*flags).check(*expected)


def test_a_missing_base_fails_fast_without_a_network(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """getaddrinfo fails, as on a machine without network. Pauses before retries would take minutes."""

    def getaddrinfo(*address: object, **options: object) -> None:
        requested.append(address[0])
        raise socket.gaierror(socket.EAI_AGAIN, "no network in this test")

    requested: list[object] = []
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = fit("--model.base", "acme/no-such-phi")
    result.check(
        "model.base: 'acme/no-such-phi' is not on this machine", "hf download microsoft/phi-2", "/path/to/phi-2"
    )
    assert 0 < len(requested) < 20, "the download was tried"
    assert sum(pauses) < 10


def test_a_folder_without_a_model_names_the_missing_file(fit: Fit, tmp_path: Path) -> None:
    fit("--model.base", tmp_path).check(f"model.base: {tmp_path} has no config.json", "hf download microsoft/phi-2")


def test_a_model_of_another_type_is_named(fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    fit("--model.base", tmp_path).check(f"{tmp_path}/config.json: model_type is 'llama'; expected 'phi', as Phi-2 is")


def test_an_environment_variable_shows_the_traceback(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PHI2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        fit("--data.train_files", "nowhere.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.input_field", "contxt"], "data.input_field: no record has a field 'contxt'"),
        (
            ["--data.val_fraction", "0.3", "--data.val_files", "claims:validation"],
            "data.val_fraction: 0.3 has no effect",
        ),
        (["--model.weight_decay", "-1"], "model.weight_decay"),
        (["--model.lora_alpha", "0"], "model.lora_alpha"),
        (["--run_name", "../elsewhere"], "run_name: '../elsewhere' is not a valid folder name"),
        (["--trainer.num_sanity_val_steps", "1"], "trainer.num_sanity_val_steps: must be -1"),
        (
            ["--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"],
            "trainer.strategy: DDPStrategy is not supported here",
        ),
        (["--model.adapter", "nowhere"], "--model.adapter nowhere: does not exist"),
        (["--ckpt_path", "last"], "--ckpt_path last: no run of"),
        (
            ["--trainer.callbacks", '{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}'],
            "EarlyStopping monitors 'val_loss', which is not measured. Did you mean 'val/loss'?",
        ),
        (["more.yaml"], "Did you mean --config more.yaml?"),
    ],
)
def test_settings_without_effect_or_failing_late_are_refused(
    arguments: list[str], message: str, phi_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.accelerator", "cpu"]
    root += ["--data.max_length", "512"]  # the context of the small base
    assert main(["fit", "--config", str(TINY_CONFIG), "--model.base", str(phi_dir), *root, *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "runs").exists()
