"""Bench: lit_phi2 and today's tools on the same records, base, LoRA targets and effective batch.

    python scripts/bench.py --setup                                   once: an environment for TRL, one for LitGPT
    python scripts/bench.py --base FOLDER --records mine.jsonl        all peers, three rounds
    python scripts/bench.py --base FOLDER --peers hf-b8,trl --rounds 5
    python scripts/bench.py --base FOLDER --peer-dtype float32        on a CPU whose torch is slow in bfloat16
    python scripts/bench.py --base FOLDER --quantization int8 --peers whole,trl   the base of ours in 8 bits
    python scripts/bench.py --base FOLDER --device cuda --step-records 64 --rows 8 --peers hf-b32,trl,litgpt-mb8
    python scripts/bench.py generate --help                           completions: generation_bench.py

    records -> ids.json -> every peer once, untimed: loss at step 0, trained parameters; they must agree
                        -> rounds: ours, peer, ours, peer, ... -> table

    whole                       ours without quantization
    notebook                    HF Trainer + PEFT, float32, batch 1, padded to 512: the classic recipe
    hf-b1, hf-b8[-autocast]     HF Trainer + PEFT, bfloat16, batch 1, 8 or 32, padded to the longest
    trl[-autocast]              TRL's SFTTrainer, bfloat16, packed to 1024, its default length
    rows                        transformers + PEFT in a plain loop over the rows that lit_phi2 packs, bfloat16
    litgpt-mb1, litgpt-mb8      LitGPT's LoRA model and the loop of its finetune/lora.py, bfloat16, micro-batch 1 or 8

Of hf, trl and litgpt the fastest setting is the one to compare with. Every run is a process of its own that prints one
JSON line. Ours runs again right before each peer, so a ratio compares two runs that are minutes apart, because the
speed of a machine drifts.

Records are tokenized once and every peer gets the same ids. All supervise the response and the EOS token only, train
one epoch with AdamW and a cosine schedule from the same peak, LoRA r=2 and alpha=4 without dropout on q, k, v, fc1 and
fc2, with about eight records in an optimizer step (--step-records). The base's own dropout (resid_pdrop) is active
where a tool has it; LitGPT has none.

Tokens are those of the records: prompt, response and EOS token, each record once. A record that a peer drops, truncates
or trains twice fails the run. Time is from the first batch to the last optimizer step, without loading. Every run is
appended to build/bench/runs.jsonl; what a run prints besides is in build/bench/logs.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

from measurement import write_measurement
from peers.registry import ENVIRONMENTS, PEERS
from peers.task import LORA_R, NUM_CHECKED, ROW_LENGTH, Example, Ledger, Report, Task, totals
from timers import peak_gib, reset_peak_memory

# Only the standard library is imported at the top: each environment lacks what the others have, and the driver stays
# small, because Linux counts the memory of the parent process into the peak of its child.

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
IDS = BUILD / "ids.json"
MEDIAN_KEYS = ("tokens_per_second", "loading_gib", "training_gib", "loss_before", "loss_after")  # of the table
LOSS_TOLERANCE = 0.02  # of the loss at step 0: matmuls are in bfloat16, and every peer rounds in other places


def main() -> None:
    if sys.argv[1:2] == ["generate"]:
        import generation_bench

        generation_bench.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the environments that the peers need, and stop")
    parser.add_argument("--base", help="folder of a Phi in Hugging Face form (scripts/build_random_phi2.py writes one)")
    parser.add_argument("--records", default="claims:train", help="as data.train_files: a path, or claims:train")
    parser.add_argument("--count", type=int, default=64, help="records, from the first that fit a row of 512")
    parser.add_argument(
        "--peers", default=",".join(name for name in PEERS if name not in ("ours", "whole", "rows", "hf-b32"))
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--step-records", type=int, default=8, help="records in an optimizer step")
    parser.add_argument("--rows", type=int, default=1, help="rows in a micro-batch of ours")
    parser.add_argument("--threads", type=int, help="of every process; torch's default if not given")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of all but the notebook")
    parser.add_argument("--quantization", choices=["int8"], help="of the base of ours")
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32"], help="of the peers, if not --dtype")
    parser.add_argument("--output", type=Path, help="a JSON file for scripts/plots.py")
    parser.add_argument("--worker", choices=["prepare", "convert", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # of a worker: do not train
    args = parser.parse_args()
    names = [name for name in args.peers.split(",") if name]
    if message := _invalid(args, names):
        parser.error(message)
    if args.worker:
        work(args)
    elif args.setup:
        for environment in dict.fromkeys(PEERS[name].environment for name in names):
            if environment:
                make_environment(environment)
    else:
        bench(args, names)


def _invalid(args: argparse.Namespace, names: list[str]) -> str:
    """What is wrong with the arguments; empty if nothing is."""
    if unknown := [name for name in names if name not in PEERS or name == "ours"]:
        return f"--peers: {', '.join(unknown)} unknown; expected names from {', '.join(PEERS)}, except ours"
    if args.step_records < 8 or args.step_records % 8 or ("hf-b32" in names and args.step_records % 32):
        return f"--step-records {args.step_records}: expected a multiple of every peer's batch"
    if args.count < 1 or args.count % args.step_records:
        return f"--count {args.count}: expected a multiple of --step-records, {args.step_records}"
    if args.rounds < 1:
        return f"--rounds {args.rounds}: is less than 1"
    if args.base is None and not args.setup:
        return "--base: is missing; give the folder of a Phi"
    return ""


# The driver


def make_environment(name: str) -> None:
    """A virtual environment with a peer, and with torch and the shared libraries in the versions that run here."""
    folder = BUILD / f"env-{name}"
    requirements = [entry if "==" in entry else f"{entry}=={version(entry)}" for entry in ENVIRONMENTS[name]]
    print(f"{folder}: {' '.join(requirements)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [_python(name), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True)
    query = "from importlib.metadata import version; print(version('torch'))"
    installed = subprocess.run([_python(name), "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    if installed != version("torch"):
        raise SystemExit(
            f"bench: {name} got torch {installed}, but {version('torch')} runs here, so times would not compare. "
            "Point pip at the index that this one came from (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL)."
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
        f"{facts['records']} records, {facts['tokens']:,} tokens, {facts['supervised_tokens']:,} supervised, the "
        f"longest record {facts['longest']}; {facts['left_out']} records of the source are invalid or longer than "
        f"{ROW_LENGTH} tokens and left out\n"
        f"base: {facts['num_layers']} layers, {facts['hidden_size']} wide; {args.dtype}, peers "
        f"{args.peer_dtype or args.dtype}, on {facts['device']}; torch {version('torch')}\n",
        flush=True,
    )
    if any(PEERS[name].environment == "litgpt" for name in names):
        launch(args, "convert")
    check_all(args, names, facts)
    runs: dict[str, list[Report]] = {name: [] for name in ["ours", *names]}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, args.rounds + 1):
        for name in names or ["ours"]:
            run_pair(args, name, facts, number, runs, ratios)
    print("\n" + format_table(runs, ratios))
    print("\n" + format_utilization(runs["ours"]))
    if args.output:
        device = "" if args.device == "cpu" else facts["device"]
        write_measurement(args.output, "throughput", comparison(runs, names, facts), device=device)


def check_all(args: argparse.Namespace, names: list[str], facts: Report) -> None:
    """Every peer once without training: all must run the same model on the same tokens."""
    print(f"| | loss at step 0 | largest difference of {NUM_CHECKED} records | trained parameters |\n|---|---|---|---|")
    ours = launch(args, "ours", check=True)
    check_start(ours, ours, facts)
    for name in names:
        check_start(launch(args, name, check=True), ours, facts)
    per_rank = f"{LORA_R} x {facts['num_layers']} layers"
    print(
        f"\nTrained parameters, with D={facts['hidden_size']} and F={facts['intermediate_size']}: one adapter on a "
        f"fused Wqkv has {per_rank} x (6 D + 2 F), adapters on q, k and v {per_rank} x (8 D + 2 F), because each has "
        "an A of its own.\n",
        flush=True,
    )


def run_pair(
    args: argparse.Namespace,
    name: str,
    facts: Report,
    number: int,
    runs: dict[str, list[Report]],
    ratios: dict[str, list[float]],
) -> None:
    """Ours, then the peer; their runs and the ratio are appended."""
    pair = [launch(args, member, facts=facts, number=number) for member in dict.fromkeys(["ours", name])]
    for run in pair:
        runs[run["peer"]].append(run)
    line = f"round {number}: ours {pair[0]['tokens_per_second']:,.0f} tokens/s"
    if name in ratios:
        ratios[name].append(pair[0]["tokens_per_second"] / pair[1]["tokens_per_second"])
        line += f", {name} {pair[1]['tokens_per_second']:,.0f}: {ratios[name][-1]:.2f} times"
    print(line, flush=True)


def launch(
    args: argparse.Namespace, name: str, *, check: bool = False, facts: Report | None = None, number: int = 0
) -> Report:
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
    # No process asks the hub for files or reports usage; a CPU benchmark sees no GPU.
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    if args.quantization and name == "ours":
        command += ["--quantization", args.quantization]
    if args.threads:
        command += ["--threads", str(args.threads)]
        variables |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    if environment:
        variables.pop("PYTHONPATH", None)  # it is for the interpreter that runs here
    log = BUILD / "logs" / f"{name}-{'check' if check else number}.log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)
    if done.returncode:
        end = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        killed = " (killed; is there enough memory?)" if done.returncode == -9 else ""
        raise SystemExit(f"bench: {name} ended with {done.returncode}{killed}; the end of {log}:\n{end}")
    run: Report = json.loads(done.stdout.splitlines()[-1])
    if facts is not None:
        check_trained(run, facts)
        run["tokens_per_second"] = facts["tokens"] / run["seconds"]
        settings = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "round": number, "base": args.base, "dtype": dtype}
        settings |= {
            "device": args.device,
            "step_records": args.step_records,
            "rows": args.rows,
            "quantization": args.quantization,
        }
        with (BUILD / "runs.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(settings | run) + "\n")
    return run


def check_trained(run: Report, facts: Report) -> None:
    """Stop if a peer has not trained every record exactly once."""
    for key in ("records", "tokens", "supervised_tokens", "checksum"):
        if run[key] != facts[key]:
            raise SystemExit(
                f"bench: {run['peer']} trained {run[key]} {key} instead of {facts[key]}. A record was dropped, "
                "truncated or trained twice, so its speed does not compare."
            )


def check_start(run: Report, ours: Report, facts: Report) -> None:
    """Print a peer's loss at step 0 and its trained parameters; stop if they are not those of the same task."""
    differences = [abs(a / b - 1) for a, b in zip(run["nats_before"], ours["nats_before"], strict=True)]
    print(
        f"| {run['peer']} | {run['loss_before']:.4f} | {max(differences):.2%} | {run['trainable_parameters']:,} |",
        flush=True,
    )
    if abs(run["loss_before"] / ours["loss_before"] - 1) > LOSS_TOLERANCE:
        raise SystemExit(
            f"bench: at step 0 {run['peer']} has a loss of {run['loss_before']:.4f}, ours {ours['loss_before']:.4f}: "
            f"more than {LOSS_TOLERANCE:.0%} apart, so they do not run the same model on the same tokens."
        )
    expected = trainable_parameters(facts, fused=PEERS[run["peer"]].module == "ours")
    if run["trainable_parameters"] != expected:
        raise SystemExit(
            f"bench: {run['peer']} trains {run['trainable_parameters']:,} parameters; expected {expected:,}."
        )


