"""LitPhi2: the LightningModule; it arranges adapter, optimizer, evaluation and checkpoints around Lightning's loops.

    AdapterModule: loading, completions  ->  TrainingModule: optimizer steps  ->  LitPhi2: everything else

Lengths and fingerprints of a run come from the data module through `protocols.py`.
"""

import logging
import warnings
from dataclasses import asdict
from typing import Any

from lit_phi2.adapters.adapter import check_adapter
from lit_phi2.adapters.checkpoint import adapter_to_state, check_checkpoint
from lit_phi2.audit.provenance import versions
from lit_phi2.model.device import check_dtype
from lit_phi2.model.lora import LoraSettings, load_adapter_state_dict, trainable_parameters
from lit_phi2.training.agreement import check_data, check_trainer
from lit_phi2.training.arguments import check_fraction, check_minimum, check_positive
from lit_phi2.training.block_ops import use_block_ops
from lit_phi2.training.environment import describe_environment, environment_warning
from lit_phi2.training.loops import use_resumable_loops
from lit_phi2.training.metrics import EvalSums, eval_metrics
from lit_phi2.training.optim import build_optimizer, build_schedule, total_steps
from lit_phi2.training.overflow import check_range
from lit_phi2.training.protocols import TrainingData, training_data
from lit_phi2.training.resume import check_resumable, generation_fingerprint, remap_batch_progress, run_fingerprint
from lit_phi2.training.training_module import TrainingModule
from lit_phi2.types import Batch
from lit_phi2.utils.constructors import keep_arguments
from lit_phi2.utils.files import tree_digest

log = logging.getLogger(__name__)

# Arguments, beside base and LoRA settings, that a resumed run must share.
_DECIDING = ("quantization", "lora_dropout", "learning_rate", "lora_plus_ratio", "weight_decay", "warmup_ratio")


