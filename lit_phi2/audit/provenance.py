"""Provenance: provenance.json, what a run or an export was made from, and whether its files are still those.

    checkpoint, folder of the run  ->  predicate      base, tokenizer, template, data, config, ledger, code, versions,
                                                      seed, device, steps, metrics, audits
    predicate, files of a folder   ->  provenance.json, an in-toto statement: SHA-256 of each file, and the predicate
    predicate                      ->  a few values in the metadata of safetensors and GGUF files

It is made to be published, so that it has names of files and no paths. Formats:
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

import functools
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import yaml

from lit_phi2 import __version__
from lit_phi2.adapters.adapter import Adapter
from lit_phi2.audit.ledger import KEY_FILE, LEDGER_FILE, read_key
from lit_phi2.base_digest import DIGESTS_FILE, PARTS
from lit_phi2.errors import InputError
from lit_phi2.utils.files import atomic_write
from lit_phi2.utils.json_objects import read_json_object
from lit_phi2.utils.paths import run_dir_of

PROVENANCE_FILE = "provenance.json"
CONFIG_FILE = "config.yaml"
METADATA_KEY = "lit_phi2.provenance"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:lit_phi2:provenance:v1"

_PACKAGES = ("torch", "transformers", "peft", "lightning", "tokenizers", "safetensors", "numpy", "pyarrow")
_METRICS_FILE = "test_metrics.json"
_AUDITS = "audit_*.json"  # in the folder of a run; each says whether it passed


# The predicate


def run_predicate(checkpoint: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What the adapter in a checkpoint was made from.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        run_dir: the folder of its run, whose config, ledger, metrics and audits are named where it has them.
    """
    state, run = checkpoint["lit_phi2"], checkpoint["lit_phi2"]["run"]
    config = read_config(run_dir / CONFIG_FILE)
    dependencies = _base_dependencies(state["base"], state["base_revision"], state["base_digest"])
    dependencies.append(_template(state["template_version"], state.get("template_digest", "")))
    dependencies += [
        {"name": f"data.{name}_files", "digest": {"lit_phi2_examples": run[f"{name}_data_digest"]}}
        for name in ("train", "val")
    ]
    dependencies += [_file_digest(run_dir / CONFIG_FILE)] if (run_dir / CONFIG_FILE).is_file() else []
    predicate = {
        "buildDefinition": {
            "buildType": "urn:lit_phi2:fit:v1",
            "externalParameters": public_config(config, state["base_revision"]),
            "internalParameters": {"settings": dict(run), "environment": dict(state["environment"])},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": "urn:lit_phi2", "version": state.get("versions", {})},
            "byproducts": [_file_digest(run_dir / LEDGER_FILE)] if (run_dir / LEDGER_FILE).is_file() else [],
        },
        "training": {"steps": checkpoint["global_step"], "total_steps": run["total_steps"]},
        "metrics": _metrics(checkpoint, run_dir),
        "audits": _audits(run_dir),
    }
    return predicate | _forgotten(run_dir)


def adapter_predicate(adapter: Adapter | None, base: Mapping[str, str]) -> dict[str, Any]:
    """What is known of an adapter that comes without its run, or of a base alone.

    Args:
        adapter: None for the base alone.
        base: base, base_revision and base_digest.
    """
    dependencies = _base_dependencies(base["base"], base["base_revision"], base["base_digest"])
    if adapter is not None:
        dependencies.append(_template(adapter.template_version, adapter.template_digest))
    return {"buildDefinition": {"buildType": "urn:lit_phi2:unknown:v1", "resolvedDependencies": dependencies}}


def _base_dependencies(name: str, revision: str, digest: str) -> list[dict[str, Any]]:
    """The base as a whole, and its config, tokenizer and weights apart."""
    # A folder has no revision. Of an adapter without a digest, which another tool trained, only the name tells.
    public = name if revision or (not digest and _is_hub_id(name)) else PurePath(name).name
    whole = {"name": "base", "uri": public, "digest": {"lit_phi2_base": digest}, "annotations": {"revision": revision}}
    parts = [
        {"name": f"base {part}", "digest": {"lit_phi2_base": value}}
        for part, value in zip(PARTS, digest.split("-"), strict=False)
    ]
    return [whole, *parts]


def _template(version: int, digest: str) -> dict[str, Any]:
    return {"name": "template", "digest": {"lit_phi2_template": digest}, "annotations": {"version": version}}


def _metrics(checkpoint: Mapping[str, Any], run_dir: Path) -> dict[str, float]:
    """The validation loss of the best checkpoint so far, and the metrics of `test`."""
    best_loss = checkpoint.get("callbacks", {}).get("AdapterCheckpoint", {}).get("best_loss", math.inf)
    metrics = {"best val/loss": best_loss} if math.isfinite(best_loss) else {}
    file = run_dir / _METRICS_FILE
    found = read_json_object(file) if file.is_file() else {}
    return metrics | {name: value for name, value in found.items() if type(value) in (int, float)}


def _audits(run_dir: Path) -> dict[str, Any]:
    """The figures of each audit that has a threshold."""
    contents = {file.stem: read_json_object(file) for file in sorted(run_dir.glob(_AUDITS))}
    return {name: content for name, content in contents.items() if "passed" in content}


def _forgotten(run_dir: Path) -> dict[str, Any]:
    """The records that data.without left out, by salted hash, and the run that this one replaces."""
    key = read_key(run_dir) if (run_dir / KEY_FILE).is_file() else {}
    if not key.get("forgotten"):
        return {}
    return {"forgotten": {"salted_ids": key["forgotten"], "replaces": key.get("replaces")}}


