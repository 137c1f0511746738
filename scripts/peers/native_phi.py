"""Native Phi: transformers' own Phi with PEFT's own LoRA, on q, k, v, fc1 and fc2, and the settings of HF's Trainer."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from peers.task import LEARNING_RATE, LORA_ALPHA, LORA_R, SEED, WEIGHT_DECAY, Ledger, Task

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]


def load_native_phi(base: str, dtype: str) -> Any:
    torch.manual_seed(SEED)
    phi = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), local_files_only=True)
    config = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=TARGET_MODULES, task_type="CAUSAL_LM")
    return get_peft_model(phi, config)


def training_arguments(task: Task, batch_size: int, accumulate: int, *, autocast: bool) -> dict[str, Any]:
    """Arguments of TrainingArguments and of SFTConfig."""
    return {
        "output_dir": str(task.scratch_dir / "hf"),  # nothing is saved there
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "cosine",
        "bf16": autocast and task.dtype == "bfloat16",
        "fp16": task.dtype == "float16",  # with its loss scale; the weights of LoRA are float32
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


class Clock(TrainerCallback):
    """Writes the times of an epoch into a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ledger.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ledger.end_step()
