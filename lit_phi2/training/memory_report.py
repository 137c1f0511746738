"""Memory report: the memory plan of a run as `inspect` prints it, and what its layers lose in 8 bits.

memory  base tiny, 6.8 M parameters, float32; rows 1 x 1,024 tokens; 32 completions of up to 962 tokens
                             fit     predict
  weights                  27 MB       27 MB
  ...
  needed                  0.9 GB      1.0 GB
  peak                    0.9 GB      1.0 GB   also with the copy of the weights that decoding makes where it fits

  this device, cpu       19.8 GB   fits
  8 GB card, bfloat16     8.6 GB   fits
"""

from collections.abc import Sequence

import psutil
import torch

from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.data.splits import Split
from lit_phi2.data.summary import report
from lit_phi2.errors import InputError
from lit_phi2.generation.capacity import DEFAULT_SLOTS
from lit_phi2.generation.weights import available_memory
from lit_phi2.model.calibration import format_table
from lit_phi2.model.device import card_memory, choose_dtype
from lit_phi2.model.lora import check_targets
from lit_phi2.model.loss import logits_limit
from lit_phi2.pretrained import read_model_config, resolve_base_model
from lit_phi2.training.memory_plan import CONTEXT_BYTES, Plan, changes_to_fit, plan_fit, plan_predict
from lit_phi2.training.memory_terms import PhiSizes, Workload
from lit_phi2.training.module import LitPhi2

CARDS_GIB = (8, 16, 24, 80)
_NOTES = {
    "activations": "saved for backward",
    "work space": "of one block; in predict of a pass over prompts",
    "logits": "one chunk of the vocabulary",
    "cache": "keys and values",
    "program": "Python, libraries, records",
}


def inspection(
    model: LitPhi2, data: ClaimsDataModule, warnings: Sequence[str], what: str, *, remove_unused_caches: bool
) -> str:
    """What `inspect` prints.

    Args:
        model: from the config.
        data: after `read`.
        warnings: of `read`.
        what: data, or quantization for what each layer loses in 8 bits; the base is loaded for it.
        remove_unused_caches: also remove the caches that no run uses.

    Raises:
        InputError: what is neither.
    """
    if what == "data":
        memory = memory_report(model, data)
        return report(data, warnings, remove_unused_caches=remove_unused_caches, memory=memory)
    if what != "quantization":
        raise InputError(f"--what: is {what!r}; expected data or quantization.")
    model.quantization = "int8"
    model.configure_model()
    assert model.quantization_table is not None
    return format_table(model.quantization_table)


def memory_report(model: LitPhi2, data: ClaimsDataModule) -> str:
    """The plan on this device, and whether fit and predict fit it and cards of 8 to 80 GB.

    Raises:
        InputError: the base, a target or the dtype cannot be used.
    """
    base = resolve_base_model(model.base)
    phi = PhiSizes.from_config(read_model_config(base))
    targets = model.lora_settings.target_modules
    check_targets(targets, dict.fromkeys(phi.linear_layers, phi.num_layers), phi.num_layers)
    device = model.target_device()
    dtype = choose_dtype(model.compute_dtype, device, phi.num_parameters)[0]
    work = workload(model, data, dtype, device.type, card_memory(device))
    program, memory = program_bytes(device), device_bytes(device)
    plans = [plan(phi, work, program, memory) for plan in (plan_fit, plan_predict)]
    weights = _name(dtype) + (", int8" if work.quantized else "")
    title = (
        f"memory  base {base.name}, {phi.num_parameters / 1e6:,.1f} M parameters, {weights}; rows {work.rows} x "
        f"{work.row_length:,} tokens; {plans[1].slots} completions of up to {work.max_new_tokens:,} new tokens"
    )
    lines = [title, *_table(*plans), "", _verdict(f"this device, {device.type}", phi, work, program, memory)]
    for size in CARDS_GIB:
        card_dtype = torch.bfloat16 if model.compute_dtype == "auto" else dtype
        work = workload(model, data, card_dtype, "cuda", size * 2**30)
        lines.append(_verdict(f"{size} GB card, {_name(card_dtype)}", phi, work, CONTEXT_BYTES["cuda"], size * 2**30))
    return "\n".join(lines)


