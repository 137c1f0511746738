"""Bench: ours and the tools of today on the same records, base, LoRA targets and effective batch.

    python scripts/bench.py --setup                                   once: an environment for TRL, one for LitGPT
    python scripts/bench.py --base FOLDER --records mine.jsonl        all peers, three rounds
    python scripts/bench.py --base FOLDER --peers hf-b8,trl --rounds 5
    python scripts/bench.py --base FOLDER --peer-dtype float32        on a CPU whose torch is slow in bfloat16
    python scripts/bench.py --base FOLDER --device cuda --step-records 64 --rows 8 --peers hf-b32,trl,litgpt-mb8

    records -> ids.json -> every peer once, untimed: loss at step 0, trained parameters; they must agree
                        -> rounds: ours, peer, ours, peer, ... -> table

    notebook                    HF Trainer + PEFT, float32, batch 1, padded to 512: the classic recipe
    hf-b1, hf-b8[-autocast]     HF Trainer + PEFT, bfloat16, batch 1, 8 or 32, padded to the longest
    trl[-autocast]              TRL's SFTTrainer, bfloat16, packed to 1024, its default length
    rows                        transformers + PEFT in a bare loop over the very rows that ours packs, bfloat16
    litgpt-mb1, litgpt-mb8      LitGPT's LoRA model and the loop of its finetune/lora.py, bfloat16, micro-batch 1 or 8

Of hf, trl and litgpt the variant that comes nearest to ours counts. Every run is a process of its own that prints one
JSON line, and ours runs anew right before each peer: a ratio compares two runs that are minutes apart, because machines
drift.

Records are tokenized once and every peer is handed the same ids. All learn the response and the end token alone, for
one epoch, with AdamW at a cosine from the same peak, LoRA r=2 and alpha=4 without dropout on q, k, v, fc1 and fc2, and
about eight records to an optimizer step (--step-records). The base's own dropout (resid_pdrop) is alive where a tool
has it; LitGPT has none.

Tokens are those of the records: prompt, response and end token, once a record. A record that a peer drops, cuts or
trains twice fails the run. Time goes from the first batch to the last optimizer step, without loading. Every run is
kept in build/bench/runs.jsonl, and what a run printed besides in build/bench/logs.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# Only the standard library up here: each environment lacks what the others have. And the driver stays small, because
# Linux counts the memory of the process that starts another into the peak of the other.

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
IDS = BUILD / "ids.json"
RANK, ALPHA = 2, 4
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 0.01
ROW = 512  # tokens in a packed row of ours, and the most that a record may have
TRL_ROW = 1024  # SFTConfig.max_length by default
CHECKED = 8  # records whose loss is compared, from the first
TOLERANCE = 0.02  # of that loss: products are in bfloat16, and every peer rounds in other places
SEED = 42
IGNORE = -100
PROC = Path("/proc/self")

TRL, LITGPT = "trl==1.16.0", "litgpt==0.5.13"  # the versions whose source this file was written against
ENVIRONMENTS = {
    "trl": ["torch", "transformers", "peft", "accelerate", "datasets", TRL],
    "litgpt": ["torch", "lightning", LITGPT],  # lightning in our version: 2.6.2 and 2.6.3 are malware
}

Run = dict[str, Any]  # what a process reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the environments that the peers need, and stop")
    parser.add_argument("--base", help="folder of a Phi in Hugging Face form (scripts/build_random_phi2.py writes one)")
    parser.add_argument("--records", default="claims:train", help="as data.train_files: a path, or claims:train")
    parser.add_argument("--count", type=int, default=64, help="records, from the first that fit a row of 512")
    parser.add_argument("--peers", default=",".join(name for name in PEERS if name not in ("ours", "rows", "hf-b32")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--step-records", type=int, default=8, help="records in an optimizer step")
    parser.add_argument("--rows", type=int, default=1, help="rows in a micro-batch of ours")
    parser.add_argument("--threads", type=int, help="of every process; torch's own choice without")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of all but the notebook")
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32"], help="of the peers, where it is not --dtype")
    parser.add_argument("--worker", choices=["prepare", "convert", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # of a worker: train nothing
    args = parser.parse_args()
    names = [name for name in args.peers.split(",") if name]
    if unknown := [name for name in names if name not in PEERS or name == "ours"]:
        parser.error(f"--peers: {', '.join(unknown)} unknown; expected some of {', '.join(PEERS)}, without ours")
    if args.step_records < 8 or args.step_records % 8 or ("hf-b32" in names and args.step_records % 32):
        parser.error(f"--step-records {args.step_records}: expected a multiple of every peer's batch")
    if args.count < 1 or args.count % args.step_records:
        parser.error(f"--count {args.count}: expected a multiple of --step-records, {args.step_records}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: is less than 1")
    if args.base is None and not args.setup:
        parser.error("--base: is missing; give the folder of a Phi")
    if args.worker:
        work(args)
    elif args.setup:
        for environment in dict.fromkeys(PEERS[name].environment for name in names):
            if environment:
                set_up(environment)
    else:
        bench(args, names)


# The driver


def set_up(environment: str) -> None:
    """A virtual environment with a peer, and with torch and the libraries that it shares with us in our versions."""
    folder = BUILD / f"env-{environment}"
    wanted = [name if "==" in name else f"{name}=={version(name)}" for name in ENVIRONMENTS[environment]]
    print(f"{folder}: {' '.join(wanted)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [_python(environment), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted], check=True)
    question = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([_python(environment), "-c", question], check=True, capture_output=True, text=True).stdout
    if found.strip() != version("torch"):
        raise SystemExit(
            f"bench: {environment} got torch {found.strip()}, but {version('torch')} runs here, so times would not "
            "compare. Point pip at the index that this one came from (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL)."
        )
    (folder / "installed").touch()


def bench(args: argparse.Namespace, names: list[str]) -> None:
    for name in names:
        environment = PEERS[name].environment
        if environment and not (BUILD / f"env-{environment}" / "installed").exists():
            raise SystemExit(f"bench: {name} has no environment yet: python scripts/bench.py --setup --peers {name}")
    (BUILD / "logs").mkdir(parents=True, exist_ok=True)
    facts = launch(args, "prepare")
    print(
        f"{facts['records']} records, {facts['tokens']:,} tokens, {facts['supervised']:,} of them supervised, the "
        f"longest record {facts['longest']}; {facts['left_out']} records of the source have more than {ROW} tokens "
        f"or faults and are not among them\n"
        f"base: {facts['layers']} layers, {facts['width']} wide; {args.dtype}, peers {args.peer_dtype or args.dtype}, "
        f"on {facts['device']}; torch {version('torch')}\n",
        flush=True,
    )
    if any(PEERS[name].environment == "litgpt" for name in names):
        launch(args, "convert")
    print(f"| | loss at step 0 | largest difference, of {CHECKED} records | trained parameters |\n|---|---|---|---|")
    ours = launch(args, "ours", check=True)
    check_start(ours, ours, facts)
    for name in names:
        check_start(launch(args, name, check=True), ours, facts)
    each = f"{RANK} x {facts['layers']} layers"
    print(
        f"\nTrained parameters, with D={facts['width']} and F={facts['inner']}: one adapter on a fused Wqkv makes "
        f"{each} x (6 D + 2 F), adapters on q, k and v apart {each} x (8 D + 2 F), because each has an A of its own.\n",
        flush=True,
    )
    runs: dict[str, list[Run]] = {name: [] for name in ["ours", *names]}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, args.rounds + 1):
        for name in names or ["ours"]:
            pair = [launch(args, one, facts=facts, number=number) for one in dict.fromkeys(["ours", name])]
            for run in pair:
                runs[run["peer"]].append(run)
            told = f"round {number}: ours {pair[0]['tokens_per_second']:,.0f} tokens/s"
            if name in ratios:
                ratios[name].append(pair[0]["tokens_per_second"] / pair[1]["tokens_per_second"])
                told += f", {name} {pair[1]['tokens_per_second']:,.0f}: {ratios[name][-1]:.2f} times"
            print(told, flush=True)
    print("\n" + table(runs, ratios))
    mine = runs["ours"]
    print(
        f"\nours: {median(run['share'] for run in mine):.2f} of the product rate (of {len(mine)} runs, "
        f"{min(run['share'] for run in mine):.2f} to {max(run['share'] for run in mine):.2f}), which was "
        f"{median(run['best_rate'] for run in mine) / 1e12:.3f} TFLOP/s in {mine[-1]['best_product']}"
    )


def launch(
    args: argparse.Namespace, name: str, *, check: bool = False, facts: Run | None = None, number: int = 0
) -> Run:
    """Run a worker and read its JSON line.

    Args:
        args: of the driver.
        name: a peer, prepare or convert.
        check: load and measure the loss, but do not train.
        facts: what must have been trained; given for a timed run, which is then checked and kept.
        number: of the round.
    """
    environment = PEERS[name].environment if name in PEERS else "litgpt" if name == "convert" else ""
    dtype = args.dtype if name == "ours" else args.peer_dtype or args.dtype
    command = [_python(environment), __file__, "--worker", name, "--base", args.base, "--dtype", dtype]
    command += ["--records", args.records, "--count", str(args.count)] + ["--check"] * check
    command += ["--device", args.device, "--step-records", str(args.step_records), "--rows", str(args.rows)]
    # Nothing asks the hub, neither for files nor to report usage; and where the CPU is measured, no GPU is seen.
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    if args.threads:
        command += ["--threads", str(args.threads)]
        variables |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    if environment:
        variables.pop("PYTHONPATH", None)  # it belongs to the interpreter that runs here
    log = BUILD / "logs" / f"{name}-{'check' if check else number}.log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)
    if done.returncode:
        end = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        killed = " (killed; was there memory enough?)" if done.returncode == -9 else ""
        raise SystemExit(f"bench: {name} ended with {done.returncode}{killed}; the end of {log}:\n{end}")
    run: Run = json.loads(done.stdout.splitlines()[-1])
    if facts is not None:
        for what in ("records", "tokens", "supervised", "checksum"):
            if run[what] != facts[what]:
                raise SystemExit(
                    f"bench: {name} trained {run[what]} {what}, but {facts[what]} were handed to it. A record was "
                    "dropped, cut or trained twice, so its speed means nothing."
                )
        run["tokens_per_second"] = facts["tokens"] / run["seconds"]
        kept = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "round": number, "base": args.base, "dtype": dtype}
        kept |= {"device": args.device, "step_records": args.step_records, "rows": args.rows}
        with (BUILD / "runs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(kept | run) + "\n")
    return run


def check_start(run: Run, ours: Run, facts: Run) -> None:
    """Print a peer's loss at step 0 and its trained parameters; stop where they are not those of the same task."""
    differences = [abs(a / b - 1) for a, b in zip(run["nats_before"], ours["nats_before"], strict=True)]
    print(
        f"| {run['peer']} | {run['loss_before']:.4f} | {max(differences):.2%} | {run['trained_parameters']:,} |",
        flush=True,
    )
    if abs(run["loss_before"] / ours["loss_before"] - 1) > TOLERANCE:
        raise SystemExit(
            f"bench: at step 0 {run['peer']} has a loss of {run['loss_before']:.4f}, ours {ours['loss_before']:.4f}: "
            f"more than {TOLERANCE:.0%} apart, so they do not run the same model on the same tokens."
        )
    expected = trainable_parameters(facts, fused=run["peer"] == "ours")
    if run["trained_parameters"] != expected:
        raise SystemExit(
            f"bench: {run['peer']} trains {run['trained_parameters']:,} parameters; expected {expected:,}."
        )