def versions() -> dict[str, str]:
    """Of lit_phi2, with the digest of its code, of Python and of every package that decides a run."""
    found = {"lit_phi2": __version__, "code": code_digest(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_digest() -> str:
    """SHA-256 of the modules of lit_phi2, by name."""
    package = Path(__file__).parents[1]
    sha256 = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        content = file.read_bytes()
        sha256.update(f"{file.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return sha256.hexdigest()


def read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no run, or a file that was edited: its digest tells
        return {}
    return config if isinstance(config, dict) else {}


def public_config(config: Mapping[str, Any], base_revision: str) -> dict[str, Any]:
    """A config without paths; a base without a revision is a folder, also where its path looks like a hub id.

    >>> public_config({"model": {"base": "bases/phi-2"}}, "")
    {'model': {'base': 'phi-2'}}
    """
    public: dict[str, Any] = _without_paths(config)
    model = public.get("model")
    if not base_revision and isinstance(model, dict) and isinstance(model.get("base"), str):
        model["base"] = PurePath(model["base"]).name
    return public


def _without_paths(value: Any) -> Any:
    """A setting with the last part of each path alone.

    >>> _without_paths({"train_files": ["/home/ann/a.jsonl", "claims:train", "hub:a/b"], "base": "microsoft/phi-2"})
    {'train_files': ['a.jsonl', 'claims:train', 'hub:a/b'], 'base': 'microsoft/phi-2'}
    >>> _without_paths({"adapter": "runs/ann/version_0"})
    {'adapter': 'version_0'}
    """
    if isinstance(value, Mapping):
        return {
            key: item if key == "base" and _is_hub_id(item) else _without_paths(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or value.startswith(("hub:", "claims:")):
        return value
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _is_hub_id(value: Any) -> bool:
    return isinstance(value, str) and value.count("/") == 1 and not value.startswith(("/", ".", "~"))


# The statement


def write_provenance(folder: Path, predicate: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write provenance.json into a folder.

    Args:
        folder: gets the file.
        predicate: of what the files were made from.
        names: of files in the folder, or below it.
    """
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [_file_digest(folder / name, name) for name in sorted(names)],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    atomic_write(folder / PROVENANCE_FILE, json.dumps(statement, indent=2) + "\n")


def read_statement(folder: Path) -> dict[str, Any] | None:
    """The statement of a folder; None if it has none.

    Raises:
        InputError: the file is no statement of lit_phi2.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return None
    statement = read_json_object(file)
    try:
        is_ours = statement["predicateType"] == PREDICATE_TYPE and isinstance(statement["predicate"], dict)
        is_ours = is_ours and all(isinstance(name, str) for name in subject_digests(statement).values())
    except (KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise InputError(f"{file}: is no provenance of lit_phi2, or was changed. Restore it, or export again.")
    return statement


def subject_digests(statement: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file that a statement covers, by name; only names inside its folder."""
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    if any(PurePath(name).is_absolute() or ".." in PurePath(name).parts for name in digests):
        raise KeyError("a file outside the folder")
    return digests


def changed_files(folder: Path, statement: Mapping[str, Any]) -> dict[str, str]:
    """The files that are missing or not those of the statement: "changed" or "missing", by name."""
    found = {}
    for name, digest in subject_digests(statement).items():
        if not (folder / name).is_file():
            found[name] = "missing"
        elif sha256_of(folder / name) != digest:
            found[name] = "changed"
    return found


def is_local(name: str) -> bool:
    """Whether a file is a lock, or the digests that lit_phi2 keeps beside weights: of this machine alone."""
    return name.endswith(".lock") or PurePath(name).name == DIGESTS_FILE


def check_provenance(*folders: Path) -> None:
    """Refuse files that differ from the provenance of their folder; a missing one is not used, and no fault.

    Raises:
        InputError: names each changed file.
    """
    for folder in dict.fromkeys(folders):
        statement = read_statement(folder)
        changed = (
            [name for name, how in changed_files(folder, statement).items() if how == "changed"] if statement else []
        )
        if changed:
            raise InputError(
                f"{folder}: {' and '.join(changed)} changed since {PROVENANCE_FILE} was written. Restore what it was, "
                f"or remove {PROVENANCE_FILE} if the change is yours; the result is then no longer that of the run."
            )


def provenance_folders(ckpt_path: Path) -> list[Path]:
    """The folders whose provenance may cover a checkpoint or an adapter: its own, and that of its run."""
    return [ckpt_path if ckpt_path.is_dir() else ckpt_path.parent, run_dir_of(ckpt_path)]


def embedded_metadata(predicate: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata of a safetensors or GGUF file has of a predicate: its SHA-256, and the digests it holds."""
    dependencies = predicate["buildDefinition"]["resolvedDependencies"]
    digests = {each["name"]: next(iter(each["digest"].values())) for each in dependencies}
    byproducts = predicate.get("runDetails", {}).get("byproducts", [])
    digests |= {each["name"]: each["digest"]["sha256"] for each in byproducts}
    summary = {"predicate_sha256": predicate_digest(predicate), "lit_phi2": __version__, "digests": digests}
    if "training" in predicate:
        summary["steps"] = predicate["training"]["steps"]
    return {METADATA_KEY: json.dumps(summary)}


def predicate_digest(predicate: Mapping[str, Any]) -> str:
    """SHA-256 of a predicate as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(predicate, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_digest(path: Path, name: str = "") -> dict[str, Any]:
    return {"name": name or path.name, "digest": {"sha256": sha256_of(path)}}
