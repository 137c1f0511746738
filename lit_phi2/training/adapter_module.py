"""AdapterModule: the base with an adapter in its layers, as a LightningModule that answers questions.

    names of base and adapter  ->  check: files and sizes  ->  configure_model: loaded  ->  generate, complete

LitPhi2 (`module.py`) adds training, evaluation and checkpoints.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lit_phi2.adapters.adapter import Adapter, make_adapter
from lit_phi2.data.encode import token_budget
from lit_phi2.errors import InputError
from lit_phi2.generation.drafts import Drafter
from lit_phi2.generation.engine import Completion, Engine, generate
from lit_phi2.generation.feed import feed
from lit_phi2.generation.ngrams import NgramIndex
from lit_phi2.generation.questions import encode_question, encode_questions
from lit_phi2.model.calibration import QuantizationTable, apply_table, calibrate, describe_table
from lit_phi2.model.device import choose_dtype, disable_malloc_trim, keep_float32_sums
from lit_phi2.model.lora import LoraSettings, PeftModel, adapter_state_dict, load_adapter_state_dict
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.model.quantization import check_quantization, describe_products
from lit_phi2.pretrained import load_tokenizer, read_model_config
from lit_phi2.training.base import CheckedBase, check_base, load_base
from lit_phi2.training.outputs import to_output
from lit_phi2.training.protocols import first_examples, num_pending, tokenizer_of, training_data
from lit_phi2.types import PromptBatch

log = logging.getLogger(__name__)


class AdapterModule(LightningModule):
    """Phi-2 with LoRA; the constructor only keeps its arguments.

    Args:
        base: name of the base.
        adapter: a checkpoint or folder whose weights the adapter starts from; None starts from the base.
        lora_settings: of the adapter.
        lora_dropout: on the input of LoRA's update.
        dtype: auto, bfloat16, float16 or float32.
        quantization: int8 for frozen weights in 8 bits, else None.
        max_new_tokens: of a completion.
        max_slots: completions at the same time; None for what memory and device suggest.
        drafts: whether passes check drafts.
        seed: of new adapter weights.

    Attributes:
        quantization_table: how layers are multiplied in 8 bits, from a checkpoint or from `configure_model`.
        draft_index: of the training responses; without it drafts come from the prompt alone.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None,
        lora_settings: LoraSettings,
        *,
        lora_dropout: float,
        dtype: str,
        quantization: str | None,
        max_new_tokens: int,
        max_slots: int | None,
        drafts: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.lora_settings = lora_settings
        self.lora_dropout = lora_dropout
        self.compute_dtype = dtype
        check_quantization(quantization)
        self.quantization = quantization
        self.quantization_table: QuantizationTable | None = None
        self.max_new_tokens = max_new_tokens
        self.max_slots = max_slots
        self.drafts = drafts
        self.draft_index: NgramIndex | None = None
        self.seed = seed
        self.phi: PeftModel | None = None
        self.eos_token_id = -1
        self.on_completion: Callable[[dict[str, Any]], None] | None = None  # of predict_step, for each as it ends
        self._engine: Engine | None = None
        self._checked: CheckedBase | None = None

    # Loading

    def check(self) -> CheckedBase:
        """Find the base, and compare targets and initial adapter with it, without loading its weights.

        Raises:
            InputError: the base, a target or the initial adapter cannot be used.
        """
        self._checked = check_base(self.base, self.lora_settings, self.adapter)
        return self._checked

    @property
    def checked(self) -> CheckedBase:
        """What the last check found."""
        return self._checked or self.check()

    def configure_model(self) -> None:
        """Load the base, freeze it in the compute dtype and add the adapter; a second call does nothing.

        Raises:
            InputError: see check.
        """
        if self.phi is not None:
            return
        checked, device = self.checked, self.target_device()
        dtype, reason = self.choose_dtype()
        log.info("device %s, compute dtype %s: %s", device, str(dtype).removeprefix("torch."), reason)
        if device.type == "cpu":
            disable_malloc_trim()
        if dtype == torch.float16:
            keep_float32_sums()
        torch.manual_seed(self.seed)  # A is initialized at random; earlier draws must not change it
        calibrate = self._calibrate if self.quantization is not None else None
        self.phi = load_base(checked, self.lora_settings, dtype, dropout=self.lora_dropout, calibrate=calibrate)
        self.fused_phi.trims_heap = self.quantization is not None and device.type == "cpu"
        self.eos_token_id = int(load_tokenizer(checked.model).eos_token_id)

    def _calibrate(self, phi: FusedPhiForCausalLM) -> None:
        """Use what a checkpoint says of the layers in 8 bits, or measure them on the first records of the data."""
        base, adapter = self.checked.model, self.checked.adapter
        table = self.quantization_table or (adapter.quantization if adapter is not None else None)
        if table is None:
            data = training_data(self.trainer) if self._trainer is not None else None
            self.quantization_table = calibrate(phi, base, first_examples(data, base))
            log.info("model.quantization: %s", describe_table(self.quantization_table))
        else:
            self.quantization_table = table
            apply_table(phi, base, table)
        log.info("model.quantization: %s", describe_products(self.target_device()))

    def check_quantization_table(self, adapter: Adapter) -> None:
        """Compare how the loaded base is multiplied in 8 bits with what the adapter's checkpoint says.

        Raises:
            InputError: the base was loaded before the checkpoint was known, and measured on other records.
        """
        known = adapter.quantization
        if self.quantization is not None and known is not None and known != self.quantization_table:
            raise InputError(
                "ckpt_path: the base in 8 bits was loaded with other outlier columns than those of the checkpoint. "
                "Give fit a new LitPhi2, which loads its base itself."
            )

    def quantization_fingerprint(self) -> list[Any] | None:
        """What decides completions in 8 bits, beside the prompts that a base without a checkpoint is measured on."""
        adapter = self.checked.adapter
        return [self.quantization, adapter and adapter.quantization] if self.quantization else None

    def choose_dtype(self) -> tuple[torch.dtype, str]:
        """The compute dtype, and the reason."""
        return choose_dtype(self.compute_dtype, self.target_device(), self.checked.num_parameters)

    def target_device(self) -> torch.device:
        """Where the Trainer runs the model; the CPU without a Trainer."""
        return self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")

    @property
    def fused_phi(self) -> FusedPhiForCausalLM:
        """The base with the adapter in its layers."""
        assert self.phi is not None
        model = self.phi.get_base_model()
        assert isinstance(model, FusedPhiForCausalLM)
        return model

    def load_for_answers(self) -> None:
        """Load the model where the Trainer would run it, for completions outside its loops."""
        self.configure_model()
        self.to(self.target_device())

    # The adapter

    def trained_adapter(self) -> Adapter:
        """A copy of the adapter at this step."""
        assert self.phi is not None
        adapter = make_adapter(self.checked.model, self.lora_settings, adapter_state_dict(self.phi))
        return replace(adapter, quantization=self.quantization_table)

    def adapter_in_use(self) -> Adapter | None:
        """The adapter that completions come from; None where they are the base's: B is zero until a step is taken."""
        if self.phi is None:
            return self.checked.adapter
        adapter = self.trained_adapter()
        return adapter if any(weight.any() for name, weight in adapter.weights.items() if "lora_B" in name) else None

    def load_adapter(self, source: str) -> None:
        """Use the adapter in a checkpoint or folder, whether or not the base is loaded.

        Raises:
            InputError: it does not fit the base or the LoRA settings.
        """
        self.adapter = source
        adapter = self.check().adapter
        if self.phi is not None and adapter is not None:
            load_adapter_state_dict(self.phi, adapter.weights, source=source)

    # Completions

    def new_engine(self, expected_prompts: int | None = None) -> Engine:
        """An engine on the loaded model; it holds no prompts.

        Args:
            expected_prompts: how many will be submitted; None for many.
        """
        return Engine(
            self.fused_phi,
            eos_token_id=self.eos_token_id,
            max_new_tokens=self.max_new_tokens,
            max_slots=self.max_slots,
            expected_prompts=expected_prompts,
            drafts=self._new_drafter(),
        )

    def _new_drafter(self) -> Drafter | None:
        return Drafter(self.draft_index, eos_token_id=self.eos_token_id) if self.drafts else None

    def on_predict_start(self) -> None:
        self._engine = self.new_engine(num_pending(self.trainer))
        examples = training_data(self.trainer).splits["predict"].examples
        self._engine.locate = lambda index: examples[index].location

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Submit a batch of prompts, and return the completions that ended, each with the index of its record.

        Slots are refilled across batches, so a completion may be that of an earlier batch; the last batch waits for
        all. `on_completion` gets each when it ends.
        """
        assert self._engine is not None
        tokenizer = tokenizer_of(training_data(self.trainer))
        is_last = batch_idx + 1 == self.trainer.num_predict_batches[0]
        prompts = zip(batch.indices, batch.prompts, strict=True)
        outputs = []
        for index, completion in feed(self._engine, prompts, drain=is_last):
            outputs.append(to_output(index, completion, tokenizer))
            if self.on_completion is not None:
                self.on_completion(outputs[-1])
        return outputs

    def on_predict_end(self) -> None:
        self._engine = None

    def generate(self, prompts: list[list[int]], max_new_tokens: int | None = None) -> list[Completion]:
        """Greedy completions of prompts, in their order, by default of at most model.max_new_tokens."""
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return generate(
            self.fused_phi,
            prompts,
            eos_token_id=self.eos_token_id,
            max_new_tokens=limit,
            max_slots=self.max_slots,
            drafts=self._new_drafter(),
        )

    def complete(self, instructions: Sequence[str], inputs: Sequence[str] | None = None) -> list[str]:
        """Greedy completions of instructions, as text: `model.complete(["Why was claim 4417 denied?"])`.

        Args:
            instructions: one each question.
            inputs: the document that each refers to, or an empty text; None for no documents.

        Raises:
            InputError: a question is empty or too long.
        """
        self.configure_model()
        tokenizer = load_tokenizer(self.checked.model)
        texts = [""] * len(instructions) if inputs is None else inputs
        prompts = encode_questions(tokenizer, instructions, texts, max_length=self._max_prompt_length())
        return [str(tokenizer.decode(completion.ids)) for completion in self.generate(prompts)]

    def encode_question(self, texts: dict[str, str]) -> list[int]:
        """Token ids of the prompt of instruction and input, given by the names that messages have for them.

        Raises:
            InputError: it cannot be asked; see `generation/questions.py`.
        """
        return encode_question(load_tokenizer(self.checked.model), texts, max_length=self._max_prompt_length())

    def _max_prompt_length(self) -> int:
        """Tokens that max_new_tokens leaves for a prompt."""
        base = self.checked.model
        context = int(read_model_config(base)["max_position_embeddings"])
        return token_budget("predict", context, self.max_new_tokens, context, base.name)
