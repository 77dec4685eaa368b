"""What all benchmarks share: command line, timing, peak memory, CSV file, plot, and the comparison with an older run.

A benchmark is a script `bench_NAME.py` in this folder, so that Python finds this file when it runs the script:

    from harness import Panel, Run, alternate, measured, parser

    run = Run("bench_name", parser(__doc__), keys=("what", "prompts"), shown=("median_ms", "over_loop"))
    for prompts in (10,) if run.quick else (10, 100, 1000):
        times = alternate({"loop": ..., "ours": ...}, device=run.device, verify=same_results, seconds=3)
        for what, row in measured(times, baselines=["loop"]).items():
            run.add({"what": what, "prompts": prompts, **row})
    run.finish([Panel("cost against prompts", run.rows, x="prompts")])

`verify` gets the result of each call by name, and raises an exception if they disagree. So nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_ext import _module, info
from nemo_ext.files import replacing

Row = dict[str, Any]
Call = Callable[[], object]

# A comparison of times is fair only if these facts are the same. Commit, date and version of nemo_ext may differ.
CIRCUMSTANCES = ("device", "machine", "threads", "variant", "compiler", "torch", "cuda", "diffusers", "transformers")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark. Its description is the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=1, help="number of CPU threads (default: 1, which other work disturbs least)"
    )
    parser.add_argument("--quick", action="store_true", help="run only the smallest useful measurements")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write BENCHMARK-DEVICE.csv and .png to this folder")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLDER",
        help="print ratios to an older CSV file; with python -m to an older DIR",
    )
    return parser


class Run:
    """One run of a benchmark. Each of its rows is printed and written as soon as it is added.

    Args:
        name: the name of the benchmark and of its files.
        parser: the result of `parser`. The benchmark may have added options.
        keys: the columns that identify a measurement. They are the same in every run.
        shown: further columns that are printed. All columns are written.

    Attributes:
        arguments: the parsed options.
        device: "cpu" or "cuda".
        quick: whether `--quick` was given.
        rows: the rows so far.
        facts: facts about the run, which are written in every row.
    """

    def __init__(
        self, name: str, parser: argparse.ArgumentParser, *, keys: Sequence[str], shown: Sequence[str]
    ) -> None:
        self.arguments = parser.parse_args()
        self.device: str = self.arguments.device
        self.quick: bool = self.arguments.quick
        if self.device == "cuda" and (obstacle := cuda_obstacle()):
            parser.error(f"--device cuda: {obstacle}")
        # The file is read now, so that a wrong path is an error before the work and not after it.
        self._older = read_csv(self.arguments.compare) if self.arguments.compare else []
        torch.set_num_threads(self.arguments.threads)
        os.environ["RAYON_NUM_THREADS"] = str(self.arguments.threads)  # the tokenizers read it when they start
        torch.manual_seed(0)
        self.name = name
        self.keys = tuple(keys)
        self.rows: list[Row] = []
        self.facts = facts_of_run(self.device, self.arguments.threads) | {"keys": " ".join(keys)}
        self._columns = (*self.keys, *shown)
        print(", ".join(f"{fact} {value}" for fact, value in self.facts.items() if value != ""))
        print(format_row(dict(zip(self._columns, self._columns, strict=True)), self._columns), flush=True)

    def add(self, row: Row) -> None:
        """Add one measurement: the columns of `keys`, and what was measured."""
        missing = [key for key in self.keys if key not in row]
        if missing:
            raise ValueError(f"{self.name}: a row must have {', '.join(self.keys)}, got none of {', '.join(missing)}")
        self.rows.append(row)
        print(format_row(row, self._columns), flush=True)
        if self.arguments.out:  # each time, because a run of an hour may be stopped
            write_csv([self.facts | row for row in self.rows], self.path("csv"))

    def path(self, suffix: str) -> Path:
        """Return the path of a result file."""
        out: Path = self.arguments.out
        return out / f"{self.name}-{self.device}.{suffix}"

    def finish(self, panels: Sequence[Panel]) -> None:
        """Draw the panels, and compare with the older run, if the options ask for it."""
        if self.arguments.out:
            plot(panels, self.facts, self.path("png"))
        if self._older:
            compare([self.facts | row for row in self.rows], self._older)


def alternate(
    calls: Mapping[str, Call],
    *,
    device: str = "cpu",
    verify: Callable[[dict[str, Any]], None] | None = None,
    seconds: float = 0.0,
    rounds: int = 5,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time calls that alternate, A B C A B C, so that other work on the machine affects all of them alike.

    Args:
        calls: name -> what to call.
        device: where the calls run. On "cuda" the time of a call ends when the GPU has finished its work.
        verify: gets name -> result of the first round, and raises an exception if a result is wrong.
        seconds: the least time to continue.
        rounds: the least number of rounds.
        warm_up: whether the first round is left out. It need not be if a call takes much longer than warming up.

    Returns:
        Name -> milliseconds of each call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = {}
    for name, call in calls.items():
        taken, first[name] = timed(call, device)
        if not warm_up:
            times[name].append(taken)
    if verify:
        verify(first)
    del first
    done, start = int(not warm_up), time.perf_counter()
    while done < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times[name].append(timed(call, device)[0])
        done += 1
    return times


def timed(call: Call, device: str = "cpu") -> tuple[float, object]:
    """Return the milliseconds that a call took, and its result."""
    if device == "cpu":
        before = time.perf_counter()
        result = call()
        return 1e3 * (time.perf_counter() - before), result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def measured(times: Mapping[str, Sequence[float]], baselines: Sequence[str] = ()) -> dict[str, Row]:
    """Return columns for the times that `alternate` returned.

    Args:
        times: name -> milliseconds of each call.
        baselines: names in `times` to compare with.

    Returns:
        Name -> columns. `calls` is the number of calls. `median_ms`, `low_ms` and `high_ms` are the median, the first
        and the last decile of the times. For each baseline B, `over_B` is the median of B divided by the median of this
        name: above 1, this name is faster. `over_B_low` and `over_B_high` are the deciles of the ratios of single
        rounds, and show the noise.
    """
    rows = {}
    for name, of_one in times.items():
        low, high = deciles(of_one)
        row = {"calls": len(of_one), "median_ms": statistics.median(of_one), "low_ms": low, "high_ms": high}
        for baseline in baselines:
            low, high = deciles([theirs / ours for theirs, ours in zip(times[baseline], of_one, strict=True)])
            ratio = statistics.median(times[baseline]) / row["median_ms"]
            row |= {f"over_{baseline}": ratio, f"over_{baseline}_low": low, f"over_{baseline}_high": high}
        rows[name] = row
    return rows


def deciles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the last decile of some values."""
    if len(values) == 1:
        return values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return low, high


