"""Quantization: frozen weights in 8 bits, and products of 8-bit numbers with them.

    W (out, in)   ->  int8 (out, in), a scale for each output feature             once, while the base is read
    x (N, in)     ->  int8, a scale for each row  ->  int32 sums  ->  x scales    forward; x W^T
    g (N, out)    ->  times W's scales, int8, a scale for each row  ->  int32     backward; g W, from the same bytes

Only the forward pass and the gradient of the input touch frozen weights; both are safe in int8 (SwitchBack, Wortsman
et al. 2023, arXiv:2304.13013). Sums of int8 products are exact, and every row is rounded by itself, so a token has the
same bits beside any others. Columns of x that are far larger than the rest would take the bits of the rest, so they
are multiplied as they are (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 3); `calibration.py` finds them.

Where a device does not multiply int8 faster (`has_fast_int8`), the weights are brought back to floating point, block
by block: the memory is saved, and x keeps its bits.
"""

import functools
import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from lit_phi2.errors import InputError
from lit_phi2.model.device import bf16_speedup, fastest_seconds
from lit_phi2.model.linear import CHUNK_NUMEL, FrozenLinear, matmul_dtype

QUANTIZATIONS = (None, "int8")  # values of model.quantization
MAX_INT8 = 127  # -128 is left out: the range is symmetric
BLOCK_ROWS = 512  # of x whose int32 sums are in memory at the same time
TINY = 1e-35  # least scale, so that a row of zeros has one; rows are as small as the gradients of a mean over tokens
CUDA_MIN_ROWS = 32  # cuBLAS multiplies int8 from 17 rows on


