"""Verifying: what `verify` compares that needs the data or another run.

files of the config, salt      ->  ledger written again       compared with ledger.parquet, row by row
config.yaml of the run         ->  fit in a process of its own  ->  its adapter, compared bit by bit
FILE                           ->  records                    looked up in the ledger
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import lit_phi2
from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.audit.ledger import KEY_FILE, LEDGER_FILE, StepsTaken, read_key, write_ledger
from lit_phi2.audit.provenance import CONFIG_FILE, PROVENANCE_FILE, read_statement
from lit_phi2.audit.verify import Finding, look_up, verify_dependencies, verify_files
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.records import iter_records
from lit_phi2.data.sources import expand_sources
from lit_phi2.errors import InputError, VerificationError
from lit_phi2.training.resume import adapter_digest
from lit_phi2.utils.console import print_text
from lit_phi2.utils.paths import GGUF_SUFFIX, expand_user, run_dir_of

log = logging.getLogger(__name__)


def print_record_uses(datamodule: ClaimsDataModule, file: str, ckpt_path: Path) -> None:
    """Print a JSON object for each record of a file, and log how many have each status; see `record_uses`."""
    counts: Counter[str] = Counter()
    for use in record_uses(datamodule, file, ckpt_path):
        counts[use["status"]] += 1
        print_text(json.dumps(use, ensure_ascii=False))
    log.info("%s", ", ".join(f"{status}: {count:,}" for status, count in counts.items()))


def print_verification(
    ckpt_path: Path, base: str, datamodule: ClaimsDataModule, *, public_key: Path | None, replay_run: bool
) -> None:
    """Print a line for each thing that was checked; the arguments are those of `verify`.

    Raises:
        VerificationError: names everything that is not what the provenance says.
    """
    findings = verify(ckpt_path, base, datamodule, public_key=public_key, replay_run=replay_run)
    for finding in findings:
        print_text(f"{finding.state:<12} {finding.name}{f': {finding.detail}' if finding.detail else ''}")
    if faults := [finding.name for finding in findings if finding.is_fault]:
        raise VerificationError(f"{ckpt_path}: is not what its provenance says: {', '.join(faults)}.")


def verify(
    ckpt_path: Path, base: str, datamodule: ClaimsDataModule, *, public_key: Path | None, replay_run: bool
) -> list[Finding]:
    """Everything that can be checked of an adapter, an export or a run.

    Args:
        ckpt_path: a checkpoint, or a folder with an adapter, an export or a run.
        base: model.base.
        datamodule: of the config, with its Trainer.
        public_key: of the key that signed an export.
        replay_run: also train the run again.

    Raises:
        InputError: there is no provenance, or a part cannot be checked.
    """
    folder = ckpt_path if (ckpt_path / PROVENANCE_FILE).is_file() else run_dir_of(ckpt_path)
    statement = read_statement(folder)
    if statement is None:
        raise InputError(
            f"--ckpt_path {ckpt_path}: {folder} has no {PROVENANCE_FILE}: its run has not ended, or an older lit_phi2 "
            "wrote it. A run that is continued with fit --ckpt_path, and every export, has one."
        )
    predicate = statement["predicate"]
    findings = [*verify_files(folder, statement, public_key), *verify_dependencies(predicate, base)]
    has_ledger = any(finding.name == LEDGER_FILE and finding.state == "ok" for finding in findings)
    if has_ledger and (folder / KEY_FILE).is_file():  # the folder of a run
        settings = predicate["buildDefinition"].get("internalParameters", {}).get("settings", {})
        findings.append(verify_data(datamodule, folder, settings))
    if replay_run:
        findings.append(replay(run_dir_of(ckpt_path) if ckpt_path.is_file() else folder, predicate))
    return findings


def record_uses(datamodule: ClaimsDataModule, file: str, ckpt_path: Path) -> Iterator[dict[str, Any]]:
    """What each record of a file was used for.

    Args:
        datamodule: reads the file as it reads its own.
        file: --record.
        ckpt_path: the checkpoint or adapter.
    """
    sources = expand_sources([str(expand_user(file, "--record")) if file.startswith("~") else file])
    records = iter_records(sources, datamodule.read_options, needs_response=False)
    return look_up(records, run_dir_of(ckpt_path), steps_of(ckpt_path))


def steps_of(ckpt_path: Path) -> int | None:
    """The optimizer steps of a checkpoint, or of an adapter by its provenance; None if nothing tells."""
    if ckpt_path.is_file() and ckpt_path.suffix != GGUF_SUFFIX:
        return int(read_checkpoint(ckpt_path)[1]["global_step"])
    statement = read_statement(ckpt_path if ckpt_path.is_dir() else ckpt_path.parent)
    return statement["predicate"].get("training", {}).get("steps") if statement else None


# Data


def verify_data(datamodule: ClaimsDataModule, run_dir: Path, run: Mapping[str, Any]) -> Finding:
    """Whether the records are still those of the ledger: it is written again, and must be the same file.

    Args:
        datamodule: of the run's config, with its Trainer.
        run_dir: the folder of the run.
        run: its fingerprint, from the provenance.
    """
    try:
        datamodule.read("fit")
    except InputError as error:
        return Finding("data", "changed", str(error).splitlines()[0])
    splits = {name: datamodule.splits[name] for name in ("train", "val")}
    for name, split in splits.items():
        if split.digest == run.get(f"{name}_data_digest"):
            continue
        place = _first_difference(datamodule, run_dir, splits) or "the same texts have other tokens or ids"
        return Finding("data", "changed", f"data.{name}_files: {place}")
    place = _first_difference(datamodule, run_dir, splits)
    return Finding("data", "changed", place) if place else Finding("data", "ok", _numbers(datamodule))


def _numbers(datamodule: ClaimsDataModule) -> str:
    counts = {name: len(datamodule.splits[name].examples) for name in ("train", "val")}
    return ", ".join(f"{count:,} records of {name}" for name, count in counts.items())


def _first_difference(datamodule: ClaimsDataModule, run_dir: Path, splits: Mapping[str, Any]) -> str:
    """Where the present records differ from the ledger; empty if nowhere."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    ledger = run_dir / LEDGER_FILE
    with tempfile.TemporaryDirectory() as folder, pq.ParquetFile(ledger) as expected:
        new = Path(folder) / LEDGER_FILE
        metadata = json.loads(expected.schema_arrow.metadata[b"lit_phi2"])
        taken = StepsTaken(
            datamodule.batching(),
            datamodule.seed,
            metadata["steps"],
            datamodule.steps_per_epoch(),
            repeats_epoch=bool(datamodule.trainer and datamodule.trainer.overfit_batches > 0),
            skipped=tuple(metadata.get("skipped", ())),
        )
        write_ledger(new, splits, read_key(run_dir)["salt"], taken)
        with pq.ParquetFile(new) as found:
            for then, now in zip(_rows(expected), _rows(found), strict=False):
                if then != now:
                    place = f"{then['file']}:{then['line']}"
                    return f"{place} of the ledger is another record now"
            if expected.metadata.num_rows != found.metadata.num_rows:
                return f"{expected.metadata.num_rows} records in the ledger, {found.metadata.num_rows} now"
    return ""


