"""Products: weights copied into the dtype and layout that this machine multiplies faster, and which that is.

W, A, B  ->  W + scale B A, added in float32, rounded once, by rows that fit a cache
W        ->  the same in the layout that oneDNN multiplies
head, rows of a pass  ->  seconds of each way to multiply them  ->  the fastest
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_phi2.model.device import cpu_bf16_instructions
from lit_phi2.model.linear import frozen_matmul
from lit_phi2.model.lora import LoraUpdate

MERGED_AT_ONCE = 2**18  # weights to which an adapter is added
MIN_SPEEDUP = 1.2  # of float32 over bfloat16: an answer should not depend on the noise of a measurement


def merged(base: Any, updates: Sequence[LoraUpdate], dtype: torch.dtype) -> Tensor:
    """A copy of W + scale B A, rounded once; added by rows that fit a cache."""
    out_features, in_features = base.out_features, base.in_features
    total = torch.empty(out_features, in_features, dtype=dtype, device=base.weight.device)
    sums = torch.empty(max(1, MERGED_AT_ONCE // in_features), in_features, device=base.weight.device)
    factors = [(update.a.detach().float(), update.b.detach().float(), update.scale) for update in updates]
    for start in range(0, out_features, len(sums)):
        rows = slice(start, min(start + len(sums), out_features))
        part = sums[: rows.stop - start].copy_(base.rows(rows).detach())
        for a, b, scale in factors:
            part.addmm_(b[rows], a, alpha=scale)
        total[rows] = part
    return total


def pack(weight: Tensor) -> Tensor:
    """A weight in the layout that oneDNN multiplies; torch's own products bring it there in every call.

    In float32 a packed weight gives the bits of 2 rows for any larger number of rows, so a token has the same logits
    beside any others, and few rows are read from memory at its bandwidth.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias for a packed W. Private names, which torch's own compiler calls in the pinned version."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@dataclass(frozen=True, slots=True)
class Measured:
    """A way to multiply a few rows by the head, or copies of it.

    Attributes:
        name: native, emulated (`linear.py` in float32, chunk by chunk), packed or float32 (copies).
        seconds: of the product.
        copy_bytes: of a weight in the copy; 0 without one.
    """

    name: str
    seconds: float
    copy_bytes: int = 0


def measure_products(head: Any, num_rows: int, *, with_copies: bool) -> list[Measured]:
    """How fast this CPU multiplies a few rows by bfloat16 weights, in every way that there is.

    Few rows take as long as reading the weights, so the head is measured whole: a part of it would stay in a cache.
    """
    weight = head.rows(slice(None)).detach()
    rows = torch.ones(num_rows, weight.shape[1], dtype=weight.dtype)
    products = [
        Measured("native", _best_seconds(lambda: rows @ weight.t())),
        Measured("emulated", _best_seconds(lambda: frozen_matmul(rows, weight.t()))),
    ]
    if with_copies:
        products.append(_measure_copy("float32", head, rows.float()))
    if with_copies and cpu_bf16_instructions() is not None and torch.backends.mkldnn.is_available():
        products.append(_measure_copy("packed", head, rows))
    return products


def _measure_copy(name: str, head: Any, rows: Tensor) -> Measured:
    weight = merged(head, [], rows.dtype)
    if torch.backends.mkldnn.is_available():
        packed = pack(weight)
        seconds = _best_seconds(lambda: packed_product(rows, packed, None))
    else:
        seconds = _best_seconds(lambda: rows @ weight.t())
    return Measured(name, seconds, rows.dtype.itemsize)


def fastest(products: dict[str, Measured]) -> tuple[Measured, Measured]:
    """The product to take, and the faster one of those without a copy.

    Args:
        products: by name; native and emulated are among them, copies where they fit the memory.
    """
    own = min((products["native"], products["emulated"]), key=lambda product: product.seconds)
    packed, single = products.get("packed"), products.get("float32")
    # Packed products give the bits of native ones; float32 must be clearly faster than either.
    best = packed if packed is not None and packed.seconds < own.seconds else own
    if single is not None and MIN_SPEEDUP * single.seconds <= best.seconds:
        best = single
    return best, own


def _best_seconds(product: Callable[[], Tensor]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        product()
        return time.perf_counter() - start

    return min(seconds() for _ in range(3))
