"""GPU check: every measurement that needs a GPU, in one run of less than 8 minutes, on a machine without a network.

    scripts/gpu_check --missing                             on the GPU's machine: the packages that it lacks
    scripts/gpu_check --wheels DIR --python-version 3.12    on a machine with a package registry: collect wheels,
        [--only NAME ...]                                   of all packages or of these
    scripts/gpu_check --find-links DIR                      on the GPU's machine: install them, then measure
    scripts/gpu_check                                       where everything is installed already
    scripts/gpu_check --device mps                          the same on a Mac
    scripts/gpu_check --tiny --device cpu                   every part in a small size: the test of this program

    machine      card, versions                             float16      float16 beside the dtype of auto
    base         a random Phi-2 of 32 layers on disk        prediction   lit_phi2 and transformers, alternating
    training     lit_phi2, HF Trainer, LitGPT, a profile    processes    two with gloo, one with NCCL, on one card
    int8         8 bits beside 16                           resume       an interrupted run, bit for bit
    tests        pytest -m cuda

Each part is a process with a time limit of its own, and what does not fit into --minutes is left out from the end. The
measurements of a part are written to --output as they are made, so a run that is cut off keeps them. A part that fails
or exceeds its limit is recorded as such and the next one starts; the exit code is 1 then. The last thing on standard
output is a table in Markdown.

Only the standard library is imported here: a bare machine has no other packages.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import environment
from gpu_parts.report import markdown
from gpu_parts.settings import MINUTES, PARTS, Settings, new_settings, parse_limits
from gpu_parts.workers import part_environment, worker_command
from measurement import git_commit, write_json

ROOT = Path(__file__).resolve().parent.parent
LOG_LINES = 15  # of a failed part, in the report
MIN_SECONDS = 8.0  # a part that has less left is not started: its imports take as long
WORKERS = (*PARTS, "rank")

Report = dict[str, Any]  # JSON values
BEGAN = time.monotonic()


def main() -> int:
    args = parse_arguments()
    if args.worker:
        run_worker(args.worker, Settings.from_dict(json.loads(args.settings)), args.output)
        return 0
    if args.wheels:
        environment.collect_wheels(args.wheels, names=args.only, python_version=args.python_version)
        return 0
    missing = environment.missing_packages()
    if args.missing:
        print(*missing)
        return 0
    python = sys.executable
    if missing:
        print(f"missing: {', '.join(missing)}; installing from {args.find_links}", flush=True)
        python = environment.make_environment(args.find_links, args.work_dir / "env")
    return 0 if check(args, python) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, a minute or two on a CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_check.json")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "gpu_check", help="logs, base, environment")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    wheels = ROOT / "build" / "wheels"
    parser.add_argument(
        "--find-links", type=Path, default=wheels, help="folder of wheels, used if something is missing"
    )
    parser.add_argument("--wheels", type=Path, help="collect wheels in this folder, and stop")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="with --wheels: these packages only")
    parser.add_argument("--python-version", help="with --wheels: of the GPU's machine (x86-64 Linux), such as 3.12")
    parser.add_argument("--missing", action="store_true", help="print the packages that are missing here, and stop")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: needs --tiny; the true size takes hours on a CPU")
    args.parts = args.parts.split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} unknown; expected names from {', '.join(PARTS)}")
    try:
        args.limits = parse_limits(args.limit)
    except ValueError as error:
        parser.error(str(error))
    args.sizes = new_settings(tiny=args.tiny, device=args.device, work_dir=args.work_dir)
    return args


def check(args: argparse.Namespace, python: str) -> bool:
    """Run the parts and write the report after each; whether all have passed."""
    began, settings = time.monotonic(), args.sizes
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report: Report = {
        "kind": "gpu_check",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or git_commit(),
        "command": " ".join(["scripts/gpu_check", *sys.argv[1:]]),
        "settings": settings.to_dict(),
        "passed": False,
        "parts": {},
    }
    for name in args.parts:
        seconds_left = 60 * args.minutes - (time.monotonic() - BEGAN)
        if seconds_left < MIN_SECONDS:
            report["parts"][name] = {"status": "not run", "seconds": 0.0, "summary": "--minutes are over"}
        else:
            report["parts"][name] = run_part(name, settings, python, min(args.limits[name], seconds_left))
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(args.output, report)
        print(format_part(name, report["parts"][name]), flush=True)
    shutil.rmtree(settings.base_dir, ignore_errors=True)  # gigabytes
    shutil.rmtree(settings.work_path / "litgpt", ignore_errors=True)
    report["passed"] = all(part["status"] in ("passed", "not there") for part in report["parts"].values())
    write_json(args.output, report)
    print(f"{'passed' if report['passed'] else 'FAILED'} in {report['seconds']:.0f} s: {args.output}")
    print("\n" + markdown(report), flush=True)
    return bool(report["passed"])


def run_part(name: str, settings: Settings, python: str, limit: float) -> Report:
    """Run a part in a process of its own; what it has measured is kept however it ends."""
    result_file, log_file = (settings.work_path / f"{name}.{ending}" for ending in ("json", "log"))
    result_file.unlink(missing_ok=True)
    began = time.monotonic()
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            worker_command(name, settings, python, result_file),
            stdout=log,
            stderr=log,
            env=part_environment(settings),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            stop_group(process)
    part: Report = {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1)}
    if status != "passed":
        part["log"] = log_file.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
    if result_file.is_file():
        part |= json.loads(result_file.read_text("utf-8"))
    if "not_there" in part:
        part |= {"status": "not there", "summary": part["not_there"]}
    return part


def run_worker(name: str, settings: Settings, result_file: Path) -> None:
    """Be the process of a part: write the measurements after each of its steps."""
    measured: Report = {}
    for update in importlib.import_module(f"gpu_parts.{name}").measure(settings):
        measured |= update
        write_json(result_file, measured)


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill the part and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended; the latter on macOS
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def format_part(name: str, part: Report) -> str:
    line = f"{name:<11} {part['status']:<9} {part['seconds']:6.1f} s"
    if "summary" in part:
        line += f"  {part['summary']}"
    return "\n".join([line, *(f"    {text}" for text in part.get("log", []))])


if __name__ == "__main__":
    sys.exit(main())