class Int8Linear(FrozenLinear):
    """A FrozenLinear with its weight in int8; bias and results are in the compute dtype.

    Attributes:
        weight: (out, in), int8.
        weight_scale: (out,), float32; what an int8 of each output feature stands for.
        outlier_columns: (c,), int64; input features that are multiplied as they are.
        outlier_weight: (c, out), float32; their weights.
        grad_terms: int8 numbers that a gradient is the sum of: 2 keep 15 bits of it, for the long tail of a softmax.
    """

    weight_scale: Tensor
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    grad_terms: int

    @property
    def dtype(self) -> torch.dtype:
        """Of results and of `rows`."""
        return self.bias.dtype

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out); differentiable in the input."""
        return self.frozen_forward(input)

    def matmul(
        self,
        x: Tensor,
        *,
        features: slice = slice(None),
        use_bias: bool = True,
        lora_x: Tensor | None = None,
        lora_b: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """See FrozenLinear."""
        weight, weight_scale = self.weight[features], self.weight_scale[features]
        bias = self.bias[features].float() if use_bias and self.bias is not None else None
        columns = self.outlier_columns
        small_x = x if columns is None else x.index_fill(1, columns, 0)
        if has_fast_int8(x.device):
            out = int8_product(small_x, weight.t())
            # With the bias in one pass over memory.
            out = out.mul_(weight_scale) if bias is None else torch.addcmul(bias, out, weight_scale, out=out)
        else:
            out = _product_of_blocks(small_x, weight, weight_scale)
            out = out if bias is None else out.add_(bias)
        if columns is not None and self.outlier_weight is not None:
            out.add_((as_two_rows(x[:, columns].float()) @ self.outlier_weight[:, features])[: len(x)])
        if lora_x is not None and lora_b is not None:
            out.addmm_(lora_x.float(), lora_b.float(), alpha=scale)
        return out.to(x.dtype)

    def matmul_t(
        self,
        grad: Tensor,
        *,
        features: slice = slice(None),
        lora_x: Tensor | None = None,
        lora_b: Tensor | None = None,
    ) -> Tensor:
        """See FrozenLinear."""
        weight, weight_scale = self.weight[features], self.weight_scale[features]
        if has_fast_int8(grad.device):
            out = int8_product(grad, weight, column_scale=weight_scale, num_terms=self.grad_terms)
        else:
            out = _product_of_blocks_t(grad, weight, weight_scale)
        if self.outlier_columns is not None and self.outlier_weight is not None:
            out[:, self.outlier_columns] = grad.float() @ self.outlier_weight[:, features].t()
        if lora_x is not None and lora_b is not None:
            out.addmm_(lora_x.float(), lora_b.float())
        return out.to(grad.dtype)

    def rows(self, index: slice | Tensor) -> Tensor:
        """(n, in): the weights of some output features, in the compute dtype."""
        return dequantize(self.weight[index], self.weight_scale[index], self.dtype)


def check_quantization(name: str | None) -> None:
    """Refuse an unknown model.quantization.

    Raises:
        InputError: see above.
    """
    if name not in QUANTIZATIONS:
        raise InputError(f"model.quantization: is {name!r}; expected int8 or null.")


def describe_products(device: torch.device) -> str:
    """One line about how weights in 8 bits are multiplied on a device."""
    if not has_fast_int8(device):
        return f"{device.type} multiplies int8 no faster: weights are brought back block by block, and memory is saved"
    speedup = f" {int8_speedup():.1f} times as fast as floating point" if device.type == "cpu" else ""
    return f"{device.type} multiplies int8{speedup}"


def use_int8(layer: FrozenLinear) -> None:
    """Make a layer without memory, on the meta device, an Int8Linear without memory."""
    layer.__class__ = Int8Linear
    quantized: Any = layer
    quantized.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.int8), requires_grad=False)
    scale = torch.empty(layer.out_features, dtype=torch.float32, device=layer.weight.device)
    quantized.register_buffer("weight_scale", scale, persistent=False)
    quantized.register_buffer("outlier_columns", None, persistent=False)
    quantized.register_buffer("outlier_weight", None, persistent=False)
    quantized.grad_terms = 1


def set_outliers(layer: Int8Linear, columns: list[int], weight: Tensor) -> None:
    """Multiply some input features of a layer as they are, in both directions.

    Args:
        layer: without LoRA.
        columns: the input features; none multiplies all in int8.
        weight: (out, in), as it was: where an input is large its weights are small, and int8 has few bits of them.
    """
    if not columns:
        layer.outlier_columns = layer.outlier_weight = None
        return
    layer.outlier_columns = torch.tensor(columns, device=layer.weight.device)
    layer.outlier_weight = weight[:, columns].float().t().contiguous().to(layer.weight.device)


def quantize_into(weight: Tensor, values: Tensor, scale: Tensor) -> None:
    """Round a weight, (out, in) in any float dtype, into int8 `values` of that shape and `scale` (out,), in blocks.

    The largest weight of an output feature becomes 127 or -127.
    """
    num_rows = max(1, CHUNK_NUMEL // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        block = slice(start, start + num_rows)
        rows = weight[block].float()
        quantized, row_scale = quantize_rows(rows)
        values[block], scale[block] = quantized, row_scale[:, 0]


def quantize_rows(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N, K), times (K,) if given -> int8 (N, K) and float32 scales (N, 1), each the largest of its row / 127."""
    quotients = _scratch("quotients", x, torch.float32, x.shape)
    magnitudes = x
    if column_scale is not None:
        x = magnitudes = torch.mul(_float32(x, quotients), column_scale, out=quotients)
    magnitudes = torch.abs(magnitudes, out=_scratch("sums", magnitudes, magnitudes.dtype, x.shape))
    scale = magnitudes.amax(1, keepdim=True).float().div_(MAX_INT8).clamp_min_(TINY)
    return torch.div(_float32(x, quotients), scale, out=quotients).round_().to(torch.int8), scale


