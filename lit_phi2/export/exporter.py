"""Exporter: from an adapter to a checked folder for one runtime.

plan_export    format, dtype, base and adapter fit one another; nothing is loaded or written
export         written beside --output_dir -> run in its runtime -> README.md, export.json -> renamed

peft           adapter_model.safetensors, adapter_config.json, lit_phi2.json
merged         a model in Hugging Face form
gguf           adapter.gguf, Modelfile
gguf-merged    model-DTYPE.gguf, Modelfile
mlx            adapters.safetensors, adapter_config.json; a copy of the base where mlx-lm needs one
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_phi2.adapters.adapter import Adapter, check_adapter, with_base_name
from lit_phi2.adapters.peft_format import save_adapter
from lit_phi2.audit.provenance import (
    PROVENANCE_FILE,
    adapter_predicate,
    embedded_metadata,
    is_local,
    versions,
    write_provenance,
)
from lit_phi2.audit.signing import SIGNATURE_FILE, check_private_key, sign_folder
from lit_phi2.base_config import CONFIG_FILE
from lit_phi2.base_digest import check_unchanged
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts, model_card
from lit_phi2.export.card import versions as runtime_versions
from lit_phi2.export.checks import Check, Exported, check_exported
from lit_phi2.export.commands import (
    CONVERTED_BASE,
    GGUF_BASE,
    GGUF_NAMES,
    base_gguf_help,
    converted_base_help,
    gguf_model_file,
    load_command,
    quantize_help,
)
from lit_phi2.export.folder import REPORT_FILE, check_output_dir, replaced_folder
from lit_phi2.export.gguf import check_gguf_base, import_gguf, modelfile, write_gguf_adapter, write_gguf_model
from lit_phi2.export.merged import write_merged
from lit_phi2.export.metadata import adapter_digest
from lit_phi2.export.mlx import BASE_COPY, check_mlx_base, needs_base_copy, write_base_copy, write_mlx_adapter
from lit_phi2.export.parity import Reference
from lit_phi2.export.progress import write_progress
from lit_phi2.export.template import ollama_template, stop_texts, template_fingerprint
from lit_phi2.export.weights import ModelWeights
from lit_phi2.original_code import is_original_config
from lit_phi2.pretrained import BaseModel, load_tokenizer
from lit_phi2.utils.json_objects import read_json_object
from lit_phi2.utils.paths import GGUF_ADAPTER_FILE

log = logging.getLogger(__name__)

# Format -> the dtypes that --dtype may name, the default first. Adapters are float32, as they were trained.
FORMATS = {
    "peft": ("float32",),
    "merged": ("bfloat16", "float16", "float32"),
    "gguf": ("float32",),
    "gguf-merged": ("float16", "bfloat16", "float32", "q8_0"),
    "mlx": ("float32",),
}
_LONG_NAMES = {short: name for name, short in GGUF_NAMES.items()}  # f16 -> float16


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export whose parts fit one another.

    Attributes:
        adapter: None for the base alone.
        base: of the adapter.
        format: a key of FORMATS.
        dtype: of the format.
        output_dir: becomes the export.
        weights: of the base, with the adapter merged.
        tokenizer: of the base.
        predicate: its provenance.
        sign: the private key that signs the export; None for no signature.
    """

    adapter: Adapter | None
    base: BaseModel
    format: str
    dtype: str
    output_dir: Path
    weights: ModelWeights
    tokenizer: PreTrainedTokenizerBase
    predicate: Mapping[str, Any]
    sign: Path | None


