"""Measure the fast path against its limits: tokenizing, starting, time and memory by size, time by kind of operation.

    python scripts/profiling.py tokens --base FOLDER --records FILE     encode against tokenizers' own encode_batch
    python scripts/profiling.py start                                  --help, and the first step of quickstart's fit
    python scripts/profiling.py sizes --base FOLDER                   a step by length and number of rows
    python scripts/profiling.py kinds --base FOLDER                   where the time of a step goes, ours and PEFT's
    python scripts/profiling.py products --base FOLDER                a product in float32, in bfloat16 by torch, by ours
    python scripts/profiling.py compile --base FOLDER                 steps with torch.compile, and without
    python scripts/profiling.py scale --records FILE                  time and memory by number of records

Figures of one machine at one time: compare those of one run only.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import RANK, forget_peak, peak_gib, product_rates

LENGTHS, BATCHES = (128, 256, 512, 1024, 2048), (1, 2, 4, 8)
COUNTS = (10**4, 10**5, 10**6)
EXAMPLE = 128  # tokens of a synthetic example, half of them learned
# Kind -> names of torch's operators, as a profile tells them; the first kind that fits counts.
KINDS = {
    "products": ("mm", "addmm", "linear"),
    "attention": ("bmm", "baddbmm", "softmax", "scaled_dot_product", "flash"),
    "activation": ("gelu", "pow", "tanh"),
    "norm and dropout": ("layer_norm", "dropout", "bernoulli"),
    "casts and copies": ("copy_", "cat", "to_copy", "clone", "contiguous", "fill_", "zero_"),
    "head's softmax": ("exp", "logsumexp", "log_softmax", "nll", "amax", "argmax", "gather", "scatter"),
    "optimizer": ("adam",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "start", "sizes", "kinds", "products", "compile", "scale"])
    parser.add_argument("--base", default="tiny", help="as model.base")
    parser.add_argument("--records", default="claims:train", help="as data.train_files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of sizes, kinds and compile")
    parser.add_argument("--plain-dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of PEFT's in kinds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--planned", type=int, default=10**7, help="records of scale that are only planned")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    args = parser.parse_args()
    functions = (tokens, start, sizes, kinds, products, scale)
    ({one.__name__: one for one in functions} | {"compile": compiled})[args.what](args)


def tokens(args: argparse.Namespace) -> None:
    """Records a second of encode, and of encode_batch on the same strings; alternating."""
    from tokenizers import Tokenizer

    from lit_phi2.data.encode import encode
    from lit_phi2.data.prompts import format_prompt
    from lit_phi2.data.records import FieldNames, read_records
    from lit_phi2.pretrained import load_tokenizer, resolve_base_model

    base = resolve_base_model(args.base)
    records, _ = read_records([args.records], FieldNames(), needs_response=True)
    records = (records * (1 + 4000 // len(records)))[:4000]
    strings = [text for r in records for text in (format_prompt(r.instruction, r.input), r.response)]
    bare, tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json")), load_tokenizer(base)
    shares = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        found = bare.encode_batch(strings, add_special_tokens=False)
        between = time.perf_counter()
        encoded = encode(records, tokenizer, max_length=10**6)
        ended = time.perf_counter()
        assert sum(len(one) for one in found) == sum(len(e.ids) - 1 for e in encoded.examples)
        shares.append((between - began) / (ended - between))
        print(
            f"encode_batch {len(records) / (between - began):,.0f} records/s, encode "
            f"{len(records) / (ended - between):,.0f}: {shares[-1]:.2f} of it",
            flush=True,
        )
    print(f"median {median(shares):.2f}")


def start(args: argparse.Namespace) -> None:
    """Seconds of --help beside a bare import of Lightning's CLI, and from start to the first optimizer step."""
    commands = {
        "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
        "--help": ["-m", "lit_phi2", "--help"],
        "fit --help": ["-m", "lit_phi2", "fit", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    bare = seconds["import lightning.pytorch.cli"]
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, bare, strict=True)]
        print(f"{name}: {median(taken):.1f} s, {median(ratios):.2f} times the import", flush=True)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        fit = [sys.executable, "-m", "lit_phi2", "fit", "--config", "configs/tiny.yaml", "--trainer.max_steps", "1"]
        fit += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", folder]
        subprocess.run(fit, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        events = EventAccumulator(str(next(Path(folder).glob("*/version_0")))).Reload()
        print(f"first step {events.Scalars('train/loss')[0].wall_time - began:.1f} s after the start")


def sizes(args: argparse.Namespace) -> None:
    """Median seconds of a step after the first, and memory above the loaded model, by size of batch."""
    module = load(args.base, args.device)
    print("| rows x tokens | tokens | seconds | tokens/s | GiB above the model | MiB of logits |")
    print("|---|---|---|---|---|---|")
    points = []
    for length in args.lengths:
        for rows in args.batches:
            batch = synthetic(rows, length, module.fused_phi.config.vocab_size)
            before = start_watching(module.device)
            taken = [timed(lambda b=batch: train_on(module, b)) for _ in range(1 + args.rounds)]  # type: ignore[misc]
            seconds = median(taken[1:])
            above, count = peak_gib(args.device) - before, rows * length
            points.append((count, seconds, above))
            print(
                f"| {rows} x {length} | {count:,} | {seconds:.3f} | {count / seconds:,.0f} | {above:.2f} "
                f"| {1024 * logits_gib(module, batch):.0f} |",
                flush=True,
            )
    counts = sorted({point[0] for point in points})
    for title, index in (("seconds", 1), ("GiB above the model", 2)):
        plot(f"A step: {title} by tokens", title, counts, [max(p[index] for p in points if p[0] == n) for n in counts])


def plot(title: str, unit: str, counts: list[int], values: list[float]) -> None:
    """A line in the notation that GitHub draws."""
    names = ", ".join(f'"{count:,}"' for count in counts)
    print(f'\n```mermaid\nxychart-beta\n    title "{title}"\n    x-axis [{names}]\n    y-axis "{unit}"')
    print(f"    line [{', '.join(f'{value:.2f}' for value in values)}]\n```")


def kinds(args: argparse.Namespace) -> None:
    """Self time of operators in one step over a row of 512, by kind: PEFT's layers in transformers' Phi, and ours."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    module = load(args.base, args.device)
    batch = synthetic(1, 512, module.fused_phi.config.vocab_size)
    runs: dict[str, Callable[[], Any]] = {
        "before": plain_step(args.base, batch, args.device, args.plain_dtype),
        "after": lambda: train_on(module, batch),
    }
    columns: dict[str, dict[str, float]] = {}
    on_gpu = args.device == "cuda"
    for name, run in runs.items():
        timed(run)
        print(f"{name}: {1000 * median(timed(run) for _ in range(args.rounds)):.1f} ms a step")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu  # the operator that a kernel belongs to
        with profile(activities=activities) as told:
            timed(run)
        columns[name] = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in told.key_averages():
            taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if event.device_type == DeviceType.CPU:  # and not the kernels, or they would count twice
                columns[name][kind_of(event.key)] += taken / 1e6
    print("| ms in | " + " | ".join(columns) + " |\n|---|---|---|")
    for kind in [*KINDS, "other"]:
        print(f"| {kind} | " + " | ".join(f"{1000 * column[kind]:.0f}" for column in columns.values()) + " |")
    print("| all | " + " | ".join(f"{1000 * sum(column.values()):.0f}" for column in columns.values()) + " |")
    layer = module.fused_phi.model.layers[0].mlp.fc1.base_layer
    best = max(product_rates("fc1", 512, layer.weight).values())
    print(f"product rate {best / 1e12:.2f} TFLOP/s")


def products(args: argparse.Namespace) -> None:
    """Milliseconds of the products of a row of 512 with fc1; torch's own last, for it may take a minute."""
    from lit_phi2.model.linear import frozen_matmul

    module = load(args.base, args.device)
    weight = module.fused_phi.model.layers[0].mlp.fc1.base_layer.weight.detach()
    exact, (num_out, num_in) = weight.float(), weight.shape
    print("| 512 rows | float32 | bfloat16, ours | bfloat16, torch's own |\n|---|---|---|---|")
    for name, width, wide, of in (("x W^T", num_in, exact.t(), weight.t()), ("g W", num_out, exact, weight)):
        x = torch.randn(512, width, device=weight.device)
        low = x.bfloat16()
        figures = [
            1000 * min(timed(lambda one=one, other=other, by=by: by(one, other)) for _ in range(rounds))  # type: ignore[misc]
            for one, other, by, rounds in (
                (x, wide, torch.mm, args.rounds),
                (low, of, frozen_matmul, args.rounds),
                (low, of, torch.mm, 1),
            )
        ]
        print(f"| {name}, {num_in} to {num_out} | " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |")


def compiled(args: argparse.Namespace) -> None:
    """Seconds of a step over rows of 512 in ever new layouts: as it is, and with the blocks compiled around attention.

    Attention goes through the examples of a row one by one, so compiled it would be made anew for every row.
    """
    from lit_phi2.model import phi2

    module = load(args.base, args.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = module.fused_phi.config.vocab_size
    batches = [uneven(generator, vocabulary) for _ in range(8)]
    ways = {
        "as it is": (phi2._block, phi2.packed_attention),
        "compiled": (torch.compile(phi2._block, dynamic=True), torch.compiler.disable(phi2.packed_attention)),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}

    def run() -> None:
        for batch in batches:
            train_on(module, batch)

    for number in range(args.rounds):
        for name, (block, packed_attention) in ways.items():
            phi2._block, phi2.packed_attention = block, packed_attention
            took[name].append(timed(run) / len(batches))
            print(f"round {number + 1}, {name}: {took[name][-1]:.2f} s a step", flush=True)
    steady = median(a / b for a, b in zip(*(took[name][1:] for name in ("as it is", "compiled")), strict=True))
    first = len(batches) * (took["compiled"][0] - median(took["compiled"][1:]))
    whole = 1000 * median(took["as it is"][1:]) / (first + 1000 * median(took["compiled"][1:]))
    print(f"compiled: {steady:.2f} times as fast once made, {first:.0f} s to make; over 1,000 steps {whole:.2f} times")


def scale(args: argparse.Namespace) -> None:
    """Records made of those of --records, told apart by a number; each count in a process of its own.

    Memory is what a process holds by itself (RssAnon), above what it held before; pages of a mapped file are the
    system's, which takes them back at need.
    """
    print("| records | GB of file | GB of cache | read and tokenized, s | memory, GiB | opened again, s | memory, GiB "
          "| epoch planned, s | memory, GiB | its middle step, ms |")  # fmt: skip
    print("|---" * 10 + "|")
    context = multiprocessing.get_context("spawn")
    took: dict[str, list[float]] = {"seconds to read and tokenize, a 1,000 records": [], "GiB while doing so": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        for count in args.counts:
            file = Path(scratch) / f"{count}.{args.format}"
            write_many(file, args.records, count)
            row = [f"{count:,}", f"{file.stat().st_size / 1e9:.2f}"]
            for again in (False, True):
                with context.Pool(1) as pool:
                    found = pool.apply(set_up, (str(file), args.base, scratch))
                if not again:
                    for name, value in zip(took, (1000 * found["seconds"] / count, found["gib"]), strict=True):
                        took[name].append(value)
                row += [f"{found['cached'] / 1e9:.2f}"] * (not again) + [
                    f"{found['seconds']:.1f}",
                    f"{found['gib']:.2f}",
                ]
            lengths = found["lengths"]
            with context.Pool(1) as pool:
                row += pool.apply(plan_many, (lengths, count))
            print("| " + " | ".join(row) + " |", flush=True)
            file.unlink()
        with context.Pool(1) as pool:
            row = [f"{args.planned:,}", *["-"] * 6, *pool.apply(plan_many, (lengths, args.planned))]
        print("| " + " | ".join(row) + " |")
    for name, values in took.items():
        plot(name, name, list(args.counts), values)


def write_many(file: Path, source: str, count: int) -> None:
    """So many records, each with an id, a claim number and so a prompt of its own."""
    import pyarrow as pa  # type: ignore[import-untyped]  # it has no types
    from pyarrow import parquet

    from lit_phi2.data.records import FieldNames, read_records
    from lit_phi2.utils.sequences import batched

    records, _ = read_records([source], FieldNames(), needs_response=True)
    numbered = (
        {
            "id": f"record {number}",
            "instruction": f"{records[number % len(records)].instruction} Claim {number}.",
            "input": records[number % len(records)].input,
            "response": records[number % len(records)].response,
        }
        for number in range(count)
    )
    if file.suffix == ".jsonl":
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in numbered)
        return
    schema = pa.schema([(name, pa.string()) for name in ("id", "instruction", "input", "response")])
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in batched(numbered, 1000):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def set_up(file: str, base: str, scratch: str) -> dict[str, Any]:
    """What fit does with its files before it loads a model."""
    from lit_phi2.data.datamodule import ClaimsDataModule

    cache = Path(scratch) / "cache"
    data = ClaimsDataModule(train_files=file, base=base, max_length=1024, on_overlong="skip", cache_dir=str(cache))
    with watched() as seen:
        data.setup("fit")
        batch = data.splits["train"].examples[len(data.splits["train"].examples) // 2]
        assert batch.ids
    folders = [folder for folder in cache.glob("*") if folder.is_dir()]
    cached = max((sum(part.stat().st_size for part in folder.iterdir()) for folder in folders), default=0)
    return {**seen, "cached": cached, "lengths": data.splits["train"].lengths[:100_000]}


def plan_many(lengths: Any, count: int) -> list[str]:
    """An epoch of so many examples, whose lengths are drawn from these."""
    import numpy as np

    from lit_phi2.data.schedule import BatchingConfig, training_schedule

    drawn = np.random.default_rng(0).choice(lengths, count)
    with watched() as seen:
        plan = training_schedule(drawn, drawn // 2, BatchingConfig(1024, accumulate=8), seed=0, epoch=1)
    began = time.perf_counter()
    assert plan[len(plan) // 2].rows
    return [f"{seen['seconds']:.1f}", f"{seen['gib']:.2f}", f"{1000 * (time.perf_counter() - began):.1f}"]


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Fills in the seconds, and the most memory that was held at one time, in GiB above what was held before."""
    seen, done = {"seconds": 0.0, "gib": 0.0}, threading.Event()

    def held() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 2**20

    def watch() -> None:
        while not done.wait(0.02):
            seen["gib"] = max(seen["gib"], held() - before)

    before, began = held(), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        seen["seconds"] = time.perf_counter() - began
        done.set()
        watcher.join()


def uneven(generator: torch.Generator, vocabulary: int) -> Any:
    """A batch of one row of 512 tokens, cut into examples anywhere, half of each learned."""
    from lit_phi2.data.collate import collate
    from lit_phi2.types import Example

    cuts = torch.randperm(63, generator=generator)[:3].sort().values.add(1).mul(8).tolist()
    ids = [torch.randint(1, vocabulary, (b - a,), generator=generator).tolist() for a, b in pairwise([0, *cuts, 512])]
    examples = [Example(str(index), own, len(own) // 2) for index, own in enumerate(ids)]
    return collate(examples, [tuple(range(len(examples)))], loss_weight=1 / 256)


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").lower()
    for kind, names in KINDS.items():
        exact = {*names, *(f"{one}_" for one in names)}
        if name in exact or (kind != "products" and any(one in name for one in names)):
            return kind
    return "other"


def load(base: str, device: str) -> Any:
    from lit_phi2.training.module import LitPhi2

    module = LitPhi2(base=base, lora_r=RANK, lora_alpha=2 * RANK, dtype="bfloat16")
    module.configure_model()
    return module.to(device)


def synthetic(rows: int, length: int, vocabulary: int) -> Any:
    """A batch of full rows of examples of EXAMPLE tokens, half prompt."""
    from lit_phi2.data.collate import collate
    from lit_phi2.types import Example

    generator = torch.Generator().manual_seed(0)
    each = length // EXAMPLE
    ids = torch.randint(1, vocabulary, (rows * each, EXAMPLE), generator=generator).tolist()
    examples = [Example(str(index), own, EXAMPLE // 2) for index, own in enumerate(ids)]
    chosen = [tuple(range(row * each, (row + 1) * each)) for row in range(rows)]
    return collate(examples, chosen, loss_weight=2 / (rows * length))


def train_on(module: Any, batch: Any) -> None:
    """Forward and backward; the optimizer's share is too small to be seen."""
    (module.loss(batch.to(module.device)).nats * batch.share).backward()
    module.zero_grad()


def logits_gib(module: Any, batch: Any) -> float:
    """Memory of the loss by itself, less the states of the supervised positions and their gradient."""
    from lit_phi2.model.loss import causal_lm_loss

    head = module.fused_phi.lm_head
    like: dict[str, Any] = {"dtype": head.weight.dtype, "device": head.weight.device}
    hidden = torch.randn(*batch.labels.shape, head.in_features, **like, requires_grad=True)
    labels = batch.labels.to(module.device)
    before = start_watching(module.device)
    loss = causal_lm_loss(hidden, labels, head)
    states = 2 * int(loss.num_tokens) * head.in_features * head.weight.itemsize
    return max(0.0, peak_gib(module.device.type) - before - states / 2**30)


def start_watching(device: torch.device) -> float:
    """GiB now, resident or allocated on the GPU; peak_gib tells the most from here on."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # a step keeps the memory that it freed, which would hide what the next one takes
    forget_peak(device.type)
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else resident_gib()


def plain_step(base: str, batch: Any, device: str, dtype: str) -> Callable[[], None]:
    """The same step by transformers' Phi and PEFT's layers, with loss over all positions, as their trainers have it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lit_phi2.pretrained import resolve_base_model

    folder = resolve_base_model(base).folder
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    targets = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
    model = get_peft_model(
        native, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.to(device).train()
    batch = batch.to(device)

    def step() -> None:
        model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False
        ).loss.backward()
        model.zero_grad()

    return step


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def resident_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 2**20


if __name__ == "__main__":
    main()
