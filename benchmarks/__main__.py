"""Runs the benchmarks one after another and prints one table: `python -m benchmarks [--quick] [NAME…]`.

NAME selects the script bench_NAME.py of this folder, for example ops or statistics. Without NAME all scripts run. Each
runs in its own process, so that nothing that one compiles, caches or sets affects another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row, facts_of_run, key, parser, read_csv

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(script.stem.removeprefix("bench_") for script in FOLDER.glob("bench_*.py"))
FACTS = {*facts_of_run("cpu", 1), "keys"}


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "names", nargs="*", metavar="NAME", help=f"the benchmarks to run, of {', '.join(NAMES)} (default: all)"
    )
    arguments = options.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        options.error(f"NAME must be of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    shared = ["--device", arguments.device, "--threads", str(arguments.threads)]
    shared += ["--quick"] if arguments.quick else []
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        for name in arguments.names or NAMES:
            file = f"bench_{name}-{arguments.device}.csv"
            own = ["--out", str(out), *(["--compare", str(arguments.compare / file)] if arguments.compare else [])]
            print(f"== {name}", flush=True)
            start = time.perf_counter()
            done = subprocess.run([sys.executable, FOLDER / f"bench_{name}.py", *shared, *own], env=environment())
            if done.returncode:
                print(f"bench_{name}.py failed with exit code {done.returncode}", file=sys.stderr)
                return 1
            print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
            results[name] = read_csv(out / file)
    for name, rows in results.items():
        for row in rows:
            print(f"{name:12}{' '.join(key(row, row['keys'].split())):44}{results_of(row)}")
    return 0


def environment() -> dict[str, str]:
    """Return an environment in which a script finds the package of this checkout even if it is not installed."""
    path = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def results_of(row: Row) -> str:
    """Format what was measured. Deciles, numbers of calls and facts about the run are in the file only."""
    left_out = {*FACTS, *row["keys"].split(), "calls"}
    columns = [name for name in row if name not in left_out and not {"low", "high"} & {*name.split("_")}]
    return ", ".join(f"{name} {rounded(row[name])}" for name in columns if row[name])


def rounded(text: str) -> str:
    """Round a number to four digits, and return any other text unchanged."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