def plan_export(
    adapter: Adapter | None,
    base: BaseModel,
    output_dir: Path,
    *,
    format: str,
    dtype: str | None,
    source: str,
    predicate: Mapping[str, Any] | None = None,
    sign: Path | None = None,
) -> ExportPlan:
    """Check everything about an export that is known before a model is loaded.

    Args:
        adapter: None for the base alone.
        base: of the adapter.
        output_dir: the folder of the export, which may be new.
        format: a key of FORMATS.
        dtype: None for the format's default.
        source: where the adapter comes from, for messages.
        predicate: its provenance; None has what the adapter itself says.
        sign: a private key that signs the export.

    Raises:
        InputError: the format, the dtype, the folder, the key, or the adapter on this base cannot be used.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format}: is unknown; expected one of {', '.join(FORMATS)}.")
    if adapter is None and format not in ("merged", "gguf-merged"):
        raise InputError(f"--format {format}: exports an adapter. Give one with --ckpt_path.")
    dtype = _LONG_NAMES.get(dtype or "", dtype or FORMATS[format][0])
    if dtype not in FORMATS[format]:
        raise InputError(f"--dtype {dtype}: --format {format} has {', '.join(FORMATS[format])}.")
    check_output_dir(output_dir)
    if adapter is not None:
        adapter = check_adapter(adapter, adapter.settings, base, source=source)
        adapter = with_base_name(adapter, base)
    weights, tokenizer = ModelWeights(base, adapter), load_tokenizer(base)
    if format in ("gguf", "gguf-merged"):
        check_gguf_base(weights, tokenizer, dtype)
        import_gguf()
    if format == "mlx":
        check_mlx_base(weights)
    if sign is not None:
        check_private_key(sign)
    predicate = dict(predicate or adapter_predicate(adapter, base.fingerprint()))
    predicate["export"] = {"format": format, "dtype": dtype, "versions": versions()}
    return ExportPlan(adapter, base, format, dtype, output_dir, weights, tokenizer, predicate, sign)


def export(plan: ExportPlan, reference: Reference | None, facts: CardFacts) -> Check:
    """Write, check and name an export; logs what was checked and, last, the command that loads the result.

    Args:
        plan: of the export.
        reference: what the running model says to the prompts of the check; None does not check.
        facts: for the model card.

    Raises:
        InputError: the result does not say what the running model says, or the base changed meanwhile; nothing is left
            of it.
        OSError: the disk is full or cannot be written; nothing is left of it.
    """
    with replaced_folder(plan.output_dir) as folder:
        _write(plan, folder)
        check_unchanged(plan.base.folder, plan.base.files)
        base = plan.weights if plan.adapter is None else ModelWeights(plan.base, None)
        exported = Exported(folder, plan.format, plan.dtype, plan.adapter, base, plan.weights, plan.tokenizer)
        check = check_exported(exported, reference)
        _describe(plan, folder, check, facts)
    log.info("%s", check.summary)
    if _needs_converted_base(plan):
        saved_dtype = str(plan.weights.saved_dtype).removeprefix("torch.")
        log.info("%s", converted_base_help(str(plan.base.folder), saved_dtype))
    if plan.format == "gguf":
        log.info("%s", base_gguf_help(_base_path(plan), GGUF_BASE))
    if plan.format == "gguf-merged":
        log.info("%s", quantize_help(str(plan.output_dir / gguf_model_file(plan.dtype))))
    log.info("export: %s\nto load it:\n    %s", plan.output_dir, _command(plan, str(plan.output_dir)))
    return check


def _write(plan: ExportPlan, folder: Path) -> None:
    num_layers, provenance = plan.weights.config.num_hidden_layers, embedded_metadata(plan.predicate)
    if plan.format == "merged":
        with write_progress(plan.weights, plan.dtype) as progress:
            write_merged(plan.weights, plan.tokenizer, folder, getattr(torch, plan.dtype), progress, provenance)
    elif plan.format == "gguf-merged":
        with write_progress(plan.weights, plan.dtype) as progress:
            file = folder / gguf_model_file(plan.dtype)
            write_gguf_model(plan.weights, plan.tokenizer, file, plan.dtype, progress, provenance)
        comment = "ollama create NAME -f Modelfile"
        _write_modelfile(folder, f"./{gguf_model_file(plan.dtype)}", None, comment)
    assert plan.adapter is not None or plan.format in ("merged", "gguf-merged")
    if plan.adapter is None:
        return
    if plan.format == "peft":
        save_adapter(plan.adapter, folder, provenance)
    elif plan.format == "gguf":
        write_gguf_adapter(plan.adapter, num_layers, folder / GGUF_ADAPTER_FILE, provenance)
        comment = base_gguf_help(_base_path(plan, public=True), "base.gguf, beside this file")
        comment += "\nThen: ollama create NAME -f Modelfile"
        _write_modelfile(folder, "./base.gguf", f"./{GGUF_ADAPTER_FILE}", comment)
    elif plan.format == "mlx":
        write_mlx_adapter(plan.adapter, num_layers, folder, provenance)
        write_base_copy(plan.base, plan.tokenizer, folder)


def _write_modelfile(folder: Path, model: str, adapter: str | None, comment: str) -> None:
    text = modelfile(model, adapter, ollama_template(), stop_texts(), comment)
    (folder / "Modelfile").write_text(text, "utf-8")


def _describe(plan: ExportPlan, folder: Path, check: Check, facts: CardFacts) -> None:
    """Write README.md, export.json, provenance.json and, last, the signature over all files."""
    # An export is made to be given away: it names the base by hub id or folder name, and no path of this machine.
    fingerprints: dict[str, Any] = {**plan.base.fingerprint(), "base": plan.base.public_name}
    fingerprints["adapter_digest"] = None if plan.adapter is None else adapter_digest(plan.adapter)
    fingerprints |= template_fingerprint()
    card = model_card(
        plan.adapter,
        plan.base,
        format=plan.format,
        fingerprints=fingerprints,
        checks=check.summary,
        load=_command(plan, plan.output_dir.name, public=True),
        facts=facts,
    )
    written = {path.name for path in folder.iterdir()} | {"README.md", PROVENANCE_FILE}
    report = {
        "format": plan.format,
        "dtype": plan.dtype,
        "fingerprints": fingerprints,
        "check": {"method": check.method, "summary": check.summary} | (asdict(check.parity) if check.parity else {}),
        "versions": runtime_versions(),
        "files": sorted(written | {SIGNATURE_FILE} if plan.sign else written),
    }
    (folder / "README.md").write_text(card, "utf-8")
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    write_provenance(folder, plan.predicate, [name for name in files if not is_local(name)])
    if plan.sign is not None:
        for name in filter(is_local, files):
            (folder / name).unlink(missing_ok=True)
        sign_folder(folder, plan.sign)


def _command(plan: ExportPlan, folder: str, *, public: bool = False) -> str:
    has_copy = plan.format == "mlx" and needs_base_copy(plan.weights)
    base = f"{folder}/{BASE_COPY}" if has_copy else _base_path(plan, public=public)
    return load_command(plan.format, plan.dtype, base, folder, has_template=has_copy)


def _needs_converted_base(plan: ExportPlan) -> bool:
    """Whether the runtime loads the base itself and does not know the names of Phi-2's original code."""
    return plan.format == "peft" and is_original_config(read_json_object(plan.base.folder / CONFIG_FILE))


def _base_path(plan: ExportPlan, *, public: bool = False) -> str:
    """What a runtime finds the base by: its hub id, or its folder."""
    if _needs_converted_base(plan):
        return CONVERTED_BASE
    if public:
        return plan.base.public_name
    return plan.base.name if plan.base.revision else str(plan.base.folder)