def _rows(file: Any) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(2**13):
        yield from batch.to_pylist()


# Replay


def replay(run_dir: Path, predicate: Mapping[str, Any]) -> Finding:
    """Train the run again from its config, in a folder that is removed, and compare the adapters.

    Raises:
        InputError: the run has no config or no adapter, or it cannot be trained again.
    """
    config = run_dir / CONFIG_FILE
    if not config.is_file() or not (run_dir / "adapter").is_dir():
        raise InputError(
            f"--replay true: {run_dir} has no {CONFIG_FILE} or no adapter; give the folder of a whole run."
        )
    expected = read_adapter(run_dir / "adapter")
    with tempfile.TemporaryDirectory(prefix="lit_phi2-replay-") as folder:
        flags = ["--config", str(config), "--trainer.default_root_dir", folder]
        _run_fit(flags, predicate["buildDefinition"]["internalParameters"]["environment"].get("num_threads"))
        (new_dir,) = Path(folder).glob("*/version_0")
        found, statement = read_adapter(new_dir / "adapter"), read_statement(new_dir)
    assert statement is not None
    if adapter_digest(found) == adapter_digest(expected):
        return Finding("replay", "ok", f"bit-equal, {len(found.weights)} tensors")
    return Finding("replay", *_how_close(expected.weights, found.weights, predicate, statement["predicate"]))


def _run_fit(flags: list[str], num_threads: int | None) -> None:
    """Run fit in a new process, with the threads of the run; its log goes to stderr."""
    package = str(Path(lit_phi2.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    command = [sys.executable, "-m", "lit_phi2", "fit", *flags]
    code = subprocess.run(command, env=environment, stdout=2, check=False).returncode
    if code:
        raise InputError(f"--replay true: fit ended with exit code {code}; its message is above.")


def _how_close(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> tuple[str, str]:
    """State and detail of an adapter that is not bit-equal: a fault only where the machine is that of the run.

    Args:
        expected: weights of the run.
        found: those of the replay.
        then: provenance of the run.
        now: that of the replay.
    """
    steps = [each["training"]["steps"] for each in (then, now)]
    if steps[0] != steps[1]:
        return "changed", f"the adapter of the run is that of step {steps[0]}, here of step {steps[1]}; stopped early?"
    if {name: weight.shape for name, weight in expected.items()} != {name: w.shape for name, w in found.items()}:
        return "changed", "weights of other shapes"
    difference = torch.cat([(found[name] - weight).flatten() for name, weight in expected.items()])
    whole = torch.cat([weight.flatten() for weight in expected.values()])
    detail = (
        f"not bit-equal: weights differ by at most {difference.abs().max():.3g}, in norm by "
        f"{difference.norm() / whole.norm():.3g} of it"
    )
    saved, current = (each["buildDefinition"]["internalParameters"]["environment"] for each in (then, now))
    others = [
        f"{name} {saved.get(name)} then, {value} now" for name, value in current.items() if saved.get(name) != value
    ]
    return ("differs", f"{detail}; {', '.join(others)}") if others else ("changed", detail)