class LitPhi2(TrainingModule):
    """Phi-2 with LoRA, trained on the responses of records.

    Args:
        base: tiny, a hub id, or a folder; tiny is packaged, a hub id is such as microsoft/phi-2, and a folder is in
            Hugging Face form.
        adapter: a checkpoint to start from, at step 0; also a folder with an adapter.
        lora_r: rank of the adapter; 2 trains 0.08 % of Phi-2.
        lora_alpha: the update is times lora_alpha / lora_r.
        use_rslora: scale is lora_alpha / sqrt(lora_r); so a high rank learns as fast as a low one.
        lora_dropout: on the input of the update; while training.
        target_modules: linear layers that get an adapter.
        learning_rate: the peak, reached after warm-up; then cosine to zero.
        lora_plus_ratio: learning rate of B over that of A; null is 1. 16 is common.
        weight_decay: of AdamW.
        warmup_ratio: fraction of the optimizer steps.
        dtype: auto, bfloat16, float16 or float32; of the frozen base and of matmuls, while LoRA weights are float32.
        quantization: null, or int8 for frozen weights in 8 bits; half the memory and faster products.
        activation_checkpointing: less memory, longer steps; activations are recomputed in backward instead of kept.
            Phi-2 over 512 tokens on a CPU: 6.9 GB instead of 8.0, 1.45 times as long.
        max_new_tokens: most tokens of a completion; in samples, test and predict.
        max_slots: completions at the same time; null takes what memory and device suggest.
        drafts: guess tokens from training responses and check them; answers stay the same and come faster.
        seed: linked from seed_everything.
    """

    @keep_arguments
    def __init__(
        self,
        base: str = "tiny",
        adapter: str | None = None,
        lora_r: int = 2,
        lora_alpha: int = 4,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        target_modules: list[str] = ["Wqkv", "fc1", "fc2"],  # noqa: B006  jsonargparse shows it in --help; never mutated
        learning_rate: float = 2e-4,
        lora_plus_ratio: float | None = None,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.03,
        dtype: str = "auto",
        quantization: str | None = None,
        activation_checkpointing: bool = False,
        max_new_tokens: int = 256,
        max_slots: int | None = None,
        drafts: bool = True,
        seed: int = 42,
    ) -> None:
        check_dtype(dtype)
        check_minimum(1, lora_r=lora_r, lora_alpha=lora_alpha, max_new_tokens=max_new_tokens)
        check_minimum(0, weight_decay=weight_decay)
        check_fraction(lora_dropout=lora_dropout, warmup_ratio=warmup_ratio)
        check_positive(learning_rate=learning_rate, lora_plus_ratio=1.0 if lora_plus_ratio is None else lora_plus_ratio)
        if max_slots is not None:
            check_minimum(1, max_slots=max_slots)
        super().__init__(
            base,
            adapter,
            LoraSettings(lora_r, lora_alpha, tuple(target_modules), use_rslora),
            lora_dropout=lora_dropout,
            dtype=dtype,
            quantization=quantization,
            max_new_tokens=max_new_tokens,
            max_slots=max_slots,
            drafts=drafts,
            seed=seed,
        )
        self.learning_rate = learning_rate
        self.lora_plus_ratio = lora_plus_ratio
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.activation_checkpointing = activation_checkpointing
        self.strict_loading = False  # a checkpoint has no base weights; load_adapter_state_dict checks those it has
        self.eval_sums = EvalSums()  # of validation or test, which never run at once

    def check_data(self, data: TrainingData | None) -> None:
        """Compare the values that the data module must share.

        Raises:
            InputError: they differ, or there is no data module.
        """
        check_data(data, base=self.checked.model, max_new_tokens=self.max_new_tokens, seed=self.seed)

    def setup(self, stage: str) -> None:
        """Check what the command line checks earlier, for a Trainer that a program or a notebook built.

        Raises:
            InputError: model, data and Trainer do not fit together.
        """
        check_trainer(self.trainer)
        self.check_data(self.trainer.datamodule)
        if stage == "fit":
            use_resumable_loops(self.trainer)
            self.begin_fit()

    # Training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.block_ops_due:
            self.block_ops_due = False
            steps = self.total_steps() - self.trainer.global_step
            self.compiled = use_block_ops(
                self.fused_phi,
                batch,
                self.trainer.strategy,
                num_passes=steps * self.trainer.accumulate_grad_batches * self.checked.num_layers,
                saved=self.compiled,
                activation_checkpointing=self.activation_checkpointing,
            )

    def configure_optimizers(self) -> dict[str, Any]:
        assert self.phi is not None
        optimizer = build_optimizer(
            trainable_parameters(self.phi),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lora_plus_ratio=self.lora_plus_ratio,
        )
        schedule = build_schedule(optimizer, warmup_ratio=self.warmup_ratio, total_steps=self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            InputError: the Trainer's limits leave none, or there is no limit.
        """
        steps_per_epoch = training_data(self.trainer).steps_per_epoch()
        return total_steps(steps_per_epoch, self.trainer.max_epochs, self.trainer.max_steps)

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.eval_sums.add(check_range(self.fused_phi, batch, self.loss(batch)))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.eval_sums.reset()  # an interrupted evaluation leaves a part of its sums

    def on_test_epoch_start(self) -> None:
        self.eval_sums.reset()

    def on_validation_epoch_end(self) -> None:
        self._log_eval_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_eval_metrics("test")

    def _log_eval_metrics(self, stage: str) -> None:
        values = eval_metrics(stage, self.eval_sums.close())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a logger, Lightning warns that there is none
            # For checkpoints and early stopping; outside fit also for what validate and test return.
            self.log_dict(values, logger=self.trainer.state.fn != "fit")
        if self.trainer.state.fn == "fit" and not self._is_partial_sanity_check():
            # Not by log_dict: Lightning drops values logged before the first step, which is the step-0 baseline.
            self.log_scalars({name: value.item() for name, value in values.items()})
            loss, accuracy = values["val/loss"], values["val/token_accuracy"]
            log.info("step %d  val/loss %.4f  val/token_accuracy %.4f", self.trainer.global_step, loss, accuracy)

    def _is_partial_sanity_check(self) -> bool:
        """Whether only some batches are validated: their loss is no point of the curve."""
        trainer = self.trainer
        return trainer.sanity_checking and trainer.num_sanity_val_steps < max(trainer.num_val_batches)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adapter = self.trained_adapter()
        checkpoint["state_dict"] = adapter.weights
        checkpoint["lit_phi2"] = {
            **adapter_to_state(adapter),
            "run": self.run_fingerprint(),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "compiled": bool(self.compiled),
            "environment": describe_environment(self.device),
            "versions": versions(),
        }
        if self.loss_scale is not None:
            checkpoint["lit_phi2"]["loss_scale"] = self.loss_scale.state_dict()
        checkpoint["digest"] = tree_digest(checkpoint)  # Lightning calls this hook last, so it covers everything

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.phi is not None
        adapter = check_checkpoint(checkpoint, source="ckpt_path")
        check_adapter(adapter, self.lora_settings, self.checked.model, source="ckpt_path")
        self.check_quantization_table(adapter)
        load_adapter_state_dict(self.phi, adapter.weights, source="ckpt_path")
        if self.trainer.state.fn == "fit":
            self._continue_run(checkpoint)
        checkpoint["state_dict"] = {}  # leave Lightning nothing to load

    def _continue_run(self, checkpoint: dict[str, Any]) -> None:
        data, state = training_data(self.trainer), checkpoint["lit_phi2"]
        check_resumable(state["run"], self.run_fingerprint(), data.batching())
        self.compiled = state.get("compiled", False)
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state.get("loss_scale", {}), source="ckpt_path")
        if warning := environment_warning(state["environment"], describe_environment(self.target_device())):
            log.warning(warning)
        remap_batch_progress(
            checkpoint,
            accumulate=data.batching().accumulate,
            steps_per_epoch=data.steps_per_epoch(),
            batches_per_epoch=data.num_training_batches(),
        )

    def run_fingerprint(self) -> dict[str, Any]:
        """Every setting that a resumed run must share, by config key."""
        model = {
            "base": self.checked.model.digest,  # wherever the base is stored now
            **asdict(self.lora_settings),
            "target_modules": list(self.lora_settings.target_modules),
            **{name: getattr(self, name) for name in _DECIDING},
        }
        return run_fingerprint(
            model,
            compute_dtype=self.choose_dtype()[0],
            trainer=self.trainer,
            total_steps=self.total_steps(),
            data=training_data(self.trainer).fingerprint(),
        )

    def generation_fingerprint(self) -> dict[str, Any]:
        """Everything that decides the completion of a prompt."""
        return generation_fingerprint(
            base_digest=self.checked.model.digest,
            adapter=self.adapter_in_use(),
            compute_dtype=self.choose_dtype()[0],
            max_new_tokens=self.max_new_tokens,
            quantization=self.quantization_fingerprint(),
        )