def peak_memory(call: Callable[..., Any], *arguments: Any, device: str = "cpu") -> tuple[int, Any]:
    """Run `call(*arguments)` in a separate process, and return its peak memory in bytes and its result.

    On the CPU this is the memory of the whole process, PyTorch included, so compare two calls. On CUDA it is what
    PyTorch has allocated on the GPU.

    Args:
        call: a function at the top level of the script. It and its arguments are pickled.
        arguments: its arguments.
        device: where it runs.
    """
    # This starts a new interpreter. A fork would start with the memory of this process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_with_peak, call, arguments, device, torch.get_num_threads()).result()


def _with_peak(call: Callable[..., Any], arguments: tuple[Any, ...], device: str, threads: int) -> tuple[int, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    result = call(*arguments)
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), result
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the memory of the parent at the start
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1]), result
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), result


class Panel(NamedTuple):
    """A plot of `rows`: `y` over `x`, with one line for each value of `series`.

    The axes are logarithmic. If `x` is text, there are points instead of lines, with the deciles of a ratio.
    """

    title: str
    rows: Sequence[Row]
    x: str
    y: str = "median_ms"
    series: str = "what"


def plot(panels: Sequence[Panel], facts: Row, path: Path) -> None:
    """Draw all panels in one picture, three in each row, and write it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows_of_panels,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(1 + 5 * columns, 0.5 + 4 * rows_of_panels),
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    names = dict.fromkeys(row[panel.series] for panel in panels for row in panel.rows)
    colors = {name: f"C{place}" for place, name in enumerate(names)}  # a name has the same color in every panel
    for axis, panel in zip(axes.flat, panels, strict=False):
        rows = [row for row in panel.rows if row.get(panel.y) not in (None, "")]
        texts = any(isinstance(row[panel.x], str) for row in rows)
        for name in dict.fromkeys(row[panel.series] for row in rows):
            of_one = [row for row in rows if row[panel.series] == name]
            if texts:
                points = [row[panel.x] for row in of_one], [row[panel.y] for row in of_one]
                below = [max(0, row[panel.y] - row.get(f"{panel.y}_low", row[panel.y])) for row in of_one]
                above = [max(0, row.get(f"{panel.y}_high", row[panel.y]) - row[panel.y]) for row in of_one]
                axis.errorbar(*points, yerr=(below, above), fmt="o", capsize=4, color=colors[name], label=name)
            else:
                of_one.sort(key=lambda row: row[panel.x])
                points = [row[panel.x] for row in of_one], [row[panel.y] for row in of_one]
                axis.plot(*points, "o-", color=colors[name], label=name)
        axis.set(title=panel.title, ylabel=panel.y)
        if texts:
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.tick_params("x", rotation=20)
        else:
            axis.set(xlabel=panel.x, xscale="log", yscale="log")
        if rows:
            axis.legend()
    figure.suptitle(f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, {facts['commit']}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """Return the values that identify a row, as text, so that they equal those read from a file."""
    return tuple(str(row.get(name, "")) for name in names)


def compare(rows: Sequence[Row], older: Sequence[Row], column: str = "median_ms") -> None:
    """Print, for each measurement of both runs, the older `column` divided by the new one: above 1 is faster now."""
    for fact in CIRCUMSTANCES:
        now, then = str(rows[0][fact]), older[0].get(fact, "")
        if now != then:
            print(f"warning: {fact} was '{then}' and is '{now}', so the ratios show more than the change of the code")
    names = rows[0]["keys"].split()
    before = {key(row, names): row for row in older if row.get(column)}
    columns = (*names, "then", "now", "then/now")
    print(f"\n{column} at {older[0].get('commit', '')} and at {rows[0]['commit']}")
    print(format_row(dict(zip(columns, columns, strict=True)), columns))
    for row in rows:
        now = row.get(column)
        if now and key(row, names) in before:
            then = float(before.pop(key(row, names))[column])
            print(format_row({**row, "then": then, "now": now, "then/now": then / now}, columns))
        elif now:
            print(f"only now: {' '.join(key(row, names))}")
    for missing in before:
        print(f"only then: {' '.join(missing)}")


def format_row(row: Row, columns: Sequence[str]) -> str:
    """Return one line of a table."""
    cells = []
    for column in columns:
        value = row.get(column, "")
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        cells.append(f"{text:<{max(len(column), 10)}}")
    return "  ".join(cells).rstrip()


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows to a CSV file that has all of their columns."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Read the rows of a CSV file. All values are text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def facts_of_run(device: str, threads: int) -> Row:
    """Return facts about a run: date, commit, machine, versions and build."""
    build = _module.build_facts()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "machine": torch.cuda.get_device_name(device) if device == "cuda" else cpu_name(),
        "threads": threads,
        "variant": "" if device == "cuda" else _module.cpu_choice()[0],
        "nemo_ext": build["version"],
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        **{package: importlib.metadata.version(package) for package in ("diffusers", "transformers")},
    }


def cuda_obstacle() -> str | None:
    """Return why the operators cannot run on a GPU here, or None if they can."""
    gpus = info.gpus()
    return info.cuda_obstacle(_module.build_facts(), gpus[0]) if gpus else f"torch {torch.__version__} sees no GPU"


def cpu_name() -> str:
    """Return the name of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of this checkout, with "-dirty" if files were changed; outside of a checkout an empty text."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