def workload(model: LitPhi2, data: ClaimsDataModule, dtype: torch.dtype, device_type: str, memory: int) -> Workload:
    """The longest row and the longest prompt of the splits that are set up, on a device with that much memory."""
    train = data.splits["train"]
    longest = int(train.lengths.max())
    row_length = min(data.max_length, int(train.lengths.sum())) if data.packing else longest
    supervised = row_length if data.packing else int(train.supervised.max())
    settings = model.lora_settings
    return Workload(
        dtype,
        device_type,
        settings.lora_r,
        settings.target_modules,
        model.lora_dropout,
        model.activation_checkpointing,
        data.batch_size,
        row_length,
        supervised,
        longest,
        max(longest_prompt(split) for split in data.splits.values()),
        model.max_new_tokens,
        model.max_slots or DEFAULT_SLOTS[device_type],
        model.quantization is not None,
        logits_limit(device_type, memory),
    )


def longest_prompt(split: Split) -> int:
    """Tokens."""
    return int((split.lengths - split.supervised).max())


def program_bytes(device: torch.device) -> int:
    """What a run takes on a device beside weights and tensors; on a CPU also what this process has taken already."""
    if device.type == "cuda":
        return CONTEXT_BYTES["cuda"]
    return CONTEXT_BYTES.get(device.type, 0) + int(psutil.Process().memory_info().rss)


def device_bytes(device: torch.device) -> int:
    """Bytes that a run can have: of a card all, of this machine what others leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return available_memory(device) + int(psutil.Process().memory_info().rss)


def _table(fit: Plan, predict: Plan) -> list[str]:
    lines = [f"  {'':<22}{'fit':>10}{'predict':>10}"]
    for name in dict.fromkeys([*fit.terms, *predict.terms]):
        cells = [format_bytes(plan.terms[name]) if name in plan.terms else "-" for plan in (fit, predict)]
        lines.append(f"  {name:<22}{cells[0]:>10}{cells[1]:>10}   {_NOTES.get(name, '')}".rstrip())
    lines.append(f"  {'needed':<22}{format_bytes(fit.needed):>10}{format_bytes(predict.needed):>10}")
    peaks = f"  {'peak':<22}{format_bytes(fit.peak):>10}{format_bytes(predict.peak):>10}"
    return [*lines, f"{peaks}   with a copy of the weights for completions, made where it fits"]


def _verdict(name: str, phi: PhiSizes, work: Workload, program: int, memory: int) -> str:
    """One line: fits, or what to change."""
    changes = changes_to_fit(phi, work, program, memory)
    fit = plan_fit(phi, work, program, memory)
    if changes is None:
        fit_text = f"fit does not fit: {format_bytes(fit.needed)}; no key is enough, take a smaller base"
    elif changes:
        fit_text = f"fit does not fit: {format_bytes(fit.needed)}; set {', '.join(changes)}"
    else:
        fit_text = "fit fits"
    predict = plan_predict(phi, work, program, memory)
    if predict.needed > memory:
        predict_text = f"predict does not fit: {format_bytes(predict.needed)}; set {_predict_change(work)}"
    elif predict.slots < work.slots:
        predict_text = (
            f"predict fits with {predict.slots} of {work.slots} slots; a smaller model.max_new_tokens has more"
        )
    else:
        predict_text = f"predict fits with {work.slots} slots"
    return f"  {name:<22}{format_bytes(memory):>10}   {fit_text}; {predict_text}"


def _predict_change(work: Workload) -> str:
    if work.dtype == torch.float32:
        return "model.dtype bfloat16"
    return "a smaller base or model.max_new_tokens" if work.quantized else "model.quantization int8"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_bytes(num_bytes: int) -> str:
    """
    >>> format_bytes(1_340_000_000), format_bytes(70_400_000)
    ('1.3 GB', '70 MB')
    """
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
