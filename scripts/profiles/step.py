"""Step: forward and backward of lit_phi2's module, by size, by kind of operator, and compiled; and its matmuls.

rows x tokens of synthetic examples -> Batch -> loss -> backward -> seconds, GiB above the loaded model
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from measurement import write_measurement
from peers.task import LORA_R
from timers import matmul_rates, now, peak_gib, reset_peak_memory, resident_gib

EXAMPLE_LENGTH = 128  # tokens of a synthetic example, half of them supervised
# Kind -> names of torch's operators in a profile; the first kind that matches counts.
KINDS = {
    "matmul": ("mm", "addmm", "linear"),
    "attention": ("bmm", "baddbmm", "softmax", "scaled_dot_product", "flash"),
    "activation": ("gelu", "pow", "tanh"),
    "norm and dropout": ("layer_norm", "dropout", "bernoulli"),
    "casts and copies": ("copy_", "cat", "to_copy", "clone", "contiguous", "fill_", "zero_"),
    "softmax of the output layer": ("exp", "logsumexp", "log_softmax", "nll", "amax", "argmax", "gather", "scatter"),
    "optimizer": ("adam",),
}


def sizes(args: argparse.Namespace) -> None:
    """Median seconds of a step after the first, and memory above the loaded model, by size of the batch."""
    module = load_module(args.base, args.device)
    print("| rows x tokens | tokens | seconds | tokens/s | GiB above the model | MiB of the loss alone |")
    print("|---|---|---|---|---|---|")
    points = []
    for length in args.lengths:
        for rows in args.batches:
            batch = synthetic_batch(rows, length, module.fused_phi.config.vocab_size)
            before = start_peak(args.device)
            seconds = [timed(partial(train_step, module, batch), args.device) for _ in range(1 + args.rounds)]
            point = {"rows": rows, "length": length, "seconds": median(seconds[1:])}
            point |= {"gib_above_model": peak_gib(args.device) - before, "loss_gib": loss_gib(module, batch)}
            points.append(point)
            print(
                f"| {rows} x {length} | {rows * length:,} | {point['seconds']:.3f} "
                f"| {rows * length / point['seconds']:,.0f} | {point['gib_above_model']:.2f} "
                f"| {1024 * point['loss_gib']:.0f} |",
                flush=True,
            )
    if args.output:
        device = torch.cuda.get_device_name() if args.device == "cuda" else ""
        write_measurement(args.output, "step_sizes", {"points": points}, device=device)


def operators(args: argparse.Namespace) -> None:
    """Self time of operators in a step over one row of 512 tokens, by kind: transformers + PEFT, and lit_phi2."""
    module = load_module(args.base, args.device)
    batch = synthetic_batch(1, 512, module.fused_phi.config.vocab_size)
    steps: dict[str, Callable[[], object]] = {
        "transformers + PEFT": native_step(args.base, batch, args.device, args.peer_dtype),
        "lit_phi2": partial(train_step, module, batch),
    }
    columns: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        timed(step, args.device)
        print(f"{name}: {1000 * median(timed(step, args.device) for _ in range(args.rounds)):.1f} ms a step")
        columns[name] = seconds_by_kind(step, args.device)
    print("| ms in | " + " | ".join(columns) + " |\n|---|---|---|")
    for kind in [*KINDS, "other"]:
        print(f"| {kind} | " + " | ".join(f"{1000 * column[kind]:.0f}" for column in columns.values()) + " |")
    print("| all | " + " | ".join(f"{1000 * sum(column.values()):.0f}" for column in columns.values()) + " |")
    layer = module.fused_phi.model.layers[0].mlp.fc1.base_layer
    print(f"matmul rate {max(matmul_rates('fc1', 512, layer.weight).values()) / 1e12:.2f} TFLOP/s")


def seconds_by_kind(step: Callable[[], object], device: str) -> dict[str, float]:
    """Self time of a step's operators, summed by kind."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        timed(step, device)
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        self_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == DeviceType.CPU:  # operators only: their kernels would count twice
            seconds[kind_of(event.key)] += self_time / 1e6
    return seconds


def kind_of(operator: str) -> str:
    """The kind of an operator by its name in a profile.

    >>> kind_of("aten::addmm_"), kind_of("aten::_softmax"), kind_of("aten::view")
    ('matmul', 'attention', 'other')
    """
    name = operator.removeprefix("aten::").lower()
    for kind, names in KINDS.items():
        if name.removesuffix("_") in names or name in names:
            return kind
        if kind != "matmul" and any(part in name for part in names):
            return kind
    return "other"


def matmul(args: argparse.Namespace) -> None:
    """Milliseconds of the matmuls of a row of 512 tokens with fc1; torch's own bfloat16 last, it may take a minute."""
    from lit_phi2.model.linear import frozen_matmul

    module = load_module(args.base, args.device)
    weight = module.fused_phi.model.layers[0].mlp.fc1.base_layer.weight.detach()
    weight_fp32, (num_out, num_in) = weight.float(), weight.shape
    print("| 512 rows | float32 | bfloat16, lit_phi2 | bfloat16, torch |\n|---|---|---|---|")
    for name, width, matrix_fp32, matrix in (
        ("x W^T", num_in, weight_fp32.t(), weight.t()),
        ("g W", num_out, weight_fp32, weight),
    ):
        x = torch.randn(512, width, device=weight.device)
        calls = [
            (partial(torch.mm, x, matrix_fp32), args.rounds),
            (partial(frozen_matmul, x.bfloat16(), matrix), args.rounds),
            (partial(torch.mm, x.bfloat16(), matrix), 1),
        ]
        cells = [f"{1000 * min(timed(call, args.device) for _ in range(rounds)):,.0f}" for call, rounds in calls]
        print(f"| {name}, {num_in} to {num_out} | " + " | ".join(cells) + " |")


