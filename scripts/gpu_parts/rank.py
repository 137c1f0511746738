"""Rank: one of the processes of the part `processes`: a short run, in float32, whose gradients and weights it saves.

    Run: world size, rank, backend  ->  fit  ->  RESULT.pt of rank 0: gradients of the first step, last weights

Every rank is a node with one device, so several of them share a card.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from gpu_parts.settings import Settings
from lit_phi2.data.datamodule import ClaimsDataModule
from lit_phi2.model.lora import adapter_state_dict, trainable_parameters
from lit_phi2.training.module import LitPhi2
from lit_phi2.training.trainer import Trainer

RUN_VARIABLE = "GPU_CHECK_RUN"
ROWS_PER_STEP = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A process of a run.

    Attributes:
        result: file that rank 0 writes.
        world_size: processes.
        rank: below it.
        backend: of torch.distributed; empty for a run without it.
    """

    result: str
    world_size: int = 1
    rank: int = 0
    backend: str = ""

    def variables(self, port: int) -> dict[str, str]:
        """Environment variables of the process."""
        launch = {"NODE_RANK": str(self.rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return launch | {RUN_VARIABLE: json.dumps(asdict(self))}


class FirstGradients(Callback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LitPhi2, optimizer: Any) -> None:
        if not self.gradients and pl_module.phi is not None:
            parameters = trainable_parameters(pl_module.phi)
            self.gradients = {name: p.grad.cpu().clone() for name, p in parameters.items() if p.grad is not None}


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Be the process that the environment names."""
    run = Run(**json.loads(os.environ[RUN_VARIABLE]))
    fit(settings, run)
    yield {"backend": torch.distributed.get_backend(), "world_size": torch.distributed.get_world_size()}


def fit(settings: Settings, run: Run) -> None:
    """Train for a few steps, the same with any number of processes."""
    base = str(settings.base_dir) if settings.tiny else "tiny"
    module = LitPhi2(base=base, lora_r=4, lora_alpha=8, dtype="float32", max_new_tokens=4)
    module.configure_model()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # every rank draws its own
    data = ClaimsDataModule(
        train_files="claims:train[:24]", val_files="claims:validation[:4]", max_length=1024, base=base, max_new_tokens=4
    )
    gradients = FirstGradients()
    trainer = Trainer(
        default_root_dir=Path(run.result).with_suffix(""),
        accelerator=settings.device,
        devices=1,
        num_nodes=run.world_size,
        strategy=DDPStrategy(process_group_backend=run.backend) if run.backend else "auto",
        callbacks=[gradients],
        max_epochs=1,
        accumulate_grad_batches=ROWS_PER_STEP // run.world_size,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    assert module.phi is not None
    if run.rank == 0:
        torch.save({"gradients": gradients.gradients, "weights": adapter_state_dict(module.phi)}, run.result)
