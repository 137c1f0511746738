"""Screenshot: a picture of the terminal from a real fit and predict on the packaged records.

    temporary folder with configs/ -> fit, predict -> their output -> .github/images/terminal.svg

    python scripts/screenshot.py                           about three minutes on two cores
    python scripts/screenshot.py -- --trainer.max_steps 4  further arguments of fit

The commands run in a temporary folder with relative paths, so the picture contains no path of this machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100  # characters
CONFIG = "configs/tiny.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / ".github" / "images" / "terminal.svg")
    parser.add_argument("fit_arguments", nargs="*", help="further arguments of fit, after --")
    args = parser.parse_args()
    commands = [
        ["fit", "--config", CONFIG, *args.fit_arguments],
        ["predict", "--config", CONFIG, "--ckpt_path", "best"],
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(to_svg(run_commands(commands)), encoding="utf-8")
    print(args.output)


def run_commands(commands: list[list[str]]) -> list[tuple[str, str]]:
    """Run the subcommands one after the other.

    Returns:
        (command as typed, output) of each.

    Raises:
        SystemExit: one of them failed.
    """
    variables = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "configs", Path(folder) / "configs")
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "lit_phi2", *command],
                cwd=folder,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout}")
            results.append(("python -m lit_phi2 " + " ".join(command), done.stdout))
    return results


def to_svg(results: list[tuple[str, str]]) -> str:
    """A terminal window with the commands and what they printed."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere)
        for command, output in results:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(output))
        svg = console.export_svg(title="lit_phi2", unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # they load fonts from the network


if __name__ == "__main__":
    main()
