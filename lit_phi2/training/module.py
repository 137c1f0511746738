"""LitPhi2: the LightningModule; it arranges loss, adapter and optimizer around Lightning's loops.

    Batch -> hidden states -> loss at supervised positions -> nats x loss_weight -> backward
    end of an accumulation window: gradient norm, checked -> clipping -> AdamW on LoRA weights -> scalars of this step

The constructor only keeps its arguments; `configure_model` loads the base. Lengths and fingerprints of a run come from
the data module through `protocols.py`.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_phi2.adapters.adapter import Adapter, check_adapter, make_adapter
from lit_phi2.adapters.checkpoint import adapter_to_state, read_adapter
from lit_phi2.generation.engine import Completion, generate
from lit_phi2.model.device import check_dtype, choose_dtype, disable_malloc_trim
from lit_phi2.model.loading import linear_layers, load_phi2
from lit_phi2.model.lora import (
    LoraSettings,
    PeftModel,
    adapter_state_dict,
    add_lora,
    check_targets,
    load_adapter_state_dict,
    trainable_parameters,
)
from lit_phi2.model.loss import Loss, causal_lm_loss
from lit_phi2.model.phi2 import FusedPhiForCausalLM, packed_forward
from lit_phi2.pretrained import load_tokenizer, resolve_base_model
from lit_phi2.training.arguments import check_fraction, check_minimum, check_positive
from lit_phi2.training.metrics import AccumulationWindow, EvalSums
from lit_phi2.training.optim import build_optimizer, build_schedule, total_steps
from lit_phi2.training.protocols import training_data
from lit_phi2.training.resume import generation_fingerprint, remap_batch_progress, run_fingerprint
from lit_phi2.types import Batch, PromptBatch
from lit_phi2.utils.files import tree_digest

log = logging.getLogger(__name__)


class LitPhi2(LightningModule):
    """Phi-2 with LoRA, trained on the responses of records.

    Args:
        base: tiny (packaged), a hub id such as microsoft/phi-2, or a folder in Hugging Face form.
        adapter: a checkpoint or a folder with an adapter, whose weights the run starts from at step 0.
        lora_r: rank of the adapter; 2 trains 0.08 % of Phi-2.
        lora_alpha: LoRA's update is scaled by lora_alpha / lora_r.
        lora_dropout: on the input of LoRA's update, while training.
        target_modules: linear layers that get an adapter.
        learning_rate: the peak, reached after warm-up; then cosine to zero.
        weight_decay: of AdamW.
        warmup_ratio: fraction of the optimizer steps.
        dtype: auto, bfloat16 or float32, of the frozen base and of matmuls; LoRA weights are float32.
        activation_checkpointing: recompute activations in backward instead of keeping them. Phi-2 over 512 tokens on a
            CPU: 6.9 GB instead of 8.0, 1.45 times as long.
        max_new_tokens: of a completion, in samples, test and predict.
        seed: linked from seed_everything.
    """

    def __init__(
        self,
        base: str = "tiny",
        adapter: str | None = None,
        lora_r: int = 2,
        lora_alpha: int = 4,
        lora_dropout: float = 0.0,
        target_modules: list[str] = ["Wqkv", "fc1", "fc2"],  # noqa: B006  jsonargparse shows it in --help; never mutated
        learning_rate: float = 2e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.03,
        dtype: str = "auto",
        activation_checkpointing: bool = False,
        max_new_tokens: int = 256,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        check_minimum(1, lora_r=lora_r, lora_alpha=lora_alpha, max_new_tokens=max_new_tokens)
        check_minimum(0, weight_decay=weight_decay)
        check_fraction(lora_dropout=lora_dropout, warmup_ratio=warmup_ratio)
        check_positive(learning_rate=learning_rate)
        self.base = base
        self.adapter = adapter
        self.lora_settings = LoraSettings(lora_r, lora_alpha, tuple(target_modules))
        self.lora_dropout = lora_dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.compute_dtype = dtype
        self.activation_checkpointing = activation_checkpointing
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.strict_loading = False  # a checkpoint has no base weights; load_adapter_state_dict checks those it has
        self.phi: PeftModel | None = None
        self.eos_token_id = -1
        self.eval_sums = EvalSums()  # of validation or test, which never run at once
        self._window = AccumulationWindow()
        self._window_loss: float | None = None

    # The model

    def check(self) -> None:
        """Find the base, and compare targets and initial adapter with it, without loading its weights.

        Raises:
            InputError: the base, a target or the initial adapter cannot be used.
        """
        self._base_model = resolve_base_model(self.base)
        self._linear_layers = linear_layers(self._base_model)
        check_targets(self.lora_settings.target_modules, self._linear_layers, max(self._linear_layers.values()))
        if self.adapter is not None:
            self._initial_adapter = read_adapter(Path(self.adapter))
            check_adapter(self._initial_adapter, self.lora_settings, self._base_model, source=self.adapter)

    def configure_model(self) -> None:
        """Load the base, freeze it in the compute dtype and add the adapter; a second call does nothing.

        Raises:
            InputError: see check.
        """
        if self.phi is not None:
            return
        self.check()
        device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
        dtype, reason = choose_dtype(self.compute_dtype, device)
        log.info("device %s, compute dtype %s: %s", device, str(dtype).removeprefix("torch."), reason)
        if device.type == "cpu":
            disable_malloc_trim()
        torch.manual_seed(self.seed)  # A is initialized at random; earlier draws must not change it
        self.phi = add_lora(load_phi2(self._base_model, dtype), self.lora_settings, dropout=self.lora_dropout)
        self.eos_token_id = int(load_tokenizer(self._base_model).eos_token_id)
        if self.adapter is not None:
            load_adapter_state_dict(self.phi, self._initial_adapter.weights, source=self.adapter)
        # from_pretrained returns eval mode and Lightning keeps the modes it finds, so without this the base's own
        # dropout, part of Phi-2's recipe, would be off.
        self.phi.train()
        trained = sum(parameter.numel() for parameter in trainable_parameters(self.phi).values())
        total = sum(parameter.numel() for parameter in self.phi.parameters())
        log.info(
            "base %s, %d layers; LoRA r=%d on %s trains %s, %s are frozen",
            self.base,
            max(self._linear_layers.values()),
            self.lora_settings.lora_r,
            ", ".join(self.lora_settings.target_modules),
            f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)",
            f"{total - trained:,}",
        )

    @property
    def fused_phi(self) -> FusedPhiForCausalLM:
        """The base with the adapter in its layers."""
        assert self.phi is not None
        model = self.phi.get_base_model()
        assert isinstance(model, FusedPhiForCausalLM)
        return model

    def loss(self, batch: Batch) -> Loss:
        """Summed nats and token counts of a batch."""
        hidden = packed_forward(
            self.fused_phi,
            batch.input_ids,
            batch.position_ids,
            activation_checkpointing=self.activation_checkpointing,
        )
        return causal_lm_loss(hidden, batch.labels, self.fused_phi.lm_head)

    def trained_adapter(self) -> Adapter:
        """A copy of the adapter at this step."""
        assert self.phi is not None
        return make_adapter(self._base_model, self.lora_settings, adapter_state_dict(self.phi))

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout depends on the position alone, so a resumed run draws the same
        loss = self.loss(batch)
        self._window.add(loss, batch.record_ids)
        return loss.nats * batch.loss_weight

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check and log the loss and gradient norm of the accumulation window, before the step is taken.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        assert self.phi is not None
        gradients = [p.grad for p in trainable_parameters(self.phi).values() if p.grad is not None]
        grad_norm = get_total_norm(gradients).item()
        step = self.trainer.global_step + 1  # the step about to be taken
        self._window_loss, num_tokens = self._window.close(self.trainer.strategy, grad_norm=grad_norm, step=step)
        if step % self.trainer.log_every_n_steps == 0:
            # Not in on_train_batch_end: a checkpoint may be written first there, without this step's values.
            values = {
                "train/loss": self._window_loss,
                "train/grad_norm": grad_norm,
                "train/supervised_tokens": num_tokens,
                "lr": optimizer.param_groups[0]["lr"],
            }
            self.log_scalars(values, step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True  # without it, a run that ends by max_steps has no last validation
        if self._window_loss is not None:  # this batch ends an accumulation window
            self.log("loss", self._window_loss, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
            self._window_loss = None

    def log_scalars(self, values: dict[str, float], step: int | None = None) -> None:
        """Write values at an optimizer step, by default the current one: every x axis is optimizer steps."""
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step if step is None else step)

    def configure_optimizers(self) -> dict[str, Any]:
        assert self.phi is not None
        parameters = trainable_parameters(self.phi).values()
        optimizer = build_optimizer(parameters, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        schedule = build_schedule(optimizer, warmup_ratio=self.warmup_ratio, total_steps=self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            InputError: the Trainer's limits leave none, or there is no limit.
        """
        steps_per_epoch = training_data(self.trainer).steps_per_epoch()
        return total_steps(steps_per_epoch, self.trainer.max_epochs, self.trainer.max_steps)

    # Evaluation and prediction

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._update_metrics(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._update_metrics(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_eval_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval_metrics("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Completion]:
        return self.generate(batch.prompts)

    def generate(self, prompts: list[list[int]]) -> list[Completion]:
        """Greedy completions of prompts, in their order."""
        return generate(self.fused_phi, prompts, eos_token_id=self.eos_token_id, max_new_tokens=self.max_new_tokens)

    def _update_metrics(self, batch: Batch) -> None:
        self.eval_sums.add(self.loss(batch))

    def _log_eval_metrics(self, stage: str) -> None:
        total = self.eval_sums.close()
        loss, accuracy = total.nats / total.num_tokens, total.num_correct / total.num_tokens
        values = {f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp(), f"{stage}/token_accuracy": accuracy}
        self.log_dict(values, logger=False)  # for checkpoints and early stopping
        if self.trainer.state.fn == "fit":
            # Not by log_dict: Lightning drops values logged before the first step, which is the step-0 baseline.
            self.log_scalars({name: value.item() for name, value in values.items()})
            log.info("step %d  val/loss %.4f  val/token_accuracy %.4f", self.trainer.global_step, loss, accuracy)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adapter = self.trained_adapter()
        checkpoint["state_dict"] = adapter.weights
        checkpoint["lit_phi2"] = {
            **adapter_to_state(adapter),
            "run": self.run_fingerprint(),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }
        checkpoint["digest"] = tree_digest(checkpoint)  # Lightning calls this hook last, so it covers everything

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.phi is not None
        load_adapter_state_dict(self.phi, checkpoint["state_dict"], source="--ckpt_path")
        data = training_data(self.trainer)
        remap_batch_progress(
            checkpoint,
            accumulate=data.batching().accumulate,
            steps_per_epoch=data.steps_per_epoch(),
            batches_per_epoch=data.num_training_batches(),
        )
        checkpoint["state_dict"] = {}  # leave Lightning nothing to load

    def run_fingerprint(self) -> dict[str, Any]:
        """Every setting that a resumed run must share, by config key."""
        model = {
            "base": self._base_model.digest,  # wherever the base is stored now
            **asdict(self.lora_settings),
            "target_modules": list(self.lora_settings.target_modules),
            **{name: getattr(self, name) for name in ("lora_dropout", "learning_rate", "weight_decay", "warmup_ratio")},
        }
        return run_fingerprint(
            model,
            compute_dtype=choose_dtype(self.compute_dtype, self.trainer.strategy.root_device)[0],
            gradient_clip_val=self.trainer.gradient_clip_val,
            total_steps=self.total_steps(),
            data=training_data(self.trainer).fingerprint(),
        )

    def generation_fingerprint(self) -> dict[str, Any]:
        """Everything that decides the completion of a prompt."""
        return generation_fingerprint(
            base_digest=self._base_model.digest,
            adapter=None if self.adapter is None else self._initial_adapter.weights,
            compute_dtype=choose_dtype(self.compute_dtype, self.trainer.strategy.root_device)[0],
            max_new_tokens=self.max_new_tokens,
        )