def trainable_parameters(facts: Run, *, fused: bool) -> int:
    """Of LoRA on q, k, v, fc1 and fc2. A layer of `in` to `out` has RANK x (in + out) of them.

    >>> phi2 = {"layers": 32, "width": 2560, "inner": 10240}
    >>> trainable_parameters(phi2, fused=True), trainable_parameters(phi2, fused=False)
    (2293760, 2621440)
    """
    width, inner = facts["width"], facts["inner"]
    attention = width + 3 * width if fused else 3 * (width + width)
    mlp = 2 * (width + inner)
    return int(RANK * facts["layers"] * (attention + mlp))


def table(runs: dict[str, list[Run]], ratios: dict[str, list[float]]) -> str:
    """Markdown: medians of every peer; of variants of a tool, the one that comes nearest to ours is marked."""
    speeds = {name: median(run["tokens_per_second"] for run in of_peer) for name, of_peer in runs.items()}
    lines = [
        "| | real tokens/s | ours is faster | rounds | GiB loading | training | loss at start | at end | steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of_peer in runs.items():
        rivals = [median(ratios[other]) for other in ratios if PEERS[other].group == PEERS[name].group]
        counts = len(rivals) > 1 and median(ratios[name]) == min(rivals)
        memory, loss = (
            [median(run[key] for run in of_peer) for key in keys]
            for keys in (("loading_gib", "training_gib"), ("loss_before", "loss_after"))
        )
        times, spread = "", ""
        if name in ratios:
            times = f"{median(ratios[name]):.2f} times"
            spread = f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        lines.append(
            f"| {name}{' (counts)' if counts else ''} | {speeds[name]:,.1f} | {times} | {spread} "
            f"| {memory[0]:.2f} | {memory[1]:.2f} | {loss[0]:.4f} | {loss[1]:.4f} | {of_peer[0]['steps']} |"
        )
    return "\n".join(lines)


def _python(environment: str) -> str:
    return str(BUILD / f"env-{environment}" / "bin" / "python") if environment else sys.executable


# The workers


@dataclass(slots=True)
class Ledger:
    """What a peer has trained, counted from the batches that it made, and when.

    Attributes:
        device: whose work is waited for before a time is read.
        began: when the first batch was about to be made, in seconds.
        ended: when the last optimizer step was done.
        steps: optimizer steps.
        records, tokens, supervised: without padding.
        checksum: sum of all token ids; padding has id 0.
    """

    device: str
    began: float = 0.0
    ended: float = 0.0
    steps: int = 0
    records: int = 0
    tokens: int = 0
    supervised: int = 0
    checksum: int = 0

    def begin(self) -> None:
        self.began = self._now()

    def add(self, records: int, tokens: int, supervised: int, checksum: int) -> None:
        self.records += records
        self.tokens += tokens
        self.supervised += supervised
        self.checksum += checksum

    def step(self) -> None:
        self.steps += 1
        self.ended = self._now()

    def _now(self) -> float:
        import torch

        wait_for(torch.device(self.device))
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Example:
    """A record as ids.

    Attributes:
        ids: prompt, response and end token.
        prompt_length: tokens of the prompt, which are not learned.
    """

    ids: list[int]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        return [IGNORE] * self.prompt_length + self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Task:
    """What every peer is handed.

    Attributes:
        base: folder of the base.
        converted: folder of the base in LitGPT's form.
        examples: to train on, once each.
        dtype: bfloat16 or float32.
        device: cpu or cuda.
        step_records: in an optimizer step.
        rows: in a micro-batch of ours.
        ledger: for the peer to write in.
    """

    base: str
    converted: Path
    examples: list[Example]
    dtype: str
    device: str
    step_records: int
    rows: int
    ledger: Ledger

    def accumulate(self, row: int) -> int:
        """Rows of so many tokens that hold about step_records records."""
        tokens = sum(len(example.ids) for example in self.examples)
        return max(1, round(self.step_records * tokens / len(self.examples) / row))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A peer that is ready to train.

    Attributes:
        trained_parameters: how many.
        nats: of each of the first CHECKED examples, summed over its response, without dropout.
        train: one epoch, written in the ledger.
        more: further figures, after training.
    """

    trainable_parameters: int
    nats: Callable[[], list[float]]
    train: Callable[[], None]
    more: Callable[[], Run] = dict


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool in one setting.

    Attributes:
        group: variants of a tool, of which the one nearest to ours counts.
        environment: where it is installed; the running interpreter if empty.
        load: makes it ready.
    """

    group: str
    environment: str
    load: Callable[[Task], Loaded]


def work(args: argparse.Namespace) -> None:
    """Be one of the processes: do it, and print one JSON line."""
    with contextlib.redirect_stdout(sys.stderr):  # tools print too
        if args.worker == "prepare":
            report = prepare(args)
        elif args.worker == "convert":
            report = convert(_task(args))
        else:
            report = measure(args)
    print(json.dumps(report))


def measure(args: argparse.Namespace) -> Run:
    """Load a peer, and unless the loss alone is asked for, train."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    task = _task(args)
    peer = PEERS[args.worker].load(task)
    loaded = peak_gib(task.device)
    supervised = sum(len(example.ids) - example.prompt_length for example in task.examples[:CHECKED])
    before = peer.nats()
    report: Run = {
        "peer": args.worker,
        "threads": torch.get_num_threads(),
        "trained_parameters": peer.trainable_parameters,
        "nats_before": before,
        "loss_before": sum(before) / supervised,
    }
    if args.check:
        return report
    forget_peak(task.device)
    peer.train()
    report |= asdict(task.ledger) | {
        "seconds": task.ledger.ended - task.ledger.began,
        "loading_gib": loaded,
        "training_gib": peak_gib(task.device),
        "loss_after": sum(peer.nats()) / supervised,
    }
    return report | peer.more()


def peak_gib(device: str = "cpu") -> float:
    """The most memory that this process has had resident, or on the GPU, in GiB; since forget_peak on Linux."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    if PROC.exists():
        lines = (PROC / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def forget_peak(device: str = "cpu") -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif PROC.exists():
        (PROC / "clear_refs").write_text("5")


def wait_for(device: Any) -> None:
    """Until a GPU has done what it was told; a CPU does it at once."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def prepare(args: argparse.Namespace) -> Run:
    """Tokenize the records, as our own training does, and write them down for all."""
    import torch

    from lit_phi2.data.encode import encode
    from lit_phi2.data.records import FieldNames, read_records
    from lit_phi2.pretrained import load_tokenizer, read_model_config, resolve_base_model

    base = resolve_base_model(args.base)
    config = read_model_config(base)
    records, faults = read_records([args.records], FieldNames(), needs_response=True)
    encoded = encode(records, load_tokenizer(base), max_length=ROW, on_overlong="skip")
    if len(encoded.examples) < args.count:
        raise SystemExit(f"--count {args.count}: {args.records} holds {len(encoded.examples)} records that fit.")
    examples = encoded.examples[: args.count]
    if max(max(example.ids) for example in examples) >= config["vocab_size"]:
        raise SystemExit(f"--base {args.base}: its tokenizer has more entries than its embedding has rows.")
    IDS.write_text(
        json.dumps(
            {
                "base": str(base.folder),
                "digest": base.digest,
                "examples": [[example.ids, example.prompt_length] for example in examples],
            }
        ),
        "utf-8",
    )
    return {
        "records": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "supervised": sum(example.supervised_tokens for example in examples),
        "checksum": sum(sum(example.ids) for example in examples),
        "longest": max(len(example.ids) for example in examples),
        "left_out": len(faults) + len(encoded.skipped),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "the CPU",
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "inner": config["intermediate_size"],
    }


def _task(args: argparse.Namespace) -> Task:
    read = json.loads(IDS.read_text("utf-8"))
    examples = [Example(ids, prompt_length) for ids, prompt_length in read["examples"]]
    converted, ledger = BUILD / "litgpt" / read["digest"], Ledger(args.device)
    return Task(read["base"], converted, examples, args.dtype, args.device, args.step_records, args.rows, ledger)


# Ours


def load_ours(task: Task) -> Loaded:
    """lit_phi2's module and data under Lightning's Trainer, rows of 512."""
    import lightning.pytorch as pl
    import torch

    from lit_phi2 import types as lit_batch
    from lit_phi2.data.collate import collate
    from lit_phi2.data.datamodule import ClaimsDataModule
    from lit_phi2.data.records import Record
    from lit_phi2.data.splits import build_split
    from lit_phi2.training.module import LitPhi2

    examples = [
        lit_batch.Example(f"record {index}", example.ids, example.prompt_length)
        for index, example in enumerate(task.examples)
    ]
    records = [Record(example.id, "", "", "", "") for example in examples]
    data = ClaimsDataModule(max_length=ROW, batch_size=task.rows, base=task.base, seed=SEED)
    split = build_split([], lambda _: zip(records, examples, strict=True), skip=False)
    data.splits = {"train": split, "val": split}  # what setup would read
    module = LitPhi2(
        base=task.base,
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=["Wqkv", "fc1", "fc2"],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_ratio=0.0,
        dtype=task.dtype,
        seed=SEED,
    )
    module.configure_model()
    module.to(task.device)
    phi = module.phi
    assert phi is not None
    ledger = task.ledger
    fullest = {"tokens": 0, "supervised": 0}  # of the micro-batches: the shapes of the step's products

    class Clock(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            ledger.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > ledger.steps:
                ledger.step()
            checksum = sum(sum(examples[int(name.split()[1])].ids) for name in batch.record_ids)
            ledger.add(len(batch.record_ids), batch.num_tokens, batch.supervised_tokens, checksum)
            fullest["tokens"] = max(fullest["tokens"], batch.num_tokens)
            fullest["supervised"] = max(fullest["supervised"], batch.supervised_tokens)

    def nats() -> list[float]:
        phi.eval()
        module.to(task.device)  # Lightning brings it back to the CPU when a run ends
        batches = [collate(examples, [(index,)]).to(task.device) for index in range(CHECKED)]
        with torch.no_grad():
            found = [module.loss(batch).nats.item() for batch in batches]
        phi.train()
        return found

    def train() -> None:
        trainer = pl.Trainer(
            accelerator=task.device,
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=task.accumulate(ROW * task.rows),
            gradient_clip_val=1.0,  # as ours and Hugging Face's do by default
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Clock()],
        )
        trainer.fit(module, datamodule=data)

    def share_of_product_rate() -> Run:
        model = module.fused_phi
        frozen: dict[str, list[torch.nn.Linear]] = {}
        for name, layer in model.model.layers.named_modules():
            if isinstance(layer, torch.nn.Linear) and "lora_" not in name:
                frozen.setdefault(name.removesuffix(".base_layer").rpartition(".")[2], []).append(layer)
        weights = sum(layer.weight.numel() for layers in frozen.values() for layer in layers)
        head = model.lm_head.weight
        # Forward, and backward to the input: two products of 2 FLOPs a weight and token. Nothing else is counted.
        flops = 4 * weights * ledger.tokens + 4 * head.numel() * ledger.supervised
        rates: dict[str, float] = {}
        for name, layers in frozen.items():
            rates |= product_rates(name, fullest["tokens"], layers[0].weight)
        rates |= product_rates("head", fullest["supervised"], head)
        best = max(rates, key=lambda name: rates[name])
        return {
            "share": flops / (ledger.ended - ledger.began) / rates[best],
            "best_rate": rates[best],
            "best_product": best,
            "rates": rates,
        }

    return Loaded(_count_trained(phi), nats, train, share_of_product_rate)


def product_rates(name: str, rows: int, weight: Any, *, seconds: float = 0.5) -> dict[str, float]:
    """FLOP/s of x W^T and of g W, as forward and backward have them, each over so many seconds.

    In the dtype in which this device multiplies best what comes in the weight's: float32 on a CPU without bfloat16.

    Args:
        name: of the layer.
        rows: of x and g.
        weight: (out, in); its shape and dtype are taken, not its values.
        seconds: long enough for a rate that can be kept up.
    """
    import torch
    from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

    from lit_phi2.model.linear import matmul_dtype

    num_out, num_in = weight.shape
    like = {"dtype": matmul_dtype(weight), "device": weight.device}
    w = torch.randn(num_out, num_in, **like)
    x, g = torch.randn(rows, num_in, **like), torch.randn(rows, num_out, **like)
    products: dict[str, Callable[[], Any]] = {
        f"{name} forward, {rows} x {num_in} x {num_out}": lambda: F.linear(x, w),
        f"{name} backward, {rows} x {num_out} x {num_in}": lambda: g @ w,
    }
    rates = {}
    with torch.no_grad():
        for told, product in products.items():
            product()
            wait_for(weight.device)
            count, taken, began = 0, 0.0, time.perf_counter()
            while taken < seconds:
                for _ in range(1 if weight.device.type == "cpu" else 50):
                    product()
                    count += 1
                wait_for(weight.device)
                taken = time.perf_counter() - began
            rates[told] = 2 * rows * num_in * num_out * count / taken
    return rates


# Hugging Face: the notebook, HF Trainer, TRL


def load_hf(task: Task, *, batch: int, width: int | None = None, dtype: str | None = None, autocast: bool) -> Loaded:
    """HF Trainer on transformers' own Phi with PEFT's own LoRA.

    Args:
        task: what to train.
        batch: records in a micro-batch.
        width: tokens that every record is padded to; the longest of its batch without.
        dtype: of the base; the task's without.
        autocast: TrainingArguments' bf16, on top of a bfloat16 base.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    ledger = task.ledger
    model = _native_phi(task, dtype or task.dtype)

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        size = (len(examples), width or max(len(example.ids) for example in examples))
        input_ids, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        labels = torch.full(size, IGNORE, dtype=torch.int64)
        for line, example in enumerate(examples):
            end = len(example.ids)
            input_ids[line, :end] = torch.tensor(example.ids)
            labels[line, :end] = torch.tensor(example.labels)
            mask[line, :end] = 1
        ledger.add(len(examples), int(mask.sum()), int((labels != IGNORE).sum()), int(input_ids.sum()))
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    settings = _training_settings(task, batch, task.step_records // batch, autocast)
    trainer = Trainer(
        model,
        TrainingArguments(**settings, remove_unused_columns=False),
        data_collator=collate,
        train_dataset=task.examples,  # a list is a map-style dataset
        callbacks=[_hf_clock(ledger)],
    )

    def nats() -> list[float]:
        model.eval()
        found = []
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for example in task.examples[:CHECKED]:
                ids, labels = (torch.tensor([one], device=model.device) for one in (example.ids, example.labels))
                mean = model(input_ids=ids, labels=labels, use_cache=False).loss
                found.append(mean.item() * (len(example.ids) - example.prompt_length))
        return found

    def train() -> None:
        trainer.train()

    return Loaded(_count_trained(model), nats, train)


def load_trl(task: Task, *, autocast: bool) -> Loaded:
    """TRL's SFTTrainer with its own packing, without activation checkpointing, which it has on by default."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # in an environment of its own

    ledger = task.ledger
    rows = [{"input_ids": example.ids, "labels": example.labels} for example in task.examples]
    trainer = SFTTrainer(
        _native_phi(task, task.dtype),
        SFTConfig(
            **_training_settings(task, 1, task.accumulate(TRL_ROW), autocast),
            max_length=TRL_ROW,
            packing=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task.base, local_files_only=True),
        callbacks=[_hf_clock(ledger)],
    )
    collate = trainer.data_collator

    def counted(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(features)
        records = int((batch["position_ids"] == 0).sum())  # positions restart at every record, and nothing is padded
        supervised = int((batch["labels"] != IGNORE).sum())
        ledger.add(records, batch["input_ids"].numel(), supervised, int(batch["input_ids"].sum()))
        return batch

    trainer.data_collator = counted

    def nats() -> list[float]:
        """Of records side by side in one row, as in training: a leak from one to the next would show."""
        trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            batch = trainer._prepare_inputs(collate(rows[:CHECKED]))  # to its device
            output = trainer.model(**batch, fused_lm_head=True)
        found, start = [], 0
        for example in task.examples[:CHECKED]:
            end = start + len(example.ids)
            found.append(-output.log_probs[0, start : end - 1].float().sum().item())  # at t, that of the label at t + 1
            start = end
        return found

    def train() -> None:
        trainer.train()

    return Loaded(_count_trained(trainer.model), nats, train)


def load_rows(task: Task) -> Loaded:
    """transformers' own Phi with PEFT's own LoRA in a bare loop over our rows: what is left is the step itself.

    Positions restart and no mask is given, which is how transformers keeps the examples of a row apart.
    """
    import torch
    from torch.nn import functional as F  # noqa: N812  the name that torch's own documentation uses

    from lit_phi2.data.schedule import BatchingConfig, training_schedule

    ledger, examples = task.ledger, task.examples
    model = _native_phi(task, task.dtype).to(task.device)
    accumulate = task.accumulate(ROW)
    lengths = [len(example.ids) for example in examples]
    supervised = [len(example.ids) - example.prompt_length for example in examples]
    plan = training_schedule(lengths, supervised, BatchingConfig(ROW, accumulate=accumulate), seed=SEED, epoch=0)

    def summed(chosen: list[Example]) -> Any:
        ids = torch.tensor([[token for example in chosen for token in example.ids]]).to(task.device)
        positions = torch.cat([torch.arange(len(example.ids)) for example in chosen])[None].to(task.device)
        labels = torch.tensor([label for example in chosen for label in example.labels]).to(task.device)
        hidden = model.get_base_model().model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        learned = labels[1:] != IGNORE  # the first label of an example is that of its prompt, never learned
        logits = model.get_base_model().lm_head(hidden[0, :-1][learned])
        return F.cross_entropy(logits.float(), labels[1:][learned], reduction="sum")

    def nats() -> list[float]:
        model.eval()
        with torch.no_grad():
            return [summed([example]).item() for example in examples[:CHECKED]]

    def train() -> None:
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        ledger.begin()
        for number, micro in enumerate(plan, 1):
            chosen = [examples[index] for row in micro.rows for index in row]
            (summed(chosen) * micro.loss_weight / accumulate).backward()
            ledger.add(
                len(chosen),
                sum(len(example.ids) for example in chosen),
                sum(len(example.ids) - example.prompt_length for example in chosen),
                sum(sum(example.ids) for example in chosen),
            )
            if number % accumulate == 0 or number == len(plan):
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ledger.step()

    return Loaded(_count_trained(model), nats, train)


def _native_phi(task: Task, dtype: str) -> Any:
    """transformers' own Phi with PEFT's own LoRA; q, k and v are layers of their own there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(task.base, dtype=getattr(torch, dtype), local_files_only=True)
    targets = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))


def _training_settings(task: Task, batch: int, accumulate: int, autocast: bool) -> dict[str, Any]:
    """Arguments of TrainingArguments and of SFTConfig."""
    return {
        "output_dir": str(BUILD / "hf"),  # nothing is saved there
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "cosine",
        "bf16": autocast and task.dtype == "bfloat16",
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device != "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def _hf_clock(ledger: Ledger) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ledger.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ledger.step()

    return Clock()


def _count_trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# LitGPT


def convert(task: Task) -> Run:
    """The base in LitGPT's form, by its own converter, once; and every weight of it has a place there."""
    folder, base = task.converted, Path(task.base)
    if (folder / "converted").exists():
        return {}
    import torch
    from litgpt.config import Config  # type: ignore[import-not-found]  # in an environment of its own
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # type: ignore[import-not-found]
    from litgpt.utils import save_config  # type: ignore[import-not-found]

    folder.mkdir(parents=True, exist_ok=True)
    for file in [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]:
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    convert_hf_checkpoint(folder, model_name="phi-2")
    phi = json.loads((base / "config.json").read_text("utf-8"))
    config = Config.from_name(
        "phi-2",  # the converter writes the shape of the true Phi-2; this base may be a slice of it
        n_layer=phi["num_hidden_layers"],
        n_embd=phi["hidden_size"],
        n_head=phi["num_attention_heads"],
        intermediate_size=phi["intermediate_size"],
        block_size=phi["max_position_embeddings"],
        padded_vocab_size=phi["vocab_size"],
        rotary_percentage=(phi.get("rope_parameters") or phi)["partial_rotary_factor"],
    )
    save_config(config, folder)
    with torch.device("meta"):
        places = {name: weight.shape for name, weight in GPT(config).state_dict().items()}
    weights = torch.load(folder / "lit_model.pth", mmap=True)
    # Its trainer loads with strict=False: a weight without a place would be left out and nothing said.
    if places != {name: weight.shape for name, weight in weights.items()}:
        raise SystemExit("the converted weights are not those of LitGPT's model")
    (folder / "converted").touch()
    return {}


def load_litgpt(task: Task, *, batch: int) -> Loaded:
    """LitGPT's LoRA model, loss and loop (litgpt/finetune/lora.py); micro-batches padded to their longest record."""
    import lightning as L  # noqa: N812  as LitGPT names it
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy, load_checkpoint
    from torch.nn.utils.rnn import pad_sequence
    from torch.optim.lr_scheduler import CosineAnnealingLR

    ledger, examples = task.ledger, task.examples
    accumulate = task.step_records // batch
    config = Config.from_file(
        task.converted / "model_config.yaml",
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_mlp=True,
    )
    fabric = L.Fabric(
        accelerator=task.device, devices=1, precision="bf16-true" if task.dtype == "bfloat16" else "32-true"
    )
    fabric.seed_everything(SEED)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=len(examples) // task.step_records)
    load_checkpoint(fabric, model, task.converted / "lit_model.pth", strict=False)
    model.max_seq_length = max(len(example.ids) for example in examples)

    def nats() -> list[float]:
        model.eval()
        found = []
        with torch.no_grad():
            for example in examples[:CHECKED]:
                logits = model(torch.tensor([example.ids], device=fabric.device))[0, :-1].float()
                targets = torch.tensor(example.labels[1:], device=fabric.device)
                found.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
        return found

    def train() -> None:
        model.train()
        order = torch.randperm(len(examples)).tolist()
        ledger.begin()
        for number in range(1, len(examples) // batch + 1):
            chosen = [examples[index] for index in order[(number - 1) * batch : number * batch]]
            input_ids = pad_sequence([torch.tensor(example.ids) for example in chosen], batch_first=True)
            targets = pad_sequence([torch.tensor(example.labels) for example in chosen], True, IGNORE)
            tokens = sum(len(example.ids) for example in chosen)
            ledger.add(len(chosen), tokens, int((targets != IGNORE).sum()), int(input_ids.sum()))
            input_ids, targets = input_ids.to(fabric.device), targets.to(fabric.device)
            # From here to the end of the step, the lines of finetune/lora.py, 0.5.13.
            is_accumulating = number % accumulate != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                logits = model(input_ids, lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, targets[..., 1:])
                fabric.backward(loss / accumulate)
            if not is_accumulating:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                ledger.step()

    return Loaded(_count_trained(model), nats, train)


PEERS = {
    "ours": Peer("ours", "", load_ours),
    "notebook": Peer("notebook", "", partial(load_hf, batch=1, width=ROW, dtype="float32", autocast=False)),
    "hf-b1": Peer("hf", "", partial(load_hf, batch=1, autocast=False)),
    "hf-b8": Peer("hf", "", partial(load_hf, batch=8, autocast=False)),
    "hf-b32": Peer("hf", "", partial(load_hf, batch=32, autocast=False)),
    "hf-b8-autocast": Peer("hf", "", partial(load_hf, batch=8, autocast=True)),
    "rows": Peer("rows", "", load_rows),
    "trl": Peer("trl", "trl", partial(load_trl, autocast=False)),
    "trl-autocast": Peer("trl", "trl", partial(load_trl, autocast=True)),
    "litgpt-mb1": Peer("litgpt", "litgpt", partial(load_litgpt, batch=1)),
    "litgpt-mb8": Peer("litgpt", "litgpt", partial(load_litgpt, batch=8)),
}


if __name__ == "__main__":
    main()
