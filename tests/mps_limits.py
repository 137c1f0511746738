"""What MPS lacks, as a mode that refuses it on any device: float64, complex128, and operators without an MPS kernel.

    torchgen/packaged/ATen/native/native_functions.yaml, of the installed torch
      aten::_int_mm     dispatch: CPU, CUDA                        -> refused
      aten::bmm.out     dispatch: CPU, CUDA, MPS                   -> has a kernel; so have the bmm that delegate to it
      aten::linear      no dispatch table, or a Composite key      -> made of others, which are checked in turn

The table is the one that torch's own kernels are registered from. What it cannot show: operators that MPS has, but not
for every dtype or size.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
REFUSED_DTYPES = (torch.float64, torch.complex128)


class NotOnMps(Exception):  # noqa: N818  it names the operator
    """MPS cannot do this."""


class MpsLimits(TorchDispatchMode):
    """Refuses what MPS lacks.

    Args:
        device_type: of the tensors that stand for those on the GPU; the dtypes of others are not judged.

    Attributes:
        shapes: of every call: operator, and the sizes of its tensors. MPS compiles and keeps a graph for each.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.shapes: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.namespace == "aten" and not has_mps_kernel(name.removeprefix("aten::")):
            raise NotOnMps(f"{name} has no MPS kernel")
        if name in decomposed():  # under inference_mode it arrives whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for tensor in tensors + outputs:
            if tensor.device.type == self.device_type and tensor.dtype in REFUSED_DTYPES:
                raise NotOnMps(f"{name} has a {tensor.dtype}")
        if any(tensor.device.type == self.device_type for tensor in outputs):
            self.shapes.add((name, *(tuple(tensor.shape) for tensor in tensors + outputs)))
        return result


@functools.cache
def native_functions() -> Mapping[str, Mapping[str, Any]]:
    """The entries of torch's table, by operator and overload."""
    entries = yaml.load(TABLE.read_text("utf-8"), Loader=yaml.CSafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in entries}


@functools.cache
def has_mps_kernel(name: str) -> bool:
    """Whether an operator has a kernel for MPS or is made of others; one that torch generates is."""
    entry = native_functions().get(name)
    if entry is None:
        return True
    if delegate := entry.get("structured_delegate"):
        return has_mps_kernel(delegate)
    keys = {key.strip() for keys in entry.get("dispatch") or {} for key in keys.split(",")}
    return not keys or any(key == "MPS" or key.startswith("Composite") for key in keys)


@functools.cache
def decomposed() -> frozenset[str]:
    """Operators that are made of others on every device."""
    entries = native_functions().items()
    return frozenset(
        f"aten::{name}"
        for name, entry in entries
        if "structured_delegate" not in entry
        and ("dispatch" not in entry or "CompositeImplicitAutograd" in entry["dispatch"])
    )
