"""Verify: whether a folder is what its provenance says, and whether records were trained on.

    provenance.json, base, template, public key  ->  [Finding("config.yaml", "changed", ...), ...]
    records of a file, ledger of a run           ->  {"record": "a.jsonl:3", "status": "trained", "uses": [...]}

No text and no id of a record is in the results.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lit_phi2.audit.ledger import (
    LEDGER_FILE,
    TEST_LEDGER_FILE,
    find_in_ledger,
    invalid_digest,
    read_key,
    salted,
)
from lit_phi2.audit.provenance import (
    METADATA_KEY,
    PROVENANCE_FILE,
    changed_files,
    code_digest,
    is_local,
    predicate_digest,
    subject_digests,
)
from lit_phi2.audit.signing import SIGNATURE_FILE, verify_folder
from lit_phi2.base_digest import PARTS, different_parts
from lit_phi2.data.identity import content_digest
from lit_phi2.data.prompts import TEMPLATE_DIGEST
from lit_phi2.data.records import InvalidRecord, Record
from lit_phi2.errors import InputError
from lit_phi2.export.gguf_reader import read_gguf
from lit_phi2.pretrained import resolve_base_model
from lit_phi2.utils.paths import GGUF_SUFFIX


class Finding(NamedTuple):
    """What was found of one thing.

    Attributes:
        name: of a file, or of base, template, data and so on.
        state: ok, changed, missing or added; "not checked" and differs are no faults.
        detail: in words; may be empty.
    """

    name: str
    state: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.state in ("changed", "missing", "added")


# Files, base, template, code


def verify_files(folder: Path, statement: Mapping[str, Any], public_key: Path | None) -> Iterator[Finding]:
    """The signature, and each file that the provenance covers.

    Args:
        folder: of provenance.json.
        statement: its content.
        public_key: of the key that signed the folder; None does not check the signature.

    Raises:
        InputError: the key cannot be used.
    """
    signature = folder / SIGNATURE_FILE
    if public_key is not None:
        problems = verify_folder(folder, public_key) if signature.is_file() else [f"there is no {SIGNATURE_FILE}"]
        yield Finding("signature", "changed" if problems else "ok", "; ".join(problems))
    elif signature.is_file():
        yield Finding("signature", "not checked", "--public_key FILE checks it")
    changed, digests = changed_files(folder, statement), subject_digests(statement)
    for name in digests:
        yield Finding(name, changed.get(name, "ok"))
    if "export" in statement["predicate"]:  # only an export is a folder in which nothing is added
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in (*digests, PROVENANCE_FILE, SIGNATURE_FILE) and not is_local(name):
                yield Finding(name, "added")
    expected = predicate_digest(statement["predicate"])
    for name in digests:
        if name.endswith((".safetensors", GGUF_SUFFIX)) and name not in changed:
            digest = _embedded_digest(folder / name)
            if digest not in (None, expected):
                yield Finding(PROVENANCE_FILE, "changed", f"{name} was written with another")


def _embedded_digest(file: Path) -> str | None:
    """The digest of the provenance that a safetensors or GGUF file was written with; None if it has none."""
    try:
        if file.suffix == GGUF_SUFFIX:
            text = read_gguf(file)[0].get(METADATA_KEY)
        else:
            with safe_open(file, "pt") as tensors:
                text = (tensors.metadata() or {}).get(METADATA_KEY)
        return None if text is None else str(json.loads(text)["predicate_sha256"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return ""


def verify_dependencies(predicate: Mapping[str, Any], base: str) -> Iterator[Finding]:
    """Base, tokenizer, template and code.

    Args:
        predicate: of the provenance.
        base: model.base.
    """
    dependencies = {each["name"]: each for each in predicate["buildDefinition"]["resolvedDependencies"]}
    yield from _verify_base(dependencies.get("base"), base)
    expected = dependencies.get("template", {}).get("digest", {}).get("lit_phi2_template")
    if expected:
        is_equal = expected == TEMPLATE_DIGEST
        detail = "" if is_equal else f"{expected} then, {TEMPLATE_DIGEST} now: data/prompts.py"
        yield Finding("template", "ok" if is_equal else "changed", detail)
    code = predicate.get("runDetails", {}).get("builder", {}).get("version", {}).get("code")
    if code and code != code_digest():
        yield Finding("code of lit_phi2", "differs", "another version trained it")


def _verify_base(dependency: Mapping[str, Any] | None, name: str) -> Iterator[Finding]:
    expected = dependency["digest"]["lit_phi2_base"] if dependency else ""
    if dependency is None or not expected:  # an adapter that another tool trained
        yield Finding("base", "not checked", "nothing tells which it was")
        return
    try:
        digest = resolve_base_model(name).digest
    except InputError as error:
        yield Finding("base", "not checked", str(error).splitlines()[0])
        return
    changed = different_parts(expected, digest)
    for part in PARTS:
        detail = f"of model.base {name!r}, which was {dependency['uri']!r}" if part in changed else ""
        yield Finding(f"base {part}", "changed" if part in changed else "ok", detail)


# Records


def look_up(records: Iterable[Record | InvalidRecord], run_dir: Path, steps: int | None) -> Iterator[dict[str, Any]]:
    """What each record was used for, in their order.

    Args:
        records: of a file.
        run_dir: the folder of the run, with its ledger and salt.
        steps: of the checkpoint; later steps did not shape it. None for all.

    Raises:
        InputError: the run has no ledger.
    """
    if not (run_dir / LEDGER_FILE).is_file():
        raise InputError(
            f"{run_dir}: has no {LEDGER_FILE}: it was killed, or trained by an earlier lit_phi2. A run continued "
            "with fit --ckpt_path writes it."
        )
    salt = read_key(run_dir)["salt"]
    ledgers = [file for name in (LEDGER_FILE, TEST_LEDGER_FILE) if (file := run_dir / name).is_file()]
    hashes = [(record.location, _hash(record, salt)) for record in records]
    wanted = {value for _, value in hashes if value is not None}
    rows: dict[bytes, list[dict[str, Any]]] = {}
    for file in ledgers:  # read once, however many records there are
        for row in find_in_ledger(file, wanted):
            rows.setdefault(row["content_sha256"], []).append(row)
    for location, value in hashes:
        yield {"record": location, **describe_use(rows.get(value, []) if value else [], steps)}


def _hash(record: Record | InvalidRecord, salt: str) -> bytes | None:
    if isinstance(record, InvalidRecord):
        digest = invalid_digest(record)
    else:
        digest = content_digest(record.instruction, record.input, record.response)
    return salted(digest, salt) if digest else None


def describe_use(rows: list[dict[str, Any]], steps: int | None) -> dict[str, Any]:
    """The status of a record, from its rows in the ledgers.

    >>> row = {"split": "train", "uses": [{"epoch": 0, "step": 3}], "left_out": None}
    >>> describe_use([row], steps=5)
    {'status': 'trained', 'uses': [{'epoch': 0, 'step': 3}], 'splits': ['train']}
    >>> describe_use([row], steps=2)["status"], describe_use([], None)["status"]
    ('after this checkpoint', 'unknown')
    """
    uses = sorted((use for row in rows for use in row["uses"]), key=lambda use: use["step"])
    before = [use for use in uses if steps is None or use["step"] <= steps]
    splits = sorted({row["split"] for row in rows if not row["left_out"]})
    reasons = sorted({row["left_out"] for row in rows if row["left_out"]})
    found: dict[str, Any] = {"uses": before} if before else {}
    found |= {"splits": splits} if splits else {}
    found |= {"reason": "; ".join(reasons)} if reasons else {}
    if before:
        status = "trained"
    elif uses:
        status = "after this checkpoint"
    elif "train" in splits:
        status = "not used"  # its step was not taken
    elif splits:
        status = {"val": "validation", "test": "test"}[splits[-1] if "val" not in splits else "val"]
    else:
        status = "left out" if reasons else "unknown"
    return {"status": status, **found}
