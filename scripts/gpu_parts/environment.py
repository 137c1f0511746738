"""Environment: what the check needs and this machine lacks, collected as wheels elsewhere and installed here.

    requirements.lock, without torch -> collect_wheels -> DIR/*.whl      with a package registry
    pyproject.toml -> missing_packages -> make_environment -> python     without one

torch is never collected or installed: the one that fits the machine's driver is there already. The environment sees the
packages of the interpreter that made it; a wheel takes precedence over them.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a bare machine has pip's copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
# Compiled for a driver (torch and its dependencies), or not needed at run time (linters, types).
NOT_COLLECTED = re.compile(r"torch|triton|nvidia-.*|mypy|mypy-extensions|ruff|types-.*|pre-commit")
INSTALL_LIMIT = 60.0  # seconds
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")  # pip matches exactly


def missing_packages() -> list[str]:
    """What to install here to run and test lit_phi2; empty if all requirements except torch are met.

    The metadata of an absent package is absent too, so what it needs in turn is unknown. If one requirement is not met,
    every locked package is listed that is absent or older than its locked version.
    """
    requirements = [Requirement(line) for line in _project_requirements()]
    if all(map(_is_met, requirements)):
        return []
    locked = [Requirement(line.replace("==", ">=")) for line in locked_requirements()]
    return sorted({requirement.name for requirement in [*requirements, *locked] if not _is_met(requirement)})


def collect_wheels(folder: Path, *, names: Sequence[str] = (), python_version: str | None = None) -> None:
    """Download the locked packages as wheels; the lock names all of them, so pip follows no dependency.

    Args:
        folder: for the wheels.
        names: of these packages only.
        python_version: of the machine that will install them, x86-64 Linux; None for this interpreter's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(locked_requirements(names)) + "\n")
        requirements.flush()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "--quiet"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--requirement", requirements.name]
        if python_version:
            command += ["--python-version", python_version, "--implementation", "cp"]
            command += [part for platform in PLATFORMS for part in ("--platform", f"{platform}_x86_64")]
        subprocess.run(command, check=True)
    wheels = list(folder.glob("*.whl"))
    print(f"{folder}: {len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB")


def locked_requirements(names: Sequence[str] = ()) -> list[str]:
    """The lines of the lock to collect.

    Args:
        names: of these packages only; all if empty.

    Raises:
        SystemExit: a name is not in the lock.
    """
    lines = [line.strip() for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()]
    locked = {_normalized(line.partition("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}
    if unknown := [name for name in names if _normalized(name) not in locked]:
        raise SystemExit(f"--only: {', '.join(unknown)} not in requirements.lock")
    chosen = map(_normalized, names) if names else (name for name in locked if not NOT_COLLECTED.fullmatch(name))
    return [locked[name] for name in chosen]


def make_environment(wheels_dir: Path, folder: Path) -> str:
    """A virtual environment with these wheels that also sees the packages of this interpreter.

    Returns:
        Its interpreter.

    Raises:
        SystemExit: there are no wheels.
    """
    wheels = sorted(wheels_dir.glob("*.whl"))
    if not wheels:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SystemExit(
            f"gpu_check: {wheels_dir} holds no wheels. Collect them on a machine with a package registry and copy the "
            f"folder here: scripts/gpu_check --wheels DIR --python-version {version}"
        )
    # pip is taken from this interpreter: a bare machine may lack ensurepip.
    venv = [sys.executable, "-m", "venv", "--clear", "--system-site-packages", "--without-pip"]
    subprocess.run([*venv, str(folder)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # --system-site-packages shows the system's packages, not those of a virtual environment that runs this program.
    inherited = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "inherited.pth").write_text("\n".join(inherited) + "\n", "utf-8")
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
    pip += ["--disable-pip-version-check", "--find-links", str(wheels_dir)]
    subprocess.run(
        [*pip, *("==".join(wheel.name.split("-")[:2]) for wheel in wheels)], check=True, timeout=INSTALL_LIMIT
    )
    return python


def _project_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [line for line in lines if not NOT_COLLECTED.fullmatch(_normalized(Requirement(line).name))]


def _is_met(requirement: Requirement) -> bool:
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(installed, prereleases=True))


def _normalized(name: str) -> str:
    """The name as package registries compare it.

    >>> _normalized("Ast_Serialize")
    'ast-serialize'
    """
    return re.sub(r"[-_.]+", "-", name).lower()
