"""KVCache: the rotated keys and the values of every sequence in work, allocated once and written in place.

    (L, 2, S, H, C, d)      L layers   2 keys, values   S slots   H heads   C positions   d width of a head

A slot holds one sequence. New tokens are written at their positions before they attend, so a position beyond the
sequence may hold anything: it is overwritten before it is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CAPACITY_STEP = 64  # positions; a capacity is a multiple of it, so that few shapes occur


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the size of a cache depends on."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    def num_bytes(self, num_slots: int, capacity: int) -> int:
        """Bytes of keys and values.

        >>> CacheShape(32, 32, 80, torch.bfloat16).num_bytes(8, 1024)  # Phi-2
        2684354560
        """
        return self.num_layers * num_slots * 2 * self.num_heads * capacity * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of some slots.

    Args:
        shape: of the model.
        num_slots: sequences at the same time.
        capacity: positions of a slot.
        device: where the model runs.
    """

    def __init__(self, shape: CacheShape, num_slots: int, capacity: int, device: torch.device) -> None:
        self.shape, self.num_slots, self.capacity = shape, num_slots, capacity
        size = (shape.num_layers, 2, num_slots, shape.num_heads, capacity, shape.head_dim)
        # Zeros, because 0 times whatever memory holds may be NaN where attention masks a position.
        self.tensor = torch.zeros(size, dtype=shape.dtype, device=device)
        self.layers = list(self.tensor.unbind(0))  # (2, S, H, C, d) each

    def enlarged(self, capacity: int) -> "KVCache":
        """A cache with more positions and the same contents."""
        larger = KVCache(self.shape, self.num_slots, capacity, self.tensor.device)
        larger.tensor[..., : self.capacity, :] = self.tensor
        return larger

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys_values: Tensor) -> None:
        """Write new tokens.

        Args:
            layer: index.
            slots, positions: (N,) int64, of each token.
            keys_values: (N, 2, H, d), the keys after rotary.
        """
        self.layers[layer][:, slots, :, positions] = keys_values

    def copy_prefix(self, layer: int, source: int, target: int, length: int) -> None:
        """Copy the first positions of a slot to another."""
        self.layers[layer][:, target, :, :length] = self.layers[layer][:, source, :, :length]


def round_up(length: int, step: int = CAPACITY_STEP) -> int:
    """The smallest multiple of a step that is not less than a length.

    >>> round_up(65), round_up(65, 16)
    (128, 80)
    """
    return -(-length // step) * step
