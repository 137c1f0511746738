"""Generation bench: lit_phi2's engine beside transformers' generate and beside the former predict.

    python scripts/bench.py generate --wide-base build/phi2-4                     all rows but `full`
    python scripts/bench.py generate --rows tiny --records 64 --rounds 1
    python scripts/bench.py generate --rows full --full-base build/phi2-32
    python scripts/bench.py generate --quick                                      a minute, on the tiny base alone

    tiny        packaged test records, adapter of tiny.yaml: transformers at its best dtype and batch; former predict
    bandwidth   one record at true width: weights that are read a second, as a share of the memory's bandwidth
    int8        one record at true width, the base in 8 bits beside the base in 16
    mixed       real text at true width, completions of very different lengths: transformers at its best
    drafts      one record at a time, with drafts and without, on learned phrases and on text that shares little
    profile     a decode pass by operator
    full        32 layers, one record and eight

Bases of true width have random weights (scripts/build_random_phi2.py) and a random adapter, so there completions end at
limits that are drawn for each record. Every system runs in a process of its own; they take turns, and a ratio is the
median over rounds. The adapter of tiny.yaml is trained once and kept in build/bench/generation, with the results.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measurement import origin, write_json

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench" / "generation"
QUICK = {
    "records": 4,
    "mixed_records": 4,
    "mixed_limits": (2, 6),
    "draft_records": 2,
    "index_records": 50,
    "tokens": 8,
    "max_new_tokens": 24,
    "rounds": 1,
    "buffer_mib": 16,
    "in_process": True,
}


def main(arguments: list[str]) -> None:
    from generation_parts.rows import ROWS, Line, Settings

    parser = argparse.ArgumentParser(
        prog="scripts/bench.py generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="tiny,bandwidth,int8,mixed,drafts,profile", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--wide-base", default=str(ROOT / "build" / "phi2-4"), help="few layers of Phi-2's width")
    parser.add_argument("--full-base", default=str(ROOT / "build" / "phi2-32"), help="all layers")
    parser.add_argument("--questions", default="claims:test", help="JSONL of real text, for mixed and drafts")
    parser.add_argument("--records", type=int, default=436, help="of the row tiny")
    parser.add_argument("--mixed-records", type=int, default=64, help="of the row mixed")
    parser.add_argument("--draft-records", type=int, default=64, help="of the row drafts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of every process; torch's default if not given")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread, on a busy machine")
    parser.add_argument("--quick", action="store_true", help="few records and tokens, in one process")
    parser.add_argument("--output", type=Path, default=BUILD / "generate.json")
    args = parser.parse_args(arguments)
    rows = args.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"--rows: {', '.join(unknown)} unknown; expected names from {', '.join(ROWS)}")
    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("questions", "records", "mixed_records", "draft_records", "rounds", "threads", "clock")
    }
    bases = {"wide_base": args.wide_base, "full_base": args.full_base}
    if args.quick:
        options |= QUICK
        bases = dict.fromkeys(bases, "tiny")
    options |= bases | find_adapters(rows, bases, train=not args.quick)
    settings = Settings(**options)
    facts = origin()
    print(f"{facts['machine']}, commit {facts['commit']}\n", flush=True)
    lines: list[Line] = []
    for name in rows:
        for line in ROWS[name](settings):
            lines.append(line)
            print("\n" + format_line(line) + "\n", flush=True)
            write_json(args.output, {"kind": "generation", **facts, "lines": [asdict(each) for each in lines]})
    print("\n".join(["| | measured | bar | aim | |", "|---|---|---|---|---|", *map(format_line, lines)]))


def format_line(line: Any) -> str:
    """A line of the table.

    >>> from types import SimpleNamespace
    >>> format_line(SimpleNamespace(name="a", value=2.5, bar=2.0, aim=None, note="n"))
    '| a | 2.50 | 2.0 |  | n |'
    """
    bar, aim = ("" if value is None else str(value) for value in (line.bar, line.aim))
    return f"| {line.name} | {line.value:.2f} | {bar} | {aim} | {line.note} |"


def find_adapters(rows: list[str], bases: dict[str, str], *, train: bool) -> dict[str, str]:
    """The folders of the adapters that rows need, made if they are not there.

    Args:
        rows: that are measured.
        bases: by their names in Settings.
        train: the tiny base's adapter by tiny.yaml; otherwise it is random too.
    """
    adapters = {}
    if {"tiny", "drafts"} & set(rows):
        adapters["tiny_adapter"] = trained_adapter() if train else random_adapter("tiny")
    if {"bandwidth", "int8", "mixed", "drafts", "profile"} & set(rows):
        adapters["wide_adapter"] = random_adapter(bases["wide_base"])
    if "full" in rows:
        adapters["full_adapter"] = random_adapter(bases["full_base"])
    return adapters


def trained_adapter() -> str:
    """The adapter of a whole run of tiny.yaml."""
    folder = BUILD / "tiny" / "tiny" / "version_0"
    if not (folder / "adapter").is_dir():
        print("training the adapter of configs/tiny.yaml, once", flush=True)
        command = [sys.executable, "-m", "lit_phi2", "fit", "--config", "configs/tiny.yaml"]
        subprocess.run([*command, "--trainer.default_root_dir", str(BUILD / "tiny")], check=True, cwd=ROOT)
    return str(folder / "adapter")


def random_adapter(base: str) -> str:
    """An adapter of rank 2 that changes what a base computes."""
    import torch

    from lit_phi2.adapters.adapter import make_adapter
    from lit_phi2.adapters.peft_format import save_adapter
    from lit_phi2.model.loading import empty_phi2
    from lit_phi2.model.lora import LoraSettings, add_lora, trainable_parameters
    from lit_phi2.pretrained import resolve_base_model

    model = resolve_base_model(base)
    folder = BUILD / f"adapter-{model.digest[:12]}"
    if not folder.is_dir():
        settings = LoraSettings(2, 4, ("Wqkv", "fc1", "fc2"))
        generator = torch.Generator().manual_seed(0)
        shapes = trainable_parameters(add_lora(empty_phi2(model), settings, dropout=0.0))
        weights = {name: 0.02 * torch.randn(shape.shape, generator=generator) for name, shape in shapes.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(make_adapter(model, settings, weights), folder)
    return str(folder)
