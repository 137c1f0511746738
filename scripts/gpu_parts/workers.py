"""Workers: how a process of the check is started.

The standard library only: the driver on a bare machine starts them too.
"""

import json
import os
from pathlib import Path

from gpu_parts.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def worker_command(name: str, settings: Settings, python: str, result_file: Path) -> list[str]:
    """The command line of a part, or of one of the processes of a part."""
    command = [python, str(ROOT / "scripts" / "gpu_check.py"), "--worker", name]
    command += ["--settings", json.dumps(settings.to_dict()), "--output", str(result_file)]
    return [*command, *["--tiny"] * settings.tiny, "--device", settings.device]


def part_environment(settings: Settings) -> dict[str, str]:
    """Environment variables of a part: our code, no network, one GPU."""
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    if settings.device == "mps":
        variables["PYTORCH_ENABLE_MPS_FALLBACK"] = "0"  # an operator that MPS lacks is an error, and not slow
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return variables | {"CUDA_VISIBLE_DEVICES": devices.split(",")[0] if settings.device == "cuda" else ""}
