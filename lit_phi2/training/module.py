"""LitPhi2: the LightningModule; it only arranges loss, adapter and optimizer around Lightning's loops.

    Batch -> hidden states -> loss of its supervised positions -> nats x share -> backward
    window's end: gradient norm, checked -> clipping -> AdamW on LoRA weights -> curves at this optimizer step

Building is not loading: the constructor keeps its arguments, and the base is loaded in `configure_model`.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from lit_phi2.adapters.adapter import Adapter, check_adapter, describe
from lit_phi2.adapters.checkpoint import adapter_to_state, read_adapter
from lit_phi2.errors import InputError, NonFiniteError
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
from lit_phi2.training.optim import warmup_then_cosine
from lit_phi2.types import Batch, PromptBatch
from lit_phi2.utils.files import tree_digest

log = logging.getLogger(__name__)


class LitPhi2(LightningModule):
    """Phi-2 with LoRA, trained on the responses of records.

    Args:
        base: tiny (packaged), a hub id such as microsoft/phi-2, or a folder in Hugging Face form.
        adapter: a checkpoint or a folder with an adapter to start from, at step 0.
        lora_r: rank of the adapter; 2 trains 0.08 % of Phi-2.
        lora_alpha: the update is scaled by lora_alpha / lora_r.
        lora_dropout: on the input of the update, while training.
        target_modules: linear layers that get an adapter.
        learning_rate: the peak, reached after warm-up; then cosine to zero.
        weight_decay: of AdamW.
        warmup_ratio: share of the optimizer steps.
        dtype: auto, bfloat16 or float32, of the frozen base and of matrix products; LoRA weights are float32.
        activation_checkpointing: work activations out again in backward, not keep them. Phi-2 over 512 tokens on a
            CPU: 6.9 GB and not 8.0, 1.45 times as long.
        max_new_tokens: of an answer, in samples and predict.
        seed: linked from seed_everything.
    """

    def __init__(
        self,
        base: str = "tiny",
        adapter: str | None = None,
        lora_r: int = 2,
        lora_alpha: int = 4,
        lora_dropout: float = 0.0,
        target_modules: list[str] = ["Wqkv", "fc1", "fc2"],  # noqa: B006  jsonargparse shows it; never changed
        learning_rate: float = 2e-4,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.03,
        dtype: str = "auto",
        activation_checkpointing: bool = False,
        max_new_tokens: int = 256,
        seed: int = 42,
    ) -> None:
        super().__init__()
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
        self.strict_loading = False  # the base is not in a checkpoint; load_weights checks what is
        self.phi: PeftModel | None = None
        self.eos_token_id = -1
        # Validation and test never run at once and share their sums. A NaN counts: by default it would be left out.
        # (MeanMetric with NaNs counted forgets its weights in torchmetrics 1.9, hence sums.)
        self.eval_sums = nn.ModuleDict({name: SumMetric(nan_strategy="disable") for name in Loss._fields})
        self._window_nats: list[Tensor] = []
        self._window_tokens: list[Tensor] = []
        self._window_records: list[str] = []
        self._window_loss: float | None = None
        self._check_arguments()

    # The model

    def check(self) -> None:
        """Find the base and hold targets and adapter against it, without loading any weights of it.

        Raises:
            InputError: the base, a target or the adapter to start from cannot be used.
        """
        self._base_model = resolve_base_model(self.base)
        self._layers = linear_layers(self._base_model)
        check_targets(self.lora_settings.target_modules, self._layers, max(self._layers.values()))
        if self.adapter is not None:
            self._initial_adapter = read_adapter(Path(self.adapter))
            check_adapter(self._initial_adapter, self.lora_settings, self._base_model, source=self.adapter)

    def configure_model(self) -> None:
        """Load the base, freeze it in the compute dtype, and add the adapter; a second call finds it done.

        Raises:
            InputError: as check does.
        """
        if self.phi is not None:
            return
        self.check()
        device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
        dtype, reason = choose_dtype(self.compute_dtype, device)
        log.info("device %s, compute dtype %s: %s", device, str(dtype).removeprefix("torch."), reason)
        if device.type == "cpu":
            disable_malloc_trim()
        torch.manual_seed(self.seed)  # A starts random; whatever drew numbers before must not matter
        self.phi = add_lora(load_phi2(self._base_model, dtype), self.lora_settings, dropout=self.lora_dropout)
        self.eos_token_id = int(load_tokenizer(self._base_model).eos_token_id)
        if self.adapter is not None:
            load_adapter_state_dict(self.phi, self._initial_adapter.weights, source=self.adapter)
        # from_pretrained returns eval mode and Lightning keeps the modes it finds, so the base's own dropout, part of
        # Phi-2's recipe, would stay dead.
        self.phi.train()
        trained = sum(parameter.numel() for parameter in trainable_parameters(self.phi).values())
        total = sum(parameter.numel() for parameter in self.phi.parameters())
        log.info(
            "base %s, %d layers; LoRA r=%d on %s trains %s of %s parameters (%.2f %%), %s stay frozen",
            self.base,
            max(self._layers.values()),
            self.lora_settings.lora_r,
            ", ".join(self.lora_settings.target_modules),
            f"{trained:,}",
            f"{total:,}",
            100 * trained / total,
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
        """Summed nats and counts of a batch."""
        hidden = packed_forward(
            self.fused_phi,
            batch.input_ids,
            batch.position_ids,
            activation_checkpointing=self.activation_checkpointing,
        )
        return causal_lm_loss(hidden, batch.labels, self.fused_phi.lm_head)

    def trained_adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
        assert self.phi is not None
        return describe(self._base_model, self.lora_settings, adapter_state_dict(self.phi))

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout is a function of the position in the run, so a resumed run is the same
        loss = self.loss(batch)
        self._window_nats.append(loss.nats.detach())
        self._window_tokens.append(loss.num_tokens)
        self._window_records.extend(batch.record_ids)
        return loss.nats * batch.loss_weight

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The window is complete: check it before the step is taken, then log it.

        Raises:
            NonFiniteError: its loss or gradient norm is not finite.
        """
        assert self.phi is not None
        gradients = [p.grad for p in trainable_parameters(self.phi).values() if p.grad is not None]
        norm = get_total_norm(gradients).item()
        # Over all ranks; a sum of each, so that ranks with different numbers of tokens weigh as they should.
        sums = torch.stack([torch.stack(self._window_nats).sum(), torch.stack(self._window_tokens).sum()])
        nats, tokens = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if not (math.isfinite(nats) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.trainer.global_step + 1}: the loss is {nats / max(tokens, 1)} and the gradient norm "
                f"{norm}; the step was not taken. The records in it: {', '.join(self._window_records)}"
            )
        self._window_nats.clear()
        self._window_tokens.clear()
        self._window_records.clear()
        self._window_loss = nats / tokens
        step = self.trainer.global_step + 1  # the one that is about to be taken
        if step % self.trainer.log_every_n_steps == 0:
            # Now, and not at the end of the batch: a checkpoint may be written there first, and it must not lack them.
            curves = {
                "train/loss": nats / tokens,
                "train/grad_norm": norm,
                "train/supervised_tokens": tokens,
                "lr": optimizer.param_groups[0]["lr"],
            }
            self.log_scalars(curves, step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True  # or a run that ends by steps would end without a validation
        if self._window_loss is not None:  # a window ended with this batch
            self.log("loss", self._window_loss, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
            self._window_loss = None

    def log_scalars(self, curves: dict[str, float], step: int | None = None) -> None:
        """Write values at an optimizer step, the current one if none is given; every x axis shows these."""
        for logger in self.trainer.loggers:
            logger.log_metrics(curves, step=self.trainer.global_step if step is None else step)

    def configure_optimizers(self) -> dict[str, Any]:
        assert self.phi is not None
        optimizer = AdamW(
            trainable_parameters(self.phi).values(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=True,  # one call for all the small tensors of an adapter; CPU, CUDA and MPS have it
        )
        total = self.total_steps()
        warmup = math.ceil(self.warmup_ratio * total)
        schedule = LambdaLR(optimizer, lambda step: warmup_then_cosine(step, warmup_steps=warmup, total_steps=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        From the plan: Lightning's estimated_stepping_batches would build the loader early and lose its place on resume.
        """
        # The datamodule of `data/`; the two meet in cli.py and share only this number.
        steps_per_epoch: int = self.trainer.datamodule.steps_per_epoch()
        limits = []
        if self.trainer.max_epochs not in (None, -1):
            limits.append(steps_per_epoch * self.trainer.max_epochs)
        if self.trainer.max_steps != -1:
            limits.append(self.trainer.max_steps)
        if not limits:
            raise InputError("trainer.max_epochs and trainer.max_steps: one must be set; the schedule needs an end.")
        if min(limits) == 0:
            raise InputError(
                "trainer: max_epochs, max_steps and limit_train_batches leave nothing to train; each must leave some."
            )
        return min(limits)

    # Evaluation and prediction

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_eval_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval_metrics("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Completion]:
        return self.generate(batch.prompts)

    def generate(self, prompts: list[list[int]]) -> list[Completion]:
        """Greedy answers to prompts."""
        return generate(self.fused_phi, prompts, eos_token_id=self.eos_token_id, max_new_tokens=self.max_new_tokens)

    def _evaluate(self, batch: Batch) -> None:
        for name, value in self.loss(batch)._asdict().items():
            self.eval_sums[name](value)

    def _log_eval_metrics(self, stage: str) -> None:
        total = Loss(*(self.eval_sums[name].compute() for name in Loss._fields))  # type: ignore[operator]  # of a Module
        for metric in self.eval_sums.values():
            metric.reset()  # type: ignore[operator]
        loss, accuracy = total.nats / total.num_tokens, total.num_correct / total.num_tokens
        curves = {f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp(), f"{stage}/token_accuracy": accuracy}
        self.log_dict(curves, logger=False)  # for checkpoints and early stopping
        if self.trainer.state.fn == "fit":
            # Written by ourselves: Lightning drops what is logged before the first step, and that is the base's point.
            self.log_scalars({name: value.item() for name, value in curves.items()})
            log.info("step %d  val/loss %.4f  val/token_accuracy %.4f", self.trainer.global_step, loss, accuracy)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adapter = self.trained_adapter()
        checkpoint["state_dict"] = adapter.weights
        checkpoint["lit_phi2"] = {**adapter_to_state(adapter), "run": self.run_fingerprint()}
        checkpoint["lit_phi2"]["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["digest"] = tree_digest(checkpoint)  # Lightning calls this hook last, so it covers everything

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.phi is not None
        load_adapter_state_dict(self.phi, checkpoint["state_dict"], source="--ckpt_path")
        batching = self.trainer.datamodule.batching()
        if checkpoint["lit_phi2"]["accumulate_grad_batches"] != batching.accumulate:
            self._remap_batch_progress(checkpoint, batching.accumulate)
        checkpoint["state_dict"] = {}  # Lightning has nothing left to load

    def _remap_batch_progress(self, checkpoint: dict[str, Any], accumulate: int) -> None:
        """Put Lightning's counters of micro-batches where as many optimizer steps are on this number of processes."""
        data = self.trainer.datamodule
        epoch, step = divmod(checkpoint["global_step"], data.steps_per_epoch())
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if not step and progress["current"]["ready"]:  # written at the end of an epoch, not yet counted
            epoch, step = epoch - 1, data.steps_per_epoch()
        ready = min(step * accumulate, data.num_training_batches())
        for name, before in (("current", 0), ("total", epoch * data.num_training_batches())):
            counters = progress[name]
            behind = {key: counters["ready"] - count for key, count in counters.items()}
            counters |= {key: before + ready - behind[key] for key in counters}

    def check_resumable(self, checkpoint: dict[str, Any]) -> None:
        """Hold the settings against those that a checkpoint was written under.

        Raises:
            InputError: something that decides the run is not what it was; names all of it, with both values.
        """
        saved, now = checkpoint["lit_phi2"]["run"], self.run_fingerprint()
        if changed := [key for key in now if saved.get(key) != now[key]]:
            lines = [f"{key}: {saved.get(key)} in the checkpoint, {now[key]} now" for key in changed]
            if "rows_per_step" in changed:
                batching = self.trainer.datamodule.batching()
                lines.append(
                    f"(now data.batch_size {batching.batch_size} x trainer.accumulate_grad_batches {batching.accumulate} x "
                    f"{batching.world_size} processes; any three with the product of the checkpoint will do)"
                )
            raise InputError(
                "fit --ckpt_path continues the same run, but this is not the same:\n"
                + "\n".join(lines)
                + "\nTo go on from its weights under other settings, use --model.adapter CKPT; that starts at step 0."
            )

    def run_fingerprint(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        return {
            "model.base": self._base_model.digest,
            "model.lora_r": self.lora_settings.lora_r,
            "model.lora_alpha": self.lora_settings.lora_alpha,
            "model.lora_dropout": self.lora_dropout,
            "model.target_modules": list(self.lora_settings.target_modules),
            "model.learning_rate": self.learning_rate,
            "model.weight_decay": self.weight_decay,
            "model.warmup_ratio": self.warmup_ratio,
            "compute_dtype": str(choose_dtype(self.compute_dtype, self.trainer.strategy.root_device)[0]),
            "trainer.gradient_clip_val": self.trainer.gradient_clip_val,
            "total_steps": self.total_steps(),
            **self.trainer.datamodule.identity(),
        }

    def generation_fingerprint(self) -> dict[str, Any]:
        """What decides the answer to a prompt."""
        return {
            "base": self._base_model.digest,
            "adapter": tree_digest(self._initial_adapter.weights) if self.adapter is not None else "",
            "dtype": str(choose_dtype(self.compute_dtype, self.trainer.strategy.root_device)[0]),
            "max_new_tokens": self.max_new_tokens,
        }

    def _check_arguments(self) -> None:
        check_dtype(self.compute_dtype)
        for name, value, least in (
            ("lora_r", self.lora_settings.lora_r, 1),
            ("lora_alpha", self.lora_settings.lora_alpha, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("weight_decay", self.weight_decay, 0),
        ):
            if value < least:
                raise InputError(f"model.{name}: {value} is less than {least}.")
        for name, share in (("lora_dropout", self.lora_dropout), ("warmup_ratio", self.warmup_ratio)):
            if not 0 <= share < 1:
                raise InputError(f"model.{name}: {share} is not between 0 and 1.")
        if not self.learning_rate > 0:
            raise InputError(f"model.learning_rate: {self.learning_rate} is not above 0.")
