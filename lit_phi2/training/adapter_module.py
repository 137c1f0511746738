"""AdapterModule: the base with an adapter in its layers, as a LightningModule that answers questions.

    names of base and adapter  ->  check: files and sizes  ->  configure_model: loaded  ->  generate, complete

LitPhi2 (`module.py`) adds training, evaluation and checkpoints.
"""

import logging
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule

from lit_phi2.adapters.adapter import Adapter, make_adapter
from lit_phi2.generation.engine import Completion, generate
from lit_phi2.generation.questions import encode_questions
from lit_phi2.model.device import choose_dtype, disable_malloc_trim
from lit_phi2.model.lora import LoraSettings, PeftModel, adapter_state_dict, load_adapter_state_dict
from lit_phi2.model.phi2 import FusedPhiForCausalLM
from lit_phi2.pretrained import load_tokenizer
from lit_phi2.training.base import CheckedBase, check_base, load_base
from lit_phi2.utils.sequences import batched

log = logging.getLogger(__name__)

PROMPTS_PER_BATCH = 8  # of `complete`


class AdapterModule(LightningModule):
    """Phi-2 with LoRA; the constructor only keeps its arguments.

    Args:
        base: name of the base.
        adapter: a checkpoint or folder whose weights the adapter starts from; None starts from the base.
        lora_settings: of the adapter.
        lora_dropout: on the input of LoRA's update.
        dtype: auto, bfloat16 or float32.
        max_new_tokens: of a completion.
        seed: of new adapter weights.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None,
        lora_settings: LoraSettings,
        *,
        lora_dropout: float,
        dtype: str,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.lora_settings = lora_settings
        self.lora_dropout = lora_dropout
        self.compute_dtype = dtype
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.phi: PeftModel | None = None
        self.eos_token_id = -1
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
        checked, device = self.check(), self.target_device()
        dtype, reason = self.choose_dtype()
        log.info("device %s, compute dtype %s: %s", device, str(dtype).removeprefix("torch."), reason)
        if device.type == "cpu":
            disable_malloc_trim()
        torch.manual_seed(self.seed)  # A is initialized at random; earlier draws must not change it
        self.phi = load_base(checked, self.lora_settings, dtype, dropout=self.lora_dropout)
        self.eos_token_id = int(load_tokenizer(checked.model).eos_token_id)

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

    # The adapter

    def trained_adapter(self) -> Adapter:
        """A copy of the adapter at this step."""
        assert self.phi is not None
        return make_adapter(self.checked.model, self.lora_settings, adapter_state_dict(self.phi))

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

    def generate(self, prompts: list[list[int]], max_new_tokens: int | None = None) -> list[Completion]:
        """Greedy completions of prompts, in their order, by default of at most model.max_new_tokens."""
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return generate(self.fused_phi, prompts, eos_token_id=self.eos_token_id, max_new_tokens=limit)

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
        max_length = self.fused_phi.config.max_position_embeddings - self.max_new_tokens
        texts = [""] * len(instructions) if inputs is None else inputs
        prompts = encode_questions(tokenizer, instructions, texts, max_length=max_length)
        completions = [each for batch in batched(prompts, PROMPTS_PER_BATCH) for each in self.generate(batch)]
        return [str(tokenizer.decode(completion.ids)) for completion in completions]
