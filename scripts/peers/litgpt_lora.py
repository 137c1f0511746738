"""LitGPT's LoRA model, loss and loop (litgpt/finetune/lora.py); micro-batches are padded to their longest record.

folder in Hugging Face form -> convert -> Task.litgpt_dir -> load
"""

import json
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812  LitGPT's own name for it
import torch
from litgpt import lora, model  # type: ignore[import-not-found]  # in an environment of its own
from litgpt.config import Config  # type: ignore[import-not-found]
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # type: ignore[import-not-found]
from litgpt.utils import (  # type: ignore[import-not-found]
    chunked_cross_entropy,
    load_checkpoint,
    save_config,
)
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR

from peers.task import (
    IGNORE_INDEX,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_R,
    NUM_CHECKED,
    SEED,
    WEIGHT_DECAY,
    LoadedPeer,
    Task,
)


def convert(task: Task) -> None:
    """Write the base in LitGPT's form with LitGPT's own converter, once, and check that no weight is left out."""
    folder, base = task.litgpt_dir, Path(task.base)
    if (folder / "converted").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]:
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    convert_hf_checkpoint(folder, model_name="phi-2")
    config = _config_of(base)
    save_config(config, folder)
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in model.GPT(config).state_dict().items()}
    weights = torch.load(folder / "lit_model.pth", mmap=True)
    # Its trainer loads with strict=False, which would leave out an unknown weight without a message.
    if expected != {name: weight.shape for name, weight in weights.items()}:
        raise SystemExit("the converted weights are not those of LitGPT's model")
    (folder / "converted").touch()


def _config_of(base: Path) -> Any:
    phi = json.loads((base / "config.json").read_text("utf-8"))
    return Config.from_name(
        "phi-2",  # the converter writes the shape of the real Phi-2; this base may have fewer layers
        n_layer=phi["num_hidden_layers"],
        n_embd=phi["hidden_size"],
        n_head=phi["num_attention_heads"],
        intermediate_size=phi["intermediate_size"],
        block_size=phi["max_position_embeddings"],
        padded_vocab_size=phi["vocab_size"],
        rotary_percentage=(phi.get("rope_parameters") or phi)["partial_rotary_factor"],
    )


def load(task: Task, *, batch_size: int, reuse: Any = None) -> LoadedPeer:
    """Load the converted base.

    Args:
        task: what to train.
        batch_size: records in a micro-batch.
        reuse: fabric, model and optimizer of an earlier load.
    """
    if reuse is None:
        precision: Any = "bf16-true" if task.dtype == "bfloat16" else "32-true"
        fabric = L.Fabric(accelerator=task.device, devices=1, precision=precision)
        fabric.seed_everything(SEED)
        phi, optimizer = _lora_model(task, fabric)
    else:
        fabric, phi, optimizer = reuse
    phi.max_seq_length = max(len(example.ids) for example in task.examples)
    scheduler = CosineAnnealingLR(optimizer, T_max=len(task.examples) // task.records_per_step)
    accumulate = task.records_per_step // batch_size

    def nats() -> list[float]:
        phi.eval()
        losses = []
        with torch.no_grad():
            for example in task.examples[:NUM_CHECKED]:
                logits = phi(torch.tensor([example.ids], device=fabric.device))[0, :-1].float()
                targets = torch.tensor(example.labels[1:], device=fabric.device)
                losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
        return losses

    def train() -> None:
        phi.train()
        order = torch.randperm(len(task.examples)).tolist()
        task.ledger.begin()
        for number in range(1, len(task.examples) // batch_size + 1):
            batch = [task.examples[index] for index in order[(number - 1) * batch_size : number * batch_size]]
            input_ids = pad_sequence([torch.tensor(example.ids) for example in batch], batch_first=True)
            targets = pad_sequence([torch.tensor(example.labels) for example in batch], True, IGNORE_INDEX)
            tokens = sum(len(example.ids) for example in batch)
            task.ledger.add(len(batch), tokens, int((targets != IGNORE_INDEX).sum()), int(input_ids.sum()))
            input_ids, targets = input_ids.to(fabric.device), targets.to(fabric.device)
            # From here to the end of the step: the lines of finetune/lora.py, 0.5.13.
            is_accumulating = number % accumulate != 0
            with fabric.no_backward_sync(phi, enabled=is_accumulating):
                logits = phi(input_ids, lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, targets[..., 1:])
                fabric.backward(loss / accumulate)
            if not is_accumulating:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                task.ledger.end_step()

    return LoadedPeer(phi, nats, train, reusable=(fabric, phi, optimizer))


def _lora_model(task: Task, fabric: Any) -> tuple[Any, Any]:
    """LitGPT's model with the adapter, and its optimizer."""
    config = lora.Config.from_file(
        task.litgpt_dir / "model_config.yaml",
        lora_r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_mlp=True,
    )
    with fabric.init_module(empty_init=False):
        phi = lora.GPT(config)
    lora.mark_only_lora_as_trainable(phi)
    phi = fabric.setup_module(phi)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(phi.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    )
    load_checkpoint(fabric, phi, task.litgpt_dir / "lit_model.pth", strict=False)
    return phi, optimizer
