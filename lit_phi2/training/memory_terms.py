"""Memory terms: bytes of weights, activations, logits and cache, as closed forms of config.json and the settings.

    config.json -> PhiSizes      settings, longest row -> Workload      both -> bytes

    N  tokens of a micro-batch, padding included     D  width           A  H d, width of all heads    L  layers
    S  supervised tokens among them                  F  width of fc1    r  rank of LoRA

What is saved for backward follows `block_forward` line by line; the base is frozen, so no matmul saves its input but
for LoRA's A and B. Neither weights nor records are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from lit_phi2.generation.engine import MAX_PREFILL_TOKENS
from lit_phi2.generation.kv_cache import CacheShape, round_up
from lit_phi2.generation.weights import MEMORY_SHARE, MIN_PASSES
from lit_phi2.model.attention import QUERY_BLOCK
from lit_phi2.model.linear import EMULATION_MIN_ROWS, emulates_bf16
from lit_phi2.model.loss import LOGITS_BYTES, PAD_ROWS_TO, vocab_chunk
from lit_phi2.model.quantization import BLOCK_ROWS

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class PhiSizes:
    """The sizes in config.json."""

    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    positions: int
    rotary_dim: int
    dropout: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the values of `read_model_config`."""
        heads, width = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim", width // heads)
        return cls(
            config["num_hidden_layers"],
            width,
            heads,
            head_dim,
            config["intermediate_size"],
            config["vocab_size"],
            config["max_position_embeddings"],
            int(head_dim * config["rope_parameters"]["partial_rotary_factor"]),
            config.get("resid_pdrop", 0.0),
        )

    @property
    def attn_width(self) -> int:
        """A."""
        return self.num_heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block, (in, out) by name."""
        width, attn_width, mlp_width = self.width, self.attn_width, self.mlp_width
        return {
            "Wqkv": (width, 3 * attn_width),
            "dense": (attn_width, width),
            "fc1": (width, mlp_width),
            "fc2": (mlp_width, width),
        }

    @property
    def num_block_weights(self) -> int:
        """Of the matrices of a block."""
        return sum(num_in * num_out for num_in, num_out in self.linear_layers.values())

    @property
    def num_parameters(self) -> int:
        """Matrices and biases of blocks, two vectors for each norm, embedding, output layer with its bias."""
        biases = sum(num_out for _, num_out in self.linear_layers.values())
        blocks = self.num_layers * (self.num_block_weights + biases + 2 * self.width)
        return blocks + 2 * self.vocab_size * self.width + self.vocab_size + 2 * self.width


@dataclass(frozen=True, slots=True)
class Workload:
    """What fit and predict are asked to do.

    Attributes:
        dtype: of the frozen weights and of the matmuls.
        device_type: cpu, cuda or mps.
        targets: model.target_modules.
        rows, row_length: of a micro-batch; the longest row.
        supervised: at most so many tokens of a row.
        longest_example: in tokens.
        prompt_length: of the longest prompt.
        slots: sequences that are completed at the same time.
        quantized: whether the weights of linear layers are int8.
        logits_limit: bytes of the logits of a chunk; see `loss.logits_limit`.
    """

    dtype: torch.dtype
    device_type: str
    lora_r: int
    targets: tuple[str, ...]
    lora_dropout: float
    activation_checkpointing: bool
    rows: int
    row_length: int
    supervised: int
    longest_example: int
    prompt_length: int
    max_new_tokens: int
    slots: int
    quantized: bool = False
    logits_limit: int = LOGITS_BYTES

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.rows * self.row_length

    @property
    def matmul_bytes(self) -> int:
        """Of an element where it is multiplied; see `linear.matmul_dtype` and `quantization.py`."""
        is_emulated = self.dtype == torch.bfloat16 and self.num_tokens >= EMULATION_MIN_ROWS and emulates_bf16()
        in_float32 = self.device_type == "cpu" and (is_emulated or self.dtype == torch.float16)
        return FLOAT32_BYTES if in_float32 or self.quantized else self.dtype.itemsize


# Training


def weight_bytes(phi: PhiSizes, work: Workload) -> int:
    """The frozen base; of an int8 matrix a byte each and a float32 scale for each output feature."""
    if not work.quantized:
        return phi.num_parameters * work.dtype.itemsize
    numel, features = num_matrix_elements(phi), phi.vocab_size
    features += phi.num_layers * sum(num_out for _, num_out in phi.linear_layers.values())
    return numel + FLOAT32_BYTES * features + (phi.num_parameters - numel) * work.dtype.itemsize


def num_matrix_elements(phi: PhiSizes) -> int:
    """Of the linear layers of all blocks and of the output layer."""
    return phi.num_layers * phi.num_block_weights + phi.vocab_size * phi.width


def num_lora_parameters(phi: PhiSizes, lora_r: int, targets: tuple[str, ...]) -> int:
    """A (r, in) and B (out, r) of each target in each block."""
    return phi.num_layers * sum(lora_r * sum(phi.linear_layers[name]) for name in targets)


def activation_bytes(phi: PhiSizes, work: Workload) -> int:
    """What autograd has saved when the loss of a micro-batch is known.

    Of each block, in elements of the dtype (D, A, F for each of N tokens):

        D           input of the norm: the hidden state; in the last place that of the final norm, because the first
                    block's comes from frozen weights and has no gradient
        D           input of Wqkv and fc1, the same tensor
        3 A         CPU: rotated q, k and v. Elsewhere 4 A, with the output; 8 A in float16 on MPS, where they are
                    float32
        A           input of dense, only if it is a target
        F           slope of GELU; 2 F in float16 on MPS, where GELU's input is float32
        F           input of fc2, only if it is a target; in 8 bits on a CPU GELU's input instead of both
        r           A x, of each target

    and in bytes: 2 D for the masks of the residual dropout, which a CPU draws again, the input's width for each mask of
    LoRA's dropout, 8 for mean and deviation of the norm. With checkpointing the input of each block alone is saved, and
    one block as above while it is computed again. The loss saves the gradient of the S hidden states; in float32 if the
    dtype is float16.
    """
    e, n = work.dtype.itemsize, work.num_tokens
    block = n * _saved_per_token(phi, work)
    inputs = phi.num_layers * n * phi.width * e
    blocks = inputs + block if work.activation_checkpointing else phi.num_layers * block
    rotary = n * phi.rotary_dim * e
    grad_itemsize = FLOAT32_BYTES if work.dtype == torch.float16 else e
    return blocks + rotary + work.rows * work.supervised * phi.width * grad_itemsize


def _saved_per_token(phi: PhiSizes, work: Workload) -> int:
    """Bytes that a block saves for a token."""
    e, targets = work.dtype.itemsize, work.targets
    converts = work.device_type == "mps" and work.dtype == torch.float16
    num_attn = 3 if work.device_type == "cpu" else 8 if converts else 4
    elements = phi.width + num_attn * phi.attn_width + (1 + converts) * phi.mlp_width
    elements += phi.width * ("Wqkv" in targets or "fc1" in targets)
    elements += phi.attn_width * ("dense" in targets and work.device_type == "cpu")  # elsewhere attention saved it
    elements += phi.mlp_width * ("fc2" in targets and not (work.quantized and work.device_type == "cpu"))
    elements += work.lora_r * len(targets)
    masks = 2 * phi.width * (phi.dropout > 0 and work.device_type != "cpu")
    masks += sum(phi.linear_layers[name][0] for name in targets) * (work.lora_dropout > 0)
    return elements * e + masks + 2 * FLOAT32_BYTES


def workspace_bytes(phi: PhiSizes, work: Workload) -> int:
    """What the step holds for a moment beside that, at the largest of two moments.

    Forward, in the last block: qkv, both results, fc1's output beside what GELU makes of it. Backward, in attention:
    the gradients of qkv twice, of its output and of two hidden states, and on a CPU the scores of a block of queries
    four times; what the MLP had saved is free by then. A product in int8 has the gradient times W's scales, and of a
    block of rows the quotients, their int8 and the int32 sums.
    """
    e, n, m = work.dtype.itemsize, work.num_tokens, work.matmul_bytes
    forward = n * e * (3 * phi.attn_width + phi.mlp_width + 2 * phi.width)
    backward = n * (3 * phi.attn_width * e + 4 * phi.attn_width * m + 2 * phi.width * e - 2 * phi.mlp_width * e)
    if work.device_type == "cpu":
        longest = work.longest_example
        backward += 4 * phi.num_heads * min(longest, QUERY_BLOCK) * longest * m
    if work.quantized:
        block = min(n, BLOCK_ROWS) * phi.mlp_width * (2 * FLOAT32_BYTES + 1)
        forward += block
        backward += block + n * phi.mlp_width * FLOAT32_BYTES
    return max(forward, backward)


def logits_bytes(phi: PhiSizes, work: Workload) -> int:
    """The loss: logits of one chunk of the vocabulary in float32 and in the dtype, and four copies of the S states."""
    num_positions = work.rows * work.supervised
    padded = -(-num_positions // PAD_ROWS_TO) * PAD_ROWS_TO
    position_bytes = FLOAT32_BYTES + work.matmul_bytes
    chunk = vocab_chunk(padded, position_bytes, phi.vocab_size, work.device_type, work.logits_limit)
    states = 2 * FLOAT32_BYTES + work.matmul_bytes + work.dtype.itemsize
    return padded * (chunk * position_bytes + phi.width * states)


# Decoding


def cache_bytes(phi: PhiSizes, work: Workload) -> int:
    """Keys and values of every slot."""
    return work.slots * slot_bytes(phi, work)


def slot_bytes(phi: PhiSizes, work: Workload) -> int:
    """Keys and values of one sequence, as the engine allocates them for the longest prompt."""
    prompt_length = min(work.prompt_length, phi.positions - work.max_new_tokens)
    capacity = round_up(prompt_length + work.max_new_tokens)
    return CacheShape(phi.num_layers, phi.num_heads, phi.head_dim, work.dtype).num_bytes(1, capacity)


def prefill_bytes(phi: PhiSizes, work: Workload) -> int:
    """A pass over prompts: hidden state, its norm, both results, qkv, fc1's output and GELU's; logits of the slots."""
    num_tokens = min(work.slots * work.prompt_length, max(MAX_PREFILL_TOKENS, work.prompt_length))
    elements = 5 * phi.width + 3 * phi.attn_width + 2 * phi.mlp_width
    return work.dtype.itemsize * (num_tokens * elements + work.slots * phi.vocab_size)


def copy_bytes(phi: PhiSizes, work: Workload, num_passes: int, free: int) -> int:
    """The copy of the weights that decoding makes if it pays and fits; 0 if not. See `generation/weights.py`.

    On a CPU it is of every matrix, in float32 unless bfloat16 is faster there, which only a run measures; elsewhere of
    those with an adapter.

    Args:
        phi: sizes of the base.
        work: as planned.
        num_passes: that will be made.
        free: bytes that are left before it is made.
    """
    if work.quantized:
        return 0
    if work.device_type == "cpu":
        numel = num_matrix_elements(phi)
        itemsize = FLOAT32_BYTES
    else:
        itemsize = work.dtype.itemsize
        numel = phi.num_layers * sum(
            num_in * num_out for name, (num_in, num_out) in phi.linear_layers.items() if name in work.targets
        )
    size = numel * itemsize
    return size if num_passes >= MIN_PASSES and size <= MEMORY_SHARE * free else 0
