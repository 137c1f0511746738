"""What Windows and macOS lack is missed nowhere: every module imports, and a run trains, predicts and resumes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT

# Windows has neither module, opens no folder, and lacks these functions and signals. The dependencies know which system
# they are on, and psutil needs resource on Linux, so they are imported before.
LIKE_WINDOWS = """
import importlib, json, os, pkgutil, signal, sys
import datasets, lightning.pytorch, peft, psutil, tensorboard, torch, transformers
for name in ("fcntl", "resource"):
    sys.modules[name] = None
system_open = os.open
def open_files_only(path, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return system_open(path, *args, **options)
os.open = open_files_only
for name in ("sysconf", "sched_getaffinity", "uname", "getuid", "killpg", "getpgid", "fork", "mkfifo"):
    delattr(os, name)
for name in ("SIGHUP", "SIGCHLD", "SIGALRM"):
    delattr(signal, name)
"""
IMPORT_ALL = """
import lit_phi2
for module in pkgutil.walk_packages(lit_phi2.__path__, "lit_phi2."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
RUN = """
from lit_phi2.cli.main import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    if code:
        sys.exit(f"{arguments[0]}: {code}")
"""


@pytest.mark.slow
def test_imports_and_runs_need_nothing_that_windows_lacks(
    phi_dir: Path, record_rows: list[dict[str, str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Of every module; the process then trains, resumes, measures and predicts."""
    file = write_jsonl(list(record_rows))
    settings = [f"--data.{name}_files={file}" for name in ("train", "val", "test", "predict")]
    settings += [f"--model.base={phi_dir}", "--model.max_new_tokens=2", "--run_name=small"]
    settings += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    settings += [f"--trainer.default_root_dir={tmp_path / 'runs'}", "--data.max_length=128"]
    commands = [[name, *settings] for name in ("fit", "validate", "test", "predict")]
    commands[1:1] = [["fit", *settings, "--ckpt_path", "last"]]
    program = [sys.executable, "-c", LIKE_WINDOWS + IMPORT_ALL + RUN, json.dumps(commands)]
    process = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "small"
    assert (folder / "version_0" / "adapter" / "adapter_model.safetensors").is_file()
    assert len((folder / "base" / "predictions.jsonl").read_bytes().splitlines()) == 12
    assert not list(tmp_path.rglob("*.lock"))