def trainable_parameters(facts: Report, *, fused: bool) -> int:
    """The number that LoRA on q, k, v, fc1 and fc2 trains. A layer of `in` to `out` has LORA_R x (in + out).

    >>> phi2 = {"num_layers": 32, "hidden_size": 2560, "intermediate_size": 10240}
    >>> trainable_parameters(phi2, fused=True), trainable_parameters(phi2, fused=False)
    (2293760, 2621440)
    """
    hidden_size, intermediate_size = facts["hidden_size"], facts["intermediate_size"]
    attention = hidden_size + 3 * hidden_size if fused else 3 * (hidden_size + hidden_size)
    mlp = 2 * (hidden_size + intermediate_size)
    return int(LORA_R * facts["num_layers"] * (attention + mlp))


def format_table(runs: dict[str, list[Report]], ratios: dict[str, list[float]]) -> str:
    """Markdown: medians of every peer; of the settings of a tool, the fastest one is marked."""
    lines = [
        "| | tokens/s | ours is faster | rounds | GiB loading | GiB training | loss before | loss after | steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, peer_runs in runs.items():
        group = [median(ratios[other]) for other in ratios if PEERS[other].group == PEERS[name].group]
        is_fastest = len(group) > 1 and median(ratios[name]) == min(group)
        times, spread = "", ""
        if name in ratios:
            times = f"{median(ratios[name]):.2f} times"
            spread = f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        medians = {key: median(run[key] for run in peer_runs) for key in peer_runs[0] if key in MEDIAN_KEYS}
        lines.append(
            f"| {name}{' (fastest setting)' if is_fastest else ''} | {medians['tokens_per_second']:,.1f} | {times} "
            f"| {spread} | {medians['loading_gib']:.2f} | {medians['training_gib']:.2f} "
            f"| {medians['loss_before']:.4f} | {medians['loss_after']:.4f} | {peer_runs[0]['steps']} |"
        )
    return "\n".join(lines)


def format_utilization(runs: list[Report]) -> str:
    fractions = [run["matmul_utilization"] for run in runs]
    return (
        f"ours: {median(fractions):.2f} of the matmul rate (of {len(runs)} runs, {min(fractions):.2f} to "
        f"{max(fractions):.2f}), which is {median(run['best_matmul_rate'] for run in runs) / 1e12:.3f} TFLOP/s in "
        f"{runs[-1]['best_matmul']}"
    )


def comparison(runs: dict[str, list[Report]], names: list[str], facts: Report) -> Report:
    """The numbers for plots.py: the rounds of each peer, and those of ours right before them."""
    peers = {}
    for index, name in enumerate(names):
        ours = runs["ours"][index :: len(names)]  # ours runs once before each peer
        peers[name] = {
            "tokens_per_second": [run["tokens_per_second"] for run in runs[name]],
            "ours_tokens_per_second": [run["tokens_per_second"] for run in ours],
            "training_gib": median(run["training_gib"] for run in runs[name]),
            "ours_training_gib": median(run["training_gib"] for run in ours),
        }
    utilization = median(run["matmul_utilization"] for run in runs["ours"])
    sizes = {key: facts[key] for key in ("records", "tokens", "num_layers", "hidden_size")}
    return {**sizes, "matmul_utilization": utilization, "peers": peers}


def _python(environment: str) -> str:
    return str(BUILD / f"env-{environment}" / "bin" / "python") if environment else sys.executable


# The workers


def work(args: argparse.Namespace) -> None:
    """Be one of the processes: print one JSON line."""
    with contextlib.redirect_stdout(sys.stderr):  # tools print too
        if args.worker == "prepare":
            report = prepare(args)
        elif args.worker == "convert":
            from peers.litgpt_lora import convert

            convert(_task(args))
            report = {}
        else:
            report = measure(args)
    print(json.dumps(report))


def prepare(args: argparse.Namespace) -> Report:
    """Tokenize the records, as lit_phi2's training does, and write the ids for all peers."""
    import torch

    from lit_phi2.data.encode import encode
    from lit_phi2.data.records import ReadOptions, read_records
    from lit_phi2.pretrained import load_tokenizer, read_model_config, resolve_base_model

    base = resolve_base_model(args.base)
    config = read_model_config(base)
    records, invalid = read_records([args.records], ReadOptions(), needs_response=True)
    encoded = encode(records, load_tokenizer(base), max_length=ROW_LENGTH, on_overlong="skip")
    if len(encoded.examples) < args.count:
        raise SystemExit(f"--count {args.count}: {args.records} holds {len(encoded.examples)} records that fit.")
    examples = [Example(example.ids, example.prompt_length) for example in encoded.examples[: args.count]]
    if max(max(example.ids) for example in examples) >= config["vocab_size"]:
        raise SystemExit(f"--base {args.base}: its tokenizer has more entries than its embedding has rows.")
    pairs = [[example.ids, example.prompt_length] for example in examples]
    ids = {"base": str(base.folder), "digest": base.digest, "examples": pairs}
    IDS.write_text(json.dumps(ids), "utf-8")
    return totals(examples) | {
        "longest": max(len(example.ids) for example in examples),
        "left_out": len(invalid) + len(encoded.skipped),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "the CPU",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
    }


def measure(args: argparse.Namespace) -> Report:
    """Load a peer, and unless --check is given, train."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    task = _task(args)
    peer = PEERS[args.worker].load(task)
    loading_gib = peak_gib(task.device)
    supervised_tokens = sum(example.supervised_tokens for example in task.examples[:NUM_CHECKED])
    nats_before = peer.nats()
    report: Report = {
        "peer": args.worker,
        "threads": torch.get_num_threads(),
        "trainable_parameters": peer.trainable_parameters,
        "nats_before": nats_before,
        "loss_before": sum(nats_before) / supervised_tokens,
    }
    if args.check:
        return report
    reset_peak_memory(task.device)
    peer.train()
    report |= asdict(task.ledger) | {
        "seconds": task.ledger.seconds,
        "loading_gib": loading_gib,
        "training_gib": peak_gib(task.device),
        "loss_after": sum(peer.nats()) / supervised_tokens,
    }
    return report | peer.metrics()


def _task(args: argparse.Namespace) -> Task:
    ids = json.loads(IDS.read_text("utf-8"))
    return Task(
        base=ids["base"],
        examples=[Example(*pair) for pair in ids["examples"]],
        dtype=args.dtype,
        device=args.device,
        records_per_step=args.step_records,
        rows=args.rows,
        ledger=Ledger(args.device),
        litgpt_dir=BUILD / "litgpt" / ids["digest"],
        scratch_dir=BUILD,
        quantization=args.quantization,
    )


if __name__ == "__main__":
    main()
