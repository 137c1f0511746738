"""Plots: every file of scripts/measurements -> SVG pictures in .github/images, named after the file.

kind throughput    of bench.py --output             -> tokens/s of lit_phi2 and its peers
kind gpu_check     of gpu_check                     -> tokens/s of lit_phi2 and HF Trainer
kind step_sizes    of profiling.py sizes --output   -> seconds and memory of a step, by tokens
kind leakage       of leakage_curve.py              -> exposure and extraction by repeats, a line for each rank
kind int8          of quantization_check.py curves  -> losses by step of a run in 8 bits and of one without

python scripts/plots.py
"""

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
OURS, PEER = "#1b6ca8", "#b0b7bf"
LABELS = {
    "notebook": "HF Trainer + PEFT, float32, batch 1",
    "hf-b1": "HF Trainer + PEFT, batch 1",
    "hf-b8": "HF Trainer + PEFT, batch 8",
    "hf-b32": "HF Trainer + PEFT, batch 32",
    "hf-b8-autocast": "HF Trainer + PEFT, batch 8, autocast",
    "hf_trainer": "HF Trainer + PEFT",
    "rows": "transformers + PEFT, packed rows",
    "trl": "TRL SFTTrainer, packed",
    "trl-autocast": "TRL SFTTrainer, packed, autocast",
    "litgpt": "LitGPT LoRA",
    "litgpt-mb1": "LitGPT LoRA, micro-batch 1",
    "litgpt-mb8": "LitGPT LoRA, micro-batch 8",
}
# Text stays text, and the same numbers give the same file.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lit_phi2",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=Path, default=ROOT / "scripts" / "measurements")
    parser.add_argument("--output_dir", type=Path, default=ROOT / ".github" / "images")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(args.measurements.glob("*.json")):
        picture = args.output_dir / f"{file.stem}.svg"
        draw(json.loads(file.read_text("utf-8")), picture)
        print(picture)


