"""Quantization check: what 8 bits change in gradients and losses, with planted outliers too, and two runs side by side.

python scripts/quantization_check.py gradients --base tiny [--adapter FOLDER]    cosines of every LoRA gradient
python scripts/quantization_check.py outliers                                    the loss with planted channels
python scripts/quantization_check.py curves WHOLE_RUN INT8_RUN                   -> scripts/measurements/int8.json

gradients  the same packaged records on the base in float32 and in int8
outliers   two channels of the normalized input are 20 or 100 times as large, and the weights that read them as much
           smaller, in one block or in all: floating point computes the same; int8 with and without outlier columns
curves     train/loss and val/loss of two run folders, for scripts/plots.py
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_phi2.adapters.checkpoint import read_adapter
from lit_phi2.data.collate import collate
from lit_phi2.data.encode import encode
from lit_phi2.data.records import ReadOptions, read_records
from lit_phi2.model.calibration import calibrate, describe_table
from lit_phi2.model.loading import load_phi2
from lit_phi2.model.lora import LoraSettings, add_lora, load_adapter_state_dict, trainable_parameters
from lit_phi2.model.loss import causal_lm_loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.pretrained import BaseModel, load_tokenizer, resolve_base_model
from lit_phi2.types import Batch
from measurement import ROOT, write_measurement

TARGETS = ("Wqkv", "fc1", "fc2")
FACTORS, CHANNELS = (20.0, 100.0), [7, 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    gradients_parser = parts.add_parser("gradients")
    gradients_parser.add_argument("--base", default="tiny")
    gradients_parser.add_argument("--adapter", help="folder; without it B is drawn at random")
    gradients_parser.add_argument("--records", type=int, default=8)
    outliers_parser = parts.add_parser("outliers")
    outliers_parser.add_argument("--records", type=int, default=64)
    curves_parser = parts.add_parser("curves")
    curves_parser.add_argument("runs", type=Path, nargs=2, help="folder of a run without and of one with int8")
    curves_parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "measurements" / "int8.json")
    args = parser.parse_args()
    if args.part == "gradients":
        gradients(resolve_base_model(args.base), args.adapter, args.records)
    elif args.part == "outliers":
        outliers(args.records)
    else:
        curves(args.runs, args.output)


def gradients(base: BaseModel, adapter: str | None, num_records: int) -> dict[str, float]:
    """Print loss and cosines; returns the cosines' least, fifth percentile and median."""
    batch, examples = _records(base, num_records)
    found: list[dict[str, Tensor]] = []
    for quantize in (False, True):
        phi = load_phi2(base, torch.float32, quantize=quantize)
        if quantize:
            print(describe_table(calibrate(phi, base, examples)))
        saved = read_adapter(Path(adapter)) if adapter else None
        settings = saved.settings if saved else LoraSettings(16, 32, TARGETS)
        torch.manual_seed(0)  # of A
        model = add_lora(phi, settings, dropout=0.0).eval()
        if saved:
            load_adapter_state_dict(model, saved.weights, source=str(adapter))
        else:
            _draw_b(model)
        loss = causal_lm_loss(packed_forward(phi, batch.input_ids, batch.position_ids), batch.labels, phi.lm_head)
        loss.nats.backward()
        print(f"{'int8' if quantize else 'float32'}: loss {loss.nats.item() / loss.num_tokens.item():.5f}")
        found.append({name: p.grad.flatten() for name, p in trainable_parameters(model).items() if p.grad is not None})
    cosines = [torch.cosine_similarity(found[0][name], found[1][name], 0).item() for name in found[0]]
    result = {"least": min(cosines), "5 %": quantiles(cosines, n=20)[0], "median": median(cosines)}
    print(f"cosine of {len(cosines)} gradients: " + ", ".join(f"{name} {value:.5f}" for name, value in result.items()))
    return result


def outliers(num_records: int) -> list[tuple[float, float, float]]:
    """Print and return losses of the tiny base: in float32, in int8 as it is, in int8 with outlier columns."""
    tiny, rows = resolve_base_model("tiny"), []
    num_layers = load_phi2(tiny, torch.float32).config.num_hidden_layers
    batch, examples = _records(tiny, num_records)
    print("| factor | blocks | float32 | int8 without outlier columns | int8 |\n|---|---|---|---|---|")
    for factor in FACTORS:
        for blocks in (1, num_layers):
            with tempfile.TemporaryDirectory() as folder:
                base = resolve_base_model(str(plant(tiny.folder, Path(folder) / "base", factor, blocks)))
                whole, quantized = load_phi2(base, torch.float32), load_phi2(base, torch.float32, quantize=True)
                losses = [_loss(whole, batch), _loss(quantized, batch)]
                calibrate(quantized, base, examples)
                losses.append(_loss(quantized, batch))
            rows.append((losses[0], losses[1], losses[2]))
            changes = [f"{loss:.5f} ({loss / losses[0] - 1:+.2%})" for loss in losses[1:]]
            print(f"| {factor:.0f} | {blocks} | {losses[0]:.5f} | {' | '.join(changes)} |")
    return rows


def plant(source: Path, folder: Path, factor: float, num_blocks: int) -> Path:
    """A copy of a base that computes the same with channels that are larger by a factor."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for block in range(num_blocks):
        prefix = f"model.layers.{block}."
        for name in ("weight", "bias"):
            weights[f"{prefix}input_layernorm.{name}"][CHANNELS] *= factor
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
            weights[f"{prefix}{name}.weight"][:, CHANNELS] /= factor
    save_file(
        {name: weight.float() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def curves(runs: list[Path], output: Path) -> None:
    """Write the losses of two runs by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    measured: dict[str, Any] = {}
    for name, run in zip(("float32", "int8"), runs, strict=True):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        measured[name] = {
            tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in ("train/loss", "val/loss")
        }
        train = [value for _, value in measured[name]["train/loss"]]
        val = measured[name]["val/loss"][-1]
        last = train[-(len(train) // 4) :]
        print(f"{name}: mean train/loss of the last quarter {mean(last):.4f}, val/loss {val[1]:.4f} at step {val[0]}")
    write_measurement(output, "int8", {"runs": measured})
    print(output)


def _records(base: BaseModel, count: int) -> tuple[Batch, list[list[int]]]:
    """Packaged validation records as one batch of a record a row, and their ids."""
    records, _ = read_records([f"claims:validation[:{count}]"], ReadOptions(), needs_response=True)
    examples = encode(records, load_tokenizer(base), max_length=512, on_overlong="truncate").examples
    return collate(examples, [(index,) for index in range(len(examples))]), [example.ids for example in examples]


@torch.no_grad()
def _loss(phi: FusedPhiForCausalLM, batch: Batch) -> float:
    loss = causal_lm_loss(packed_forward(phi, batch.input_ids, batch.position_ids), batch.labels, phi.lm_head)
    return loss.nats.item() / loss.num_tokens.item()


def _draw_b(model: Any) -> None:
    """B is zero in a new adapter, and A then has no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


if __name__ == "__main__":
    main()
