"""Export check: time, memory and size of exports at true size, and what a kill or a full disk leaves of one.

    base, random adapter -> export in a process of its own -> seconds, peak memory, size, what its gate found
                         -> the same, killed at points spread over its writing, and with a limit on the size of files

    python scripts/build_random_phi2.py build/phi2 --tokenizer FOLDER                # once: 5.6 GB
    python scripts/export_check.py --base build/phi2                                 # every export, with the gate
    python scripts/export_check.py --base build/phi2 --exports merged --check 0 --kills 10 --full-disk

Memory is that of the export and of its child processes together, sampled every 50 ms: anonymous memory is what they
hold themselves; resident memory also counts the pages of mapped files, which the system takes back when it needs them.
It needs Linux, and as much disk as the largest export.
"""

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from measurement import ROOT, write_measurement

EXPORTS = ("merged", "gguf-merged:q8_0", "gguf", "mlx", "peft")  # format, or format:dtype
SECONDS_BETWEEN = 0.05  # two samples of the memory
KIB = 1024


@dataclass(frozen=True)
class Export:
    """An export to be run as a process.

    Attributes:
        name: format, or format:dtype.
        check: prompts of its gate.
        argv: without the folder.
        folder: that it writes.
    """

    name: str
    check: int
    argv: list[str]
    folder: Path

    @property
    def aside(self) -> Path:
        """Where it is written before it has its name."""
        return self.folder.with_name(f".{self.folder.name}.export")

    @property
    def log(self) -> Path:
        return self.folder.with_name("log")

    def remains(self) -> list[str]:
        """Names beside the log that are of this export: its folder, and hidden ones with the same beginning."""
        name = self.folder.name
        names = sorted(path.name for path in self.folder.parent.iterdir())
        return [each for each in names if each == name or each.startswith(f".{name}.")]

    def start(self, max_file_bytes: int | None = None) -> "subprocess.Popen[bytes]":
        """Start the process; it gets an OSError where a file would exceed the limit."""

        def limit() -> None:
            if max_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

        with self.log.open("wb") as file:
            argv = [*self.argv, "--output_dir", str(self.folder)]
            return subprocess.Popen(argv, stdout=file, stderr=file, cwd=ROOT, preexec_fn=limit)

    def fail(self, problem: str) -> NoReturn:
        """Exit with the end of the log."""
        sys.exit(f"{self.name}: {problem}\n{self.log.read_text('utf-8')[-3000:]}")


@dataclass
class Peak:
    """The most memory of a process and its children, in bytes."""

    anonymous: int = 0
    resident: int = 0
    processes: dict[int, int] = field(default_factory=dict)  # pid -> its own most anonymous memory

    def sample(self, pid: int) -> None:
        """Take the present memory of a process and its children into account."""
        anonymous = resident = 0
        for each in [pid, *children_of(pid)]:
            own, all_pages = rss(each)
            self.processes[each] = max(self.processes.get(each, 0), own)
            anonymous, resident = anonymous + own, resident + all_pages
        self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)


def children_of(pid: int) -> list[int]:
    """Processes that a process started, and theirs; none if it has ended."""
    try:
        pids = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except OSError:
        return []
    return [each for child in pids for each in [child, *children_of(child)]]


