"""TrainingModule: the optimizer steps of a LightningModule with an adapter.

    Batch -> hidden states -> loss at supervised positions -> nats x loss_weight x loss scale -> backward
    end of an accumulation window: gradients / loss scale -> norm, checked -> clipping -> AdamW -> scalars of this step

Only float16 has a loss scale (`loss_scale.py`). With it, a step whose gradients overflow is not taken: the next one has
the next records and the next learning rate.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_phi2.model.lora import gradients
from lit_phi2.model.loss import Loss, causal_lm_loss
from lit_phi2.model.phi2 import packed_forward
from lit_phi2.training.adapter_module import AdapterModule
from lit_phi2.training.loss_scale import LossScale, new_loss_scale
from lit_phi2.training.metrics import AccumulationWindow
from lit_phi2.training.overflow import describe_overflow
from lit_phi2.types import Batch


class TrainingModule(AdapterModule):
    """Steps of training; LitPhi2 sets the attributes below.

    Attributes:
        activation_checkpointing: recompute each block in backward.
        lora_plus_ratio: B has a learning rate of its own, which is logged.
        loss_scale: in float16 only.
        compiled: whether the operations of a block are compiled; None for a run that has not chosen yet.
        block_ops_due: they are set at the next batch.
    """

    activation_checkpointing: bool
    lora_plus_ratio: float | None
    loss_scale: LossScale | None = None
    compiled: bool | None = None
    block_ops_due = True
    _window_loss: float | None = None

    def begin_fit(self) -> None:
        """Forget what an earlier run left: a part of its accumulation window, and its loss scale."""
        self._window, self._window_loss = AccumulationWindow(), None
        self.loss_scale, self.block_ops_due = new_loss_scale(self.choose_dtype()[0]), True

    def loss(self, batch: Batch) -> Loss:
        """Summed nats and token counts of a batch."""
        assert batch.layout is not None
        hidden = packed_forward(
            self.fused_phi,
            batch.input_ids,
            batch.position_ids,
            segments=batch.layout.segments,
            activation_checkpointing=self.activation_checkpointing,
        )
        return causal_lm_loss(hidden, batch.labels, self.fused_phi.lm_head, batch.layout.scored)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout depends on the position alone, so a resumed run draws the same
        loss = self.loss(batch)
        self._window.add(loss, batch)
        return loss.nats * batch.loss_weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss if self.loss_scale is None else loss * self.loss_scale.scale, *args, **kwargs)

    def on_after_backward(self) -> None:
        assert self.phi is not None
        if self.loss_scale is not None and not self.trainer.fit_loop._should_accumulate():
            self.loss_scale.unscale_(gradients(self.phi))  # at a window's end, before hooks and clipping read them

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check and log the loss and gradient norm of the accumulation window, before the step is taken.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        assert self.phi is not None
        grad_norm = get_total_norm(gradients(self.phi)).item()
        step, loss_scale = self.trainer.global_step + 1, self.loss_scale  # the step about to be taken
        self._window_loss, num_tokens = self._window.close(
            self.trainer.strategy,
            grad_norm=grad_norm,
            step=step,
            can_skip=loss_scale is not None and loss_scale.can_shrink,
            describe_overflow=partial(describe_overflow, self.fused_phi),
        )
        if loss_scale is not None and math.isfinite(grad_norm):
            loss_scale.step_taken()
        elif loss_scale is not None:
            loss_scale.step_skipped(step)
            optimizer.zero_grad(set_to_none=True)  # without gradients AdamW changes neither weights nor its state
        if step % self.trainer.log_every_n_steps == 0:
            # Not in on_train_batch_end: a checkpoint may be written first there, without this step's values.
            values = {
                "train/loss": self._window_loss,
                "train/grad_norm": grad_norm,
                "train/supervised_tokens": num_tokens,
                "lr": optimizer.param_groups[0]["lr"],
            }
            if self.lora_plus_ratio is not None:
                values["lr_b"] = optimizer.param_groups[1]["lr"]
            if loss_scale is not None:
                values |= {"train/loss_scale": loss_scale.scale, "train/skipped_steps": len(loss_scale.skipped_steps)}
            self.log_scalars({name: value for name, value in values.items() if math.isfinite(value)}, step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True  # without it, a run that ends by max_steps has no last validation
        if self._window_loss is not None:  # this batch ends an accumulation window
            loss = torch.tensor(self._window_loss)  # on the CPU: Lightning would copy a float to the GPU, and back
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
            self._window_loss = None

    def log_scalars(self, values: dict[str, float], step: int | None = None) -> None:
        """Write values at an optimizer step, by default the current one: every x axis is optimizer steps."""
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step if step is None else step)
