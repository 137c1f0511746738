"""Exporting: the plan of an export, what the running model says to held-out prompts, and what the card tells.

    --ckpt_path            ->  adapter, its provenance                                              ->  ExportPlan
    val_files, --check 8   ->  8 prompts, spread over the records  ->  model loaded, run, released  ->  Reference
    folder of the run      ->  config.yaml, test_metrics.json, numbers of records                   ->  CardFacts

The model is released before the runtime that checks the export loads its own.
"""

import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_phi2.adapters.adapter import Adapter
from lit_phi2.adapters.checkpoint import read_adapter, read_checkpoint
from lit_phi2.audit.provenance import (
    adapter_predicate,
    check_provenance,
    provenance_folders,
    read_statement,
    run_predicate,
)
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.errors import InputError
from lit_phi2.export.card import CardFacts
from lit_phi2.export.exporter import ExportPlan, plan_export
from lit_phi2.export.parity import CHECK_TOKENS, MAX_PROMPTS, Reference, run_reference
from lit_phi2.model.device import choose_dtype
from lit_phi2.model.loading import num_parameters
from lit_phi2.model.lora import add_lora, load_adapter_state_dict
from lit_phi2.model.streaming import load_streamed_phi2
from lit_phi2.pretrained import BaseModel
from lit_phi2.utils.paths import GGUF_SUFFIX, run_dir_of

log = logging.getLogger(__name__)

_SPLITS = ("train", "val")


def plan_checkpoint_export(
    ckpt_path: str | None, base: BaseModel, folder: Path, *, format: str, dtype: str | None, sign: Path | None
) -> ExportPlan:
    """Check everything about an export that is known before a model is loaded.

    Args:
        ckpt_path: a checkpoint or an adapter; None exports the base alone.
        base: of the adapter.
        folder: --output_dir.
        format: --format.
        dtype: --dtype.
        sign: --sign.

    Raises:
        InputError: the checkpoint changed since its provenance was written; see also `plan_export`.
    """
    adapter, predicate = None, None
    if ckpt_path is None:
        log.info("no --ckpt_path: the base alone is exported, without an adapter")
    else:
        adapter = read_adapter(Path(ckpt_path))  # whose messages about a damaged file say more
        check_provenance(*provenance_folders(Path(ckpt_path)))
        predicate = _source_predicate(Path(ckpt_path), adapter)
    source = f"--ckpt_path {ckpt_path}"
    return plan_export(adapter, base, folder, format=format, dtype=dtype, source=source, predicate=predicate, sign=sign)


def _source_predicate(ckpt_path: Path, adapter: Adapter) -> dict[str, Any]:
    """The provenance of a checkpoint or an adapter: that of its run, that beside it, or what it says itself."""
    if ckpt_path.is_file() and ckpt_path.suffix != GGUF_SUFFIX:
        return run_predicate(read_checkpoint(ckpt_path)[1], run_dir_of(ckpt_path))
    statement = read_statement(ckpt_path if ckpt_path.is_dir() else ckpt_path.parent)
    return dict(statement["predicate"]) if statement else adapter_predicate(adapter, adapter.base)


def held_out_prompts(datamodule: ClaimsDataModule, count: int, max_positions: int) -> list[list[int]]:
    """Prompts of val_files, spread over its records: as many as asked for, or all that there are.

    Args:
        datamodule: from the config.
        count: at least 1.
        max_positions: of the base; a prompt leaves space for the tokens that are compared.

    Raises:
        InputError: no prompt is short enough, or more than MAX_PROMPTS would be compared.
    """
    datamodule.setup("validate")
    examples = datamodule.splits["val"].examples
    is_short = [index for index, each in enumerate(examples) if each.prompt_length + CHECK_TOKENS <= max_positions]
    if not is_short:
        raise InputError(
            f"--check {count}: every prompt of data.val_files with {CHECK_TOKENS} more tokens exceeds the "
            f"{max_positions} positions of the base. Give others, or --check 0, which exports without a check."
        )
    count = min(count, len(is_short))
    if count > MAX_PROMPTS:
        raise InputError(
            f"--check {count}: at most {MAX_PROMPTS} prompts are compared, because what the model says to them is kept "
            "in memory."
        )
    chosen = [examples[is_short[number * len(is_short) // count]] for number in range(count)]
    return [example.ids[: example.prompt_length] for example in chosen]


def run_and_release(
    plan: ExportPlan, ckpt_path: str | None, prompts: list[list[int]], *, dtype: str, device: torch.device
) -> Reference:
    """What the base with the plan's adapter says to prompts, as every subcommand runs it; its memory is free again.

    Args:
        plan: of the export.
        ckpt_path: where its adapter comes from; None if it has none.
        prompts: token ids.
        dtype: model.dtype of the config.
        device: that runs the model.
    """
    compute_dtype, reason = choose_dtype(dtype, device, num_parameters(plan.base))
    log.info("check: %d prompts, compute dtype %s: %s", len(prompts), str(compute_dtype).removeprefix("torch."), reason)
    # disable_malloc_trim is not called: the memory must return to the system, for a runtime in another process.
    phi: Any = load_streamed_phi2(plan.base, compute_dtype, device)
    if plan.adapter is not None:
        phi = add_lora(phi, plan.adapter.settings, dropout=0.0)
        load_adapter_state_dict(phi, plan.adapter.weights, source=str(ckpt_path))
    reference = run_reference(phi, prompts, eos_token_id=int(plan.tokenizer.eos_token_id))
    del phi
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return reference


def card_facts(ckpt_path: Path | None, datamodule: ClaimsDataModule) -> CardFacts:
    """What the folder of the adapter's run tells; nothing is guessed where it has no such file.

    Records are counted where this export was given the run's own files.
    """
    if ckpt_path is None:
        return CardFacts()
    run_dir = run_dir_of(ckpt_path)
    config = _read_config(run_dir / "config.yaml")
    return CardFacts(_count_records(config, datamodule), _read_metrics(run_dir / "test_metrics.json"), config)


def _count_records(config: Mapping[str, Any], datamodule: ClaimsDataModule) -> dict[str, int]:
    data = config.get("data")
    if not isinstance(data, Mapping) or any(data.get(f"{name}_files") != datamodule.files[name] for name in _SPLITS):
        return {}
    try:
        datamodule.read("fit")
    except InputError as error:  # an adapter can outlive its records
        log.info("the model card has no numbers of records: %s", error)
        return {}
    return {name: len(datamodule.splits[name].examples) for name in _SPLITS}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no run, or a file that was edited: the card does without
        return {}
    return config if isinstance(config, dict) else {}


def _read_metrics(file: Path) -> dict[str, float]:
    try:
        metrics = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(metrics, dict):
        return {}
    return {str(name): value for name, value in metrics.items() if type(value) in (int, float)}
