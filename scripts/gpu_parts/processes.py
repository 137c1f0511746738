"""Processes: two processes on one card with gloo, and one with NCCL, take the steps of one process without them.

    reference, in this process        gloo: ranks 0 and 1        NCCL: rank 0, a process group of one
        gradients of the first step, weights after the last  ->  largest relative difference in norm

NCCL refuses two processes on one card, so it is only initialized and used, not loaded with traffic.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_parts.rank import Run, fit
from gpu_parts.settings import Settings
from gpu_parts.workers import ROOT, part_environment, worker_command

GRADIENT_TOLERANCE = 1e-4  # of float32, where only the order of summation differs


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Compare them.

    Raises:
        SystemExit: a process failed, or its gradients differ.
    """
    if settings.device == "mps":
        yield {"not_there": "torch.distributed does not run on MPS"}
        return
    folder = settings.work_path / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    backends = {"gloo": 2, "nccl": 1} if settings.device == "cuda" else {"gloo": 2}
    began = time.perf_counter()
    started = {backend: start(settings, folder, backend, size) for backend, size in backends.items()}
    fit(settings, Run(str(folder / "reference.pt")))
    results: dict[str, Any] = {"not_measured": {} if "nccl" in backends else {"nccl": "needs CUDA"}}
    for backend, processes in started.items():
        codes = [process.wait() for process in processes]
        results[backend] = compare(folder, backend, codes)
        yield {**results, "seconds": time.perf_counter() - began, "summary": summarize(results)}
    if bad := [backend for backend in backends if not results[backend]["equal_steps"]]:
        raise SystemExit(f"{', '.join(bad)}: not the steps of one process: {results}")


def start(settings: Settings, folder: Path, backend: str, size: int) -> list[Any]:
    """Start the ranks of a run."""
    port, processes = free_port(), []
    for rank in range(size):
        run = Run(str(folder / f"{backend}.pt"), size, rank, backend)
        command = worker_command("rank", settings, sys.executable, folder / f"{backend}-{rank}.json")
        log = (folder / f"{backend}-{rank}.log").open("w", encoding="utf-8")
        variables = part_environment(settings) | run.variables(port)
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=variables, cwd=ROOT))
    return processes


def compare(folder: Path, backend: str, codes: list[int]) -> dict[str, Any]:
    """Whether the first step has the gradients of the reference, and how far the last weights are from it."""
    if any(codes):
        logs = {
            f"rank {rank}": (folder / f"{backend}-{rank}.log").read_text("utf-8", "replace").splitlines()[-5:]
            for rank in range(len(codes))
        }
        return {"equal_steps": False, "exit_codes": codes, "logs": logs}
    run, reference = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (backend, "reference"))
    gradients, weights = (largest_difference(run[key], reference[key]) for key in ("gradients", "weights"))
    return {
        "processes": len(codes),
        "equal_steps": gradients < GRADIENT_TOLERANCE,
        "gradient_difference": gradients,
        "weight_difference": weights,
    }


def largest_difference(values: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative difference in norm of a tensor; of A before the first step there is no gradient."""
    differences = [
        float((values[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items() if tensor.any()
    ]
    return max(differences)


def summarize(results: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'the steps of one process' if result['equal_steps'] else 'DIFFERENT'}"
        for name, result in results.items()
        if "equal_steps" in result
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
