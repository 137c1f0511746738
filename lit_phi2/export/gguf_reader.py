"""GGUF reader: the keys and tensors of a GGUF file, which may come from anywhere.

    magic, version, counts | keys | names, shapes and offsets of tensors | padding | data     (all little-endian)

The package gguf writes such files, but its reader counts up to any length that a file claims. This one compares every
count with the bytes that are left, so a damaged or hostile file is refused after reading it once. Data is mapped, not
read. Layout: ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_phi2.errors import InputError

ARCHITECTURE = "phi2"
ADAPTER_KEY = "lit_phi2.adapter"  # our own key, which other readers pass over

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_ENTRIES = 100_000  # keys or tensors; Phi-2 has 453 tensors
_MAX_NAME = 65_535  # bytes of a key, by the format
_MAX_DIMS = 4  # GGML_MAX_DIMS of ggml.h
_STRING, _ARRAY = 8, 9
# Number of a value's type in the file -> its numpy dtype.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a tensor's elements are stored.

    Attributes:
        number: of the type in the file (ggml_type of ggml.h).
        block: elements that are stored together.
        block_bytes: bytes of a block.
    """

    number: int
    block: int
    block_bytes: int

    def num_bytes(self, num_elements: int) -> int:
        return num_elements // self.block * self.block_bytes


TENSOR_TYPES = {
    "float32": TensorType(0, 1, 4),
    "float16": TensorType(1, 1, 2),
    "q8_0": TensorType(8, 32, 34),
    "bfloat16": TensorType(30, 1, 2),
}
_TYPE_NAMES = {kind.number: name for name, kind in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        shape: in torch's order, the last axis contiguous.
        dtype: a key of TENSOR_TYPES.
        data: its bytes, mapped from the file.
    """

    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray[Any, Any]

    def to_torch(self) -> Tensor:
        """A float32 copy."""
        if self.dtype == "q8_0":  # blocks of a float16 scale and 32 int8
            blocks = self.data.reshape(-1, TENSOR_TYPES["q8_0"].block_bytes)
            scales, values = blocks[:, :2].copy().view("<f2").astype("f4"), blocks[:, 2:].copy().view("i1")
            return torch.from_numpy(scales * values.astype("f4")).reshape(self.shape)
        return torch.frombuffer(bytearray(self.data), dtype=getattr(torch, self.dtype)).float().reshape(self.shape)


def read_gguf(path: Path) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    """The keys and the tensors of a GGUF file; an array is a list of texts or a numpy array.

    Raises:
        InputError: the file is missing, damaged or hostile, or has tensors of a type that lit_phi2 does not write.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Reader(data, path).read()
    except InputError:
        raise
    except (OSError, ValueError, struct.error) as error:  # ValueError: an empty file, or a text that is not UTF-8
        raise InputError(f"{path}: is not a GGUF file ({type(error).__name__}: {error}).") from error


class _Reader:
    """Reads a file from front to back; `position` is the next byte."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def read(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        if self.take(4) != _MAGIC:
            raise InputError(f"{self.path}: is not a GGUF file: it does not begin with GGUF.")
        if (version := self.number("<I")) not in _VERSIONS:
            raise self.error(f"its version is {version}; expected 2 or 3")
        num_tensors, num_keys = self.number("<Q"), self.number("<Q")
        if max(num_tensors, num_keys) > _MAX_ENTRIES:
            raise self.error(f"it claims {num_tensors} tensors and {num_keys} keys")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text(_MAX_NAME)
            if key in keys:
                raise self.error(f"it has the key {key!r} twice")
            keys[key] = self.value(self.number("<I"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error("its alignment is no power of two")
        start = -(-self.position // alignment) * alignment
        tensors = {name: self.tensor(start, shape, dtype, offset) for name, shape, dtype, offset in infos}
        if len(tensors) < num_tensors:
            raise self.error("it has two tensors of one name")
        if tensors and sum(len(tensor.data) for tensor in tensors.values()) > len(self.data) - start:
            raise self.error("its tensors overlap")
        return keys, tensors

    def error(self, problem: str) -> InputError:
        return InputError(f"{self.path}: is a damaged GGUF file: {problem}.")

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise self.error(f"byte {self.position} claims {num_bytes} bytes, and {len(self.data)} are there")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, format: str) -> int:
        value: int = struct.unpack(format, self.take(struct.calcsize(format)))[0]
        return value

    def text(self, max_bytes: int | None = None) -> str:
        length = self.number("<Q")
        if max_bytes is not None and length > max_bytes:
            raise self.error(f"byte {self.position} claims a name of {length} bytes")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()
        if kind != _ARRAY:
            raise self.error(f"byte {self.position} has a value of the unknown type {kind}")
        item_kind, length = self.number("<I"), self.number("<Q")
        if item_kind in _SCALARS:
            return np.frombuffer(self.take(length * np.dtype(_SCALARS[item_kind]).itemsize), _SCALARS[item_kind])
        if item_kind != _STRING or length > (len(self.data) - self.position) // 8:  # a text has a length of 8 bytes
            raise self.error(f"byte {self.position} claims an array of {length} values of type {item_kind}")
        return [self.text() for _ in range(length)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.text(_MAX_NAME)
        if (num_dims := self.number("<I")) > _MAX_DIMS:
            raise self.error(f"a tensor claims {num_dims} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(num_dims)]))
        if (kind := self.number("<I")) not in _TYPE_NAMES:
            raise self.error(
                f"a tensor has type {kind}, which lit_phi2 does not write; expected F32, F16, BF16 or Q8_0"
            )
        return name, shape, _TYPE_NAMES[kind], self.number("<Q")

    def tensor(self, start: int, shape: tuple[int, ...], dtype: str, offset: int) -> GgufTensor:
        kind, num_elements = TENSOR_TYPES[dtype], math.prod(shape)
        num_bytes = kind.num_bytes(num_elements)
        if num_elements == 0:
            raise self.error("a tensor has no elements")
        if start + offset + num_bytes > len(self.data) or (shape and shape[-1] % kind.block):
            raise self.error(f"a tensor of shape {shape} is not inside the file")
        return GgufTensor(shape, dtype, np.frombuffer(self.data, np.uint8, num_bytes, start + offset))
