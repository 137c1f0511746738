"""Profiling: tokenizing, startup, time and memory of a step by its size, time by kind of operator, large files.

    python scripts/profiling.py encode --base FOLDER --records FILE   encode, beside encode_batch of `tokenizers`
    python scripts/profiling.py startup                               --help, and the first step of quickstart's fit
    python scripts/profiling.py sizes --base FOLDER                   a step, by length and number of rows
    python scripts/profiling.py operators --base FOLDER               a step, by kind of operator, ours and PEFT's
    python scripts/profiling.py matmul --base FOLDER                  float32, and bfloat16 by torch and by lit_phi2
    python scripts/profiling.py compile --base FOLDER                 steps with torch.compile and without
    python scripts/profiling.py traffic                               what a block reads and writes on a GPU, counted
    python scripts/profiling.py scale --records FILE                  time and memory, by number of records
    python scripts/profiling.py ledger --counts 100000 10000000       the same of the ledger

The numbers are of one machine at one time: compare those of one run only.
"""

import argparse
from pathlib import Path

from profiles import data, ledger, startup, step, traffic

PROFILES = {
    "encode": data.encoding,
    "startup": startup.startup,
    "sizes": step.sizes,
    "operators": step.operators,
    "matmul": step.matmul,
    "compile": step.compiled,
    "traffic": traffic.traffic,
    "scale": data.scale,
    "ledger": ledger.ledger,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=list(PROFILES))
    parser.add_argument("--base", default="tiny", help="as model.base")
    parser.add_argument("--records", default="claims:train", help="as data.train_files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of sizes, operators and compile")
    parser.add_argument("--peer-dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of PEFT's step")
    parser.add_argument("--tokens", type=int, default=16384, help="of traffic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=(128, 256, 512, 1024, 2048), help="of sizes")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8), help="of sizes: rows")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=(10**4, 10**5, 10**6), help="of scale, ledger: records"
    )
    parser.add_argument("--schedule-only", type=int, default=10**7, help="of scale: records that are scheduled only")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of scale")
    parser.add_argument("--output", type=Path, help="of sizes: a JSON file for scripts/plots.py")
    args = parser.parse_args()
    PROFILES[args.profile](args)


if __name__ == "__main__":
    main()