def rss(pid: int) -> tuple[int, int]:
    """Bytes of anonymous and of all resident memory of a process."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0, 0
    anonymous, resident = (int(lines.get(name, "0 kB").split()[0]) * KIB for name in ("RssAnon", "VmRSS"))
    return anonymous, resident


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="as model.base")
    parser.add_argument("--exports", nargs="+", default=list(EXPORTS), help="format or format:dtype")
    parser.add_argument("--check", type=int, nargs="+", default=[8, 0], help="prompts of the gate, each measured")
    parser.add_argument("--kills", type=int, default=0, help="of each export, with the last --check")
    parser.add_argument("--full-disk", action="store_true", help="also with files of half the size at most")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "export_check", help="removed at the end")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "export_check.json")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    try:
        adapter = write_random_adapter(args.base, args.scratch / "adapter")
        rows = []
        for name in args.exports:
            for check in args.check:
                export = Export(name, check, export_command(args.base, adapter, name, check), args.scratch / "out")
                rows.append(measure(export))
            if args.kills:
                rows[-1]["kills"] = kill_repeatedly(export, rows[-1], args.kills)
            if args.full_disk:
                rows[-1]["full_disk"] = fill_disk(export, rows[-1])
            write_measurement(args.output, "export", {"base": args.base, "exports": rows})
    finally:
        shutil.rmtree(args.scratch)
    print(table(rows))
    return 0


def write_random_adapter(base: str, folder: Path) -> Path:
    """An adapter whose update is as large as the weights, 0.02, so that it changes what the base says.

    In a process of its own, so that this one stays small.
    """
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from lit_phi2.adapters.adapter import make_adapter\n"
        "from lit_phi2.adapters.peft_format import save_adapter\n"
        "from lit_phi2.model.loading import empty_phi2\n"
        "from lit_phi2.model.lora import LoraSettings, add_lora, trainable_parameters\n"
        "from lit_phi2.pretrained import resolve_base_model\n"
        "base, settings = resolve_base_model(sys.argv[1]), LoraSettings(16, 32, ('Wqkv', 'dense', 'fc1', 'fc2'))\n"
        "with torch.device('meta'):\n"
        "    parameters = trainable_parameters(add_lora(empty_phi2(base), settings, dropout=0.0))\n"
        "torch.manual_seed(0)\n"
        "weights = {name: torch.randn(parameter.shape) * 0.05 for name, parameter in parameters.items()}\n"
        "save_adapter(make_adapter(base, settings, weights), Path(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", code, base, str(folder)], check=True, cwd=ROOT)
    return folder


def export_command(base: str, adapter: Path, name: str, check: int) -> list[str]:
    format, _, dtype = name.partition(":")
    argv = [sys.executable, "-m", "lit_phi2", "export", "--config", str(ROOT / "configs" / "tiny.yaml")]
    argv += ["--model.base", base, "--ckpt_path", str(adapter), "--format", format, "--check", str(check)]
    return [*argv, "--dtype", dtype] if dtype else argv


def measure(export: Export) -> dict[str, Any]:
    """Run an export to its end, and remove the result."""
    began, peak, writing_since = time.monotonic(), Peak(), None
    process = export.start()
    while process.poll() is None:
        peak.sample(process.pid)
        if writing_since is None and export.aside.is_dir():
            writing_since = time.monotonic()
        time.sleep(SECONDS_BETWEEN)
    seconds = time.monotonic() - began
    if process.returncode:
        export.fail(f"ended with {process.returncode}")
    row = {
        "export": export.name,
        "check": export.check,
        "seconds": seconds,
        "seconds_before_writing": (writing_since or began) - began,
        "anonymous_gb": peak.anonymous / 1e9,
        "anonymous_gb_of_each_process": [value / 1e9 for value in peak.processes.values() if value],
        "resident_gb": peak.resident / 1e9,
        "size_gb": sum(files_of(export.folder).values()) / 1e9,
        "largest_file_gb": max(files_of(export.folder).values()) / 1e9,
        "gate": json.loads((export.folder / "export.json").read_text("utf-8"))["check"],
    }
    shutil.rmtree(export.folder)
    print(table([row]).splitlines()[-1], flush=True)
    return row


def files_of(folder: Path) -> dict[str, int]:
    """Path of each file in a folder -> its size; without those that an export removes meanwhile."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def kill_repeatedly(export: Export, undisturbed: dict[str, Any], kills: int) -> list[dict[str, Any]]:
    """Kill an export at points spread over its writing; exits if anything that looks whole remains.

    Every other time there is an earlier export, which must stay as it is. What the killed ones leave is not removed:
    the export that is run to its end must do that.
    """
    points = []
    for number in range(kills):
        earlier = {"export.json": '{"files": []}'} if number % 2 else {}
        for name, text in earlier.items():
            export.folder.mkdir()
            (export.folder / name).write_text(text)
        point = int((number + 0.5) / kills * undisturbed["size_gb"] * 1e9)
        written = kill_after(export, point)
        remains = {name: (export.folder / name).read_text() for name in files_of(export.folder)}
        if remains != earlier:
            export.fail(f"killed, it left {sorted(remains)}")
        shutil.rmtree(export.folder, ignore_errors=True)
        points.append({"bytes_written": written, "earlier_export": bool(earlier)})
        print(f"{export.name}: kill {number + 1} of {kills}: {points[-1]}", flush=True)
    run_to_the_end(export)
    shutil.rmtree(export.folder)
    if left := export.remains():
        export.fail(f"did not remove what the killed ones had left: {left}")
    return points


def kill_after(export: Export, num_bytes: int) -> int:
    """Kill an export when it has written so many bytes; returns how many they are by then."""
    started_ns, is_new = time.time_ns(), False
    process = export.start()
    while process.poll() is None:
        # Until it is made again, the folder is what the export before left.
        is_new = is_new or (export.aside.is_dir() and export.aside.stat().st_mtime_ns > started_ns)
        if is_new and sum(files_of(export.aside).values()) >= num_bytes:
            children = children_of(process.pid)
            process.kill()
            process.wait()
            if not wait_until_ended(children):
                export.fail(f"killed, it left a process running, one of {children}")
            return sum(files_of(export.aside).values())
        time.sleep(SECONDS_BETWEEN)
    export.fail(f"ended with {process.returncode} before it was killed after {num_bytes:,} bytes")


def wait_until_ended(pids: list[int], seconds: float = 60.0) -> bool:
    """Whether processes that lost their parent end by themselves."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").is_dir() and rss(pid)[1] for pid in pids):  # a zombie has no memory
        if time.monotonic() > deadline:
            return False
        time.sleep(SECONDS_BETWEEN)
    return True


def run_to_the_end(export: Export) -> None:
    if code := export.start().wait():
        export.fail(f"ended with {code} after it had been killed or had run out of space before")


def fill_disk(export: Export, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Export with files of at most half the size of the largest; exits if anything remains."""
    limit = int(undisturbed["largest_file_gb"] / 2 * 1e9)
    code = export.start(limit).wait()
    message = export.log.read_text("utf-8").strip().splitlines()[-1]
    if code != 1 or export.remains():
        export.fail(f"with files of {limit:,} bytes at most, it ended with {code} and left {export.remains()}")
    print(f"{export.name}: full disk: exit code {code}, nothing left: {message}", flush=True)
    return {"max_file_gb": limit / 1e9, "exit_code": code, "message": message}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("export", "`--check`", "seconds", "peak anonymous, GB", "peak resident, GB", "size, GB", "largest KL, nats")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        numbers = [f"{row['seconds']:.0f}", *(f"{row[key]:.2f}" for key in ("anonymous_gb", "resident_gb", "size_gb"))]
        kl = f"{row['gate']['max_kl']:.1e}" if "max_kl" in row["gate"] else row["gate"]["method"]
        lines.append(f"| {' | '.join([row['export'], str(row['check']), *numbers, kl])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
