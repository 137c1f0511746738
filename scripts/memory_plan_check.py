"""Memory plan check: the peaks that `inspect` plans beside the most memory that fit and predict took.

    settings -> inspect             -> planned peaks of fit and predict
             -> fit, then predict   -> VmHWM of each process, sampled every 50 ms; Linux only

    python scripts/memory_plan_check.py                                    # the packaged base, four rows of the table
    python scripts/memory_plan_check.py --case NAME -- --config phi2.yaml --model.base build/phi2-4

What follows -- is given to all three. The plan is an upper bound: for rows of full length, and for completions that all
run to max_new_tokens. Pages of the cache that no token was written to are not resident, so predict completes 48 long
prompts, with a copy of the base whose bias keeps it from EOS. VmHWM counts weights, tensors, and the code of libraries.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_phi2.utils.files import read_json_lines
from measurement import ROOT, origin

UNITS = {"MB": 10**6, "GB": 10**9}
TINY: tuple[tuple[str, list[str]], ...] = (
    ("rows 1 x 1024", []),
    ("checkpointing", ["--model.activation_checkpointing", "true"]),
    ("rows 4 x 1024", ["--data.batch_size", "4"]),
    ("bfloat16", ["--model.dtype", "bfloat16"]),
)
STEPS = ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="tiny", help="names the row of the table; tiny alone measures four")
    parser.add_argument("--subcommands", nargs="+", default=["fit", "predict"], choices=["fit", "predict"])
    options = sys.argv[1:]
    own, settings = (options, []) if "--" not in options else split_at(options, "--")
    args = parser.parse_args(own)
    cases = [(args.case, settings)] if settings else [(name, ["--config", "tiny.yaml", *more]) for name, more in TINY]
    print(origin())
    print("| | subcommand | planned, MB | measured, MB | deviation |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        write_longest_prompt(prompts)
        for name, case in cases:
            settings = [*case, "--trainer.default_root_dir", folder]
            planned = planned_peaks(settings)
            for subcommand in args.subcommands:
                if subcommand == "predict":
                    words = [*with_endless_base(settings, folder), "--data.predict_files", str(prompts)]
                else:
                    words = [*settings, *STEPS]
                peak = measured_peak([subcommand, *words])
                deviation = planned[subcommand] / peak - 1
                cells = f"{planned[subcommand] / 1e6:,.0f} | {peak / 1e6:,.0f} | {deviation:+.1%}"
                print(f"| {name} | {subcommand} | {cells} |", flush=True)


def split_at(words: list[str], mark: str) -> tuple[list[str], list[str]]:
    place = words.index(mark)
    return words[:place], words[place + 1 :]


def write_longest_prompt(file: Path) -> None:
    """The record with the longest prompt among the packaged ones, again and again; none begins like another."""
    folder = ROOT / "lit_phi2" / "assets" / "claims"
    records = (row for name in ("train", "validation") for row in read_json_lines(folder / f"{name}.jsonl"))
    record = max(records, key=lambda row: len(row["instruction"] + row.get("input", "")))
    rows = [{**record, "id": f"p-{n}", "instruction": f"{n:02d} {record['instruction'][3:]}"} for n in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def with_endless_base(settings: list[str], folder: str) -> list[str]:
    """The settings with a copy of their base that never chooses EOS, so that every completion runs to its limit."""
    from safetensors.torch import load_file, save_file

    from lit_phi2.pretrained import resolve_base_model

    place = settings.index("--model.base") if "--model.base" in settings else None
    if place is None and "tiny.yaml" not in settings:
        sys.exit("memory_plan_check: name the base after --, as --model.base NAME.")
    name = "tiny" if place is None else settings[place + 1]
    source, target = resolve_base_model(name).folder, Path(folder, "endless")
    if not target.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
        weights = load_file(target / "model.safetensors")
        eos = json.loads((source / "config.json").read_text("utf-8"))["eos_token_id"]
        weights["lm_head.bias"][eos] = -1e4
        (target / "model.safetensors").unlink()
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    others = settings if place is None else settings[:place] + settings[place + 2 :]
    return [*others, "--model.base", str(target)]


def planned_peaks(settings: list[str]) -> dict[str, int]:
    """Bytes, read from the table that inspect prints."""
    command = [sys.executable, "-m", "lit_phi2", "inspect", *settings]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"(?m)^  peak +([\d.,]+) (MB|GB) +([\d.,]+) (MB|GB)", printed)
    if match is None:
        sys.exit(f"inspect printed no plan:\n{printed[-2000:]}")
    fit, fit_unit, predict, predict_unit = match.groups()
    return {
        "fit": int(float(fit.replace(",", "")) * UNITS[fit_unit]),
        "predict": int(float(predict.replace(",", "")) * UNITS[predict_unit]),
    }


def measured_peak(arguments: list[str]) -> int:
    """Bytes: VmHWM of a process while it runs."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "lit_phi2", *arguments], stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            if match := re.search(r"VmHWM:\s+(\d+) kB", status):
                peak = max(peak, int(match[1]) * 1024)
            time.sleep(0.05)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-3000:])
    return peak


if __name__ == "__main__":
    main()