def compiled(args: argparse.Namespace) -> None:
    """Seconds of a step over rows of 512 tokens in changing layouts: eager, and with compiled blocks.

    Attention is left out of the graph: it loops over the examples of a row, so each layout would compile it again.
    """
    from lit_phi2.model import phi2

    module = load_module(args.base, args.device)
    generator = torch.Generator().manual_seed(0)
    batches = [uneven_batch(generator, module.fused_phi.config.vocab_size) for _ in range(8)]
    variants = {
        "eager": (phi2.block_forward, phi2.packed_attention),
        "compiled": (
            torch.compile(phi2.block_forward, dynamic=True),
            torch.compiler.disable(phi2.packed_attention),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def train_all() -> None:
        for batch in batches:
            train_step(module, batch)

    for number in range(args.rounds):
        for name, (block_forward, packed_attention) in variants.items():
            phi2.block_forward, phi2.packed_attention = block_forward, packed_attention
            seconds[name].append(timed(train_all, args.device) / len(batches))
            print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s a step", flush=True)
    eager, warm = median(seconds["eager"][1:]), median(seconds["compiled"][1:])
    compile_seconds = len(batches) * (seconds["compiled"][0] - warm)
    over_1000_steps = 1000 * eager / (compile_seconds + 1000 * warm)
    print(
        f"compiled: {eager / warm:.2f} times as fast, {compile_seconds:.0f} s to compile; over 1,000 steps "
        f"{over_1000_steps:.2f} times"
    )


def load_module(base: str, device: str) -> Any:
    from lit_phi2.training.module import LitPhi2

    module = LitPhi2(base=base, lora_r=LORA_R, lora_alpha=2 * LORA_R, dtype="bfloat16")
    module.configure_model()
    return module.to(device)


def synthetic_batch(rows: int, length: int, vocab_size: int) -> Any:
    """Full rows of examples of EXAMPLE_LENGTH tokens, half of each supervised."""
    from lit_phi2.data.collate import collate
    from lit_phi2.types import Example

    generator = torch.Generator().manual_seed(0)
    per_row = length // EXAMPLE_LENGTH
    ids = torch.randint(1, vocab_size, (rows * per_row, EXAMPLE_LENGTH), generator=generator).tolist()
    examples = [Example(str(index), example_ids, EXAMPLE_LENGTH // 2) for index, example_ids in enumerate(ids)]
    members = [tuple(range(row * per_row, (row + 1) * per_row)) for row in range(rows)]
    return collate(examples, members, loss_weight=2 / (rows * length))


def uneven_batch(generator: torch.Generator, vocab_size: int) -> Any:
    """One row of 512 tokens, cut into four examples at random multiples of 8, half of each supervised."""
    from lit_phi2.data.collate import collate
    from lit_phi2.types import Example

    cuts = torch.randperm(63, generator=generator)[:3].sort().values.add(1).mul(8).tolist()
    lengths = [end - start for start, end in pairwise([0, *cuts, 512])]
    ids = [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    examples = [Example(str(index), example_ids, len(example_ids) // 2) for index, example_ids in enumerate(ids)]
    return collate(examples, [tuple(range(len(examples)))], loss_weight=1 / 256)


def train_step(module: Any, batch: Any) -> None:
    """Forward and backward; the optimizer takes too little time to matter."""
    (module.loss(batch.to(module.device)).nats * batch.loss_weight).backward()
    module.zero_grad()


def native_step(base: str, batch: Any, device: str, dtype: str) -> Callable[[], None]:
    """The same step by transformers' Phi and PEFT's layers, with a loss over all positions, as their trainers do."""
    from lit_phi2.pretrained import resolve_base_model
    from peers.native_phi import load_native_phi

    model = load_native_phi(str(resolve_base_model(base).folder), dtype)
    model.to(device).train()
    batch = batch.to(device)

    def step() -> None:
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False)
        output.loss.backward()
        model.zero_grad()

    return step


def loss_gib(module: Any, batch: Any) -> float:
    """Memory of the loss alone, without the hidden states of the supervised positions and their gradient."""
    from lit_phi2.model.loss import causal_lm_loss

    head = module.fused_phi.lm_head
    options: dict[str, Any] = {"dtype": head.weight.dtype, "device": head.weight.device}
    hidden = torch.randn(*batch.labels.shape, head.in_features, **options, requires_grad=True)
    labels = batch.labels.to(module.device)
    before = start_peak(module.device.type)
    loss = causal_lm_loss(hidden, labels, head)
    states = 2 * int(loss.num_tokens) * head.in_features * head.weight.itemsize
    return max(0.0, peak_gib(module.device.type) - before - states / 2**30)


def start_peak(device: str) -> float:
    """GiB in use now, and a new peak from here on."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # a step keeps what it freed, which would hide what the next one needs
    reset_peak_memory(device)
    return torch.cuda.memory_allocated(device) / 2**30 if device == "cuda" else resident_gib()


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    began = now(device)
    call()
    return now(device) - began