def _float32(x: Tensor, memory: Tensor) -> Tensor:
    """x, or a copy in the memory given. torch itself would take new memory to divide another dtype in float32."""
    return x if x.dtype == torch.float32 else memory.copy_(x)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (n, in) and scales (n,) -> (n, in) in dtype."""
    return (values.float() * scale[:, None]).to(dtype)


def int8_product(x: Tensor, matrix: Tensor, *, column_scale: Tensor | None = None, num_terms: int = 1) -> Tensor:
    """x (N, K), rounded to int8 row by row, times an int8 matrix (K, M) -> (N, M), float32.

    The result of an x in another dtype is in memory that the next product uses again.

    Args:
        x, matrix: see above.
        column_scale: (K,), what x is multiplied by first.
        num_terms: 2 adds the product of what rounding left, rounded in its turn.
    """
    shape = len(x), matrix.shape[1]
    is_float32 = x.dtype == torch.float32
    out = x.new_empty(shape) if is_float32 else _scratch("result", x, torch.float32, shape)
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        values, scale = quantize_rows(x[rows], column_scale)
        out[rows] = _int_matmul(values, matrix)
        out[rows].mul_(scale)
        if num_terms == 2:
            scaled = x[rows] if column_scale is None else x[rows] * column_scale
            rest, rest_scale = quantize_rows(scaled - values * scale)
            out[rows].add_(_int_matmul(rest, matrix).float().mul_(rest_scale))
    return out


def _int_matmul(values: Tensor, matrix: Tensor) -> Tensor:
    """int8 (N, K) times int8 (K, M) -> int32 (N, M), exact; the next product may reuse its memory."""
    missing = CUDA_MIN_ROWS - len(values)
    if values.device.type == "cuda" and missing > 0:
        return torch._int_mm(nn.functional.pad(values, (0, 0, 0, missing)), matrix)[: len(values)]
    sums = _scratch("sums", values, torch.int32, (len(values), matrix.shape[1]))
    return torch._int_mm(values, matrix, out=sums)  # a private name; torch's own quantization calls it


_kept = threading.local()


def _scratch(use: str, like: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Memory for a moment, uninitialized. On a CPU it is that of the last call with this use.

    What a step keeps would lie between allocations of each product, and the heap would grow by gigabytes.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    kept: Any = _kept.__dict__  # by use
    if use not in kept or len(kept[use]) < num_bytes:
        with torch.inference_mode(False):  # training writes to it, too
            kept[use] = torch.empty(num_bytes, dtype=torch.uint8)
    return kept[use][:num_bytes].view(dtype).view(shape)


def as_two_rows(x: Tensor) -> Tensor:
    """One row twice, more rows as they are: a product of one row adds in another order than products of more."""
    return x.expand(2, -1) if len(x) == 1 else x


def _product_of_blocks(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T, (N, in) -> (N, out), float32, with W in floating point block by block."""
    dtype = matmul_dtype(x)
    out, x_acc = x.new_empty(len(x), len(weight), dtype=torch.float32), x.to(dtype)
    for block in _blocks(weight):
        out[:, block] = x_acc @ dequantize(weight[block], scale[block], dtype).t()
    return out


def _product_of_blocks_t(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad W, (N, out) -> (N, in), float32."""
    dtype = matmul_dtype(grad)
    out = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    for block in _blocks(weight):
        out += grad[:, block].to(dtype) @ dequantize(weight[block], scale[block], dtype)
    return out


def _blocks(weight: Tensor) -> list[slice]:
    num_rows = max(1, CHUNK_NUMEL // weight.shape[1])
    return [slice(start, start + num_rows) for start in range(0, len(weight), num_rows)]


@functools.cache
def has_fast_int8(device: torch.device) -> bool:
    """Whether a device multiplies int8 faster than its best floating point numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and int8_speedup() > 1


@functools.cache
def int8_speedup() -> float:
    """How many times as fast as float32 or bfloat16, whichever is faster, the CPU multiplies int8."""
    x, weight = torch.ones(128, 512, dtype=torch.int8), torch.ones(512, 512, dtype=torch.int8)
    a, b = x.float(), weight.float()
    seconds = fastest_seconds(lambda: a @ b.t()) / max(1.0, bf16_speedup())
    return seconds / fastest_seconds(lambda: torch._int_mm(x, weight.t()))