def draw(measurement: dict[str, Any], picture: Path) -> None:
    """Draw one measurement.

    Raises:
        SystemExit: it is of an unknown kind.
    """
    kinds = {"throughput": plot_throughput, "gpu_check": plot_gpu_check}
    kinds |= {"step_sizes": plot_step_sizes, "leakage": plot_leakage, "int8": plot_int8}
    if measurement.get("kind") not in kinds:
        raise SystemExit(f"{picture.stem}: kind {measurement.get('kind')!r}; expected one of {', '.join(kinds)}")
    with mpl.rc_context(STYLE):
        figure = kinds[measurement["kind"]](measurement)
        figure.savefig(picture, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def plot_throughput(measurement: dict[str, Any]) -> Figure:
    """A bar for each peer, with the ratio of ours to it in the same rounds."""
    peers = measurement["peers"]
    ours = [speed for peer in peers.values() for speed in peer["ours_tokens_per_second"]]
    bars = {"lit_phi2": (median(ours), "")}
    for name, peer in peers.items():
        pairs = zip(peer["ours_tokens_per_second"], peer["tokens_per_second"], strict=True)
        ratio = median(a / b for a, b in pairs)
        bars[LABELS.get(name, name)] = (median(peer["tokens_per_second"]), f"lit_phi2 is {ratio:.2f} times as fast")
    return _bars(bars, measurement["machine"])


def plot_gpu_check(measurement: dict[str, Any]) -> Figure:
    """A bar for each peer on rows of the first length, with the ratio of ours to it in the same rounds."""
    training, machine = measurement["parts"]["training"], measurement["parts"]["machine"]
    length, results = next(iter(training["lengths"].items()))
    bars = {}
    for name, result in results.items():
        if isinstance(result, dict) and result.get("tokens_per_second"):
            note = "" if name == "lit_phi2" else f"lit_phi2 is {result['speedup']:.2f} times as fast"
            bars[LABELS.get(name, name)] = (median(result["tokens_per_second"]), note)
    return _bars(bars, f"{machine['device']}, torch {machine['torch']}, rows of {length} tokens")


def plot_step_sizes(measurement: dict[str, Any]) -> Figure:
    """Seconds of a step, and GiB above the model, by tokens; a line for each length of row."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2))
    for length in sorted({point["length"] for point in measurement["points"]}):
        points = [point for point in measurement["points"] if point["length"] == length]
        tokens = [point["rows"] * length for point in points]
        for axis, key in zip(axes, ("seconds", "gib_above_model"), strict=True):
            axis.plot(tokens, [point[key] for point in points], marker="o", markersize=4, label=f"{length:,}")
    for axis, title in zip(axes, ("seconds of a step", "GiB above the model"), strict=True):
        axis.set(xlabel="tokens in the batch", title=title, yscale="log")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend(title="tokens in a row", frameon=False)
    figure.suptitle(measurement["machine"], fontsize=9)
    return figure


def plot_leakage(measurement: dict[str, Any]) -> Figure:
    """Mean exposure with its interval, and share extracted, by records of a canary; the prompt is dashed."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2))
    for number, (rank, audit) in enumerate(measurement["ranks"].items()):
        for place, line in (("response", "-"), ("prompt", "--")):
            groups = [group for group in audit["canaries"] if group["place"] == place and not group["is_control"]]
            repeats = [group["repeats"] for group in groups]
            for axis, key in zip(axes, ("exposure", "extracted"), strict=True):
                values = [group[key]["value"] for group in groups]
                label = f"rank {rank}, {place}"
                axis.plot(repeats, values, line, color=f"C{number}", marker="o", markersize=4, label=label)
                if place == "response":
                    low, high = ([group[key][end] for group in groups] for end in ("low", "high"))
                    axis.fill_between(repeats, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
    axes[0].axhline(1 / math.log(2), color=PEER, label="chance")
    for axis, title in zip(axes, ("exposure, bits; 9 is the most", "share extracted"), strict=True):
        axis.set(xlabel="records of each canary", title=title)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 4, 16], ["1", "4", "16"])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8, handlelength=3.5)
    settings = measurement["settings"]
    details = f"{settings['records']} claims, {settings['epochs']} epochs, learning rate {settings['learning_rate']:g}"
    figure.suptitle(f"tiny base, {settings['canaries']} canaries a point, {details}", fontsize=9)
    return figure


def plot_int8(measurement: dict[str, Any]) -> Figure:
    """train/loss and val/loss by step, a line for each run."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2))
    for name, color, line in (("float32", PEER, "-"), ("int8", OURS, "--")):
        for axis, tag in zip(axes, ("train/loss", "val/loss"), strict=True):
            steps, values = zip(*measurement["runs"][name][tag], strict=True)
            axis.plot(steps, values, line, color=color, linewidth=1.4, label=name)
    for axis, title in zip(axes, ("train/loss", "val/loss"), strict=True):
        axis.set(xlabel="optimizer step", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")  # a window of few records may have a loss fifty times as high
    axes[0].legend(title="frozen weights", frameon=False)
    figure.suptitle("tiny base, configs/tiny.yaml", fontsize=9)
    return figure


def _bars(bars: dict[str, tuple[float, str]], title: str) -> Figure:
    """Horizontal bars, the first on top: label -> (tokens/s, note)."""
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(bars)), layout="constrained")
    axis = figure.subplots()
    colors = [OURS if label == "lit_phi2" else PEER for label in bars]
    drawn = axis.barh(list(bars), [speed for speed, _ in bars.values()], color=colors)
    axis.bar_label(drawn, [f"{speed:,.0f}  {note}" for speed, note in bars.values()], padding=4)
    axis.invert_yaxis()
    axis.margins(x=0.45)
    axis.set(xlabel="tokens/s, training")
    axis.set_title(title, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
