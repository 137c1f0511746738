"""Training: lit_phi2, HF Trainer + PEFT and, where it is installed, LitGPT, on full rows of every length.

for each length: contenders.py -> tokens/s, share of the matmul rate, peak memory beside the plan, speedup
then one optimizer step of lit_phi2 under torch's profiler, and a block with compiled operations beside torch's own
"""

import importlib.util
from collections.abc import Iterator
from statistics import median
from typing import Any

from gpu_parts.blocks import measure_blocks
from gpu_parts.contenders import Arena, Contender
from gpu_parts.machine import compute_dtype
from gpu_parts.settings import Settings
from gpu_parts.step_profile import profile_step
from peers.registry import PEERS, Peer

LOSS_TOLERANCE = 0.02  # of the loss before training: the peers round in other places
PLAN_TOLERANCE = 0.10  # of the memory plan, beside what torch allocated


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure all.

    Raises:
        SystemExit: a peer failed, they do not have the same loss before training, or a record was not trained exactly
            once.
    """
    dtype = compute_dtype(settings)
    contenders = {"lit_phi2": lit_phi2(settings, dtype), "hf_trainer": hf_trainer(dtype)}
    missing = add_litgpt(contenders, settings, dtype)
    yield {"dtype": dtype, "not_measured": missing}
    arena = Arena(settings, contenders)
    yield from measure_lengths(arena, LOSS_TOLERANCE)


def measure_lengths(arena: Arena, tolerance: float) -> Iterator[dict[str, Any]]:
    """All lengths, then the profile of a step of the last contender of lit_phi2.

    Raises:
        SystemExit: see measure; after everything is measured.
    """
    lengths: dict[str, Any] = {}
    for length in arena.settings.lengths:
        for results in arena.measure(length):
            lengths[str(length)] = results
            yield {"lengths": lengths, "summary": summarize(lengths)}
    length = arena.settings.lengths[0]
    name = [name for name, contender in arena.contenders.items() if contender.is_ours][-1]
    contender, rows = arena.contenders[name], lengths[str(length)][name]["rows"]
    yield {"profile": profile_step(arena, contender, length, rows)}
    yield {"blocks": measure_blocks(arena, contender, length, rows)}
    for results in lengths.values():
        check_results(results, tolerance)


def lit_phi2(settings: Settings, dtype: str) -> Contender:
    """lit_phi2; on CUDA with torch's own elementwise operations or with compiled ones, whichever are faster."""
    variants: dict[str, dict[str, Any]] = {"": {}}
    if settings.device == "cuda":
        variants["compiled"] = {"compiled": True}
    return Contender(PEERS["ours"], dtype, variants)


def hf_trainer(dtype: str) -> Contender:
    """HF Trainer with transformers' Phi, whose attention is torch's sdpa, which is the flash kernel on CUDA."""
    variants: dict[str, dict[str, Any]] = {"": {}}
    if dtype == "bfloat16":
        variants = {"16-bit weights": {}, "autocast": {"autocast": True}}
    return Contender(Peer("hf", "hf_trainer"), dtype, variants)


def add_litgpt(contenders: dict[str, Contender], settings: Settings, dtype: str) -> dict[str, str]:
    """Add LitGPT, or say why not."""
    if importlib.util.find_spec("litgpt") is None:
        return {"litgpt": "it is not installed here"}
    if dtype == "float16":
        return {"litgpt": "its LoRA has no loss scale"}
    from peers.litgpt_lora import convert
    from peers.task import Ledger, Task

    convert(
        Task(str(settings.base_dir), [], dtype, settings.device, 1, 1, Ledger("cpu"), settings.work_path / "litgpt")
    )
    contenders["litgpt"] = Contender(Peer("litgpt", "litgpt_lora"), dtype)
    return {}


def check_results(results: dict[str, Any], tolerance: float) -> None:
    """Refuse contenders that failed or that do not compute the same, and a memory plan that is wrong.

    Raises:
        SystemExit: names them, or their losses before training, or how far the plan is off.
    """
    if failed := {name: result["failed"] for name, result in peers_of(results).items() if "failed" in result}:
        raise SystemExit(f"failed: {failed}")
    losses = {name: result["loss_before"] for name, result in peers_of(results).items()}
    first = next(iter(losses.values()))
    if any(not abs(loss / first - 1) <= tolerance for loss in losses.values()):
        raise SystemExit(f"the losses before training differ: {losses}")
    deviations = {name: result.get("plan_deviation", 0.0) for name, result in peers_of(results).items()}
    if any(abs(deviation) > PLAN_TOLERANCE for deviation in deviations.values()):
        raise SystemExit(f"the memory plan is more than {PLAN_TOLERANCE:.0%} off: {deviations}")


def peers_of(results: dict[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in results.items() if isinstance(result, dict)}


def summarize(lengths: dict[str, Any]) -> str:
    """One line: for every length the speed of each, its share of the matmul rate, and how it compares to the first."""
    lines = []
    for length, results in lengths.items():
        measured = {name: result for name, result in peers_of(results).items() if result.get("tokens_per_second")}
        texts = [
            f"{name} {median(result['tokens_per_second']):,.0f} tokens/s ({result['matmul_share']:.2f})"
            for name, result in measured.items()
        ]
        if texts:
            lines.append(f"{length}: {', '.join(texts)}")
    return "; ".join(lines)
