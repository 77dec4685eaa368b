"""The benchmark runs, and writes what it says: one row for each measurement, and a plot."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "bfloat16", "float16")
SIDES = ("values", "stats", "both", "linear", "eager", "compiled")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    result = subprocess.run(
        [sys.executable, "benchmarks/bench_ops.py", "--quick", "--out", out],
        cwd=ROOT,
        # Started as a script Python looks for packages in benchmarks/, and the checkout may not be installed.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow
def test_every_measurement_is_a_row_with_what_it_was_measured_on(quick_run):
    with (quick_run / "bench_ops-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {("copy", "uint8"), *itertools.product(("matmul", *SIDES), DTYPES)}
    assert {(row["what"], row["dtype"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["device"] == "cpu"
        assert row["threads"] == "1"
        assert row["machine"]
        assert row["torch"]
        assert row["nemo_ext"]
        assert int(row["calls"]) >= 5
        assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert float(row["gbs"]) > 0


@pytest.mark.slow
def test_speeds_are_shares_of_the_ceilings_of_the_same_run(quick_run):
    with (quick_run / "bench_ops-cpu.csv").open() as file:
        rows = {(row["what"], row["dtype"]): row for row in csv.DictReader(file)}
    for side, dtype in itertools.product(SIDES, DTYPES):
        row = rows[side, dtype]
        flop = 2 * int(row["batch"]) * int(row["tokens"]) * int(row["in_features"]) * int(row["out_features"])
        tflops = flop / float(row["median_ms"]) / 1e9
        assert float(row["tflops"]) == pytest.approx(tflops)
        assert float(row["of_matmul"]) == pytest.approx(tflops / float(rows["matmul", dtype]["tflops"]))
        assert float(row["of_copy"]) == pytest.approx(float(row["gbs"]) / float(rows["copy", "uint8"]["gbs"]))


@pytest.mark.slow
def test_the_plot_is_a_picture(quick_run):
    assert (quick_run / "bench_ops-cpu.png").read_bytes().startswith(b"\x89PNG")
