"""The harness on calls that take no time, and every benchmark once: what it writes, not how fast anything is."""

import csv
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filled import fill

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402

SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
NAMES = [script.stem.removeprefix("bench_") for script in SCRIPTS]
PNG = b"\x89PNG"


class TestAlternate:
    def test_calls_take_turns_after_a_round_that_does_not_count(self) -> None:
        called: list[str] = []
        calls = {name: functools.partial(called.append, name) for name in "abc"}
        times = harness.alternate(calls, rounds=2)
        assert "".join(called) == "abcabcabc"
        assert {name: len(of_one) for name, of_one in times.items()} == {"a": 2, "b": 2, "c": 2}

    def test_without_a_warm_up_the_first_round_counts(self) -> None:
        called: list[str] = []
        times = harness.alternate({"a": lambda: called.append("a")}, rounds=3, warm_up=False)
        assert len(called) == len(times["a"]) == 3

    def test_goes_on_for_as_long_as_it_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = itertools.count(step=0.5)  # of seconds: each look at it finds half a second gone
        monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
        times = harness.alternate({"a": lambda: None}, rounds=2, seconds=7)
        assert times["a"] == [500.0] * 5

    def test_what_is_wrong_is_not_timed(self) -> None:
        called: list[str] = []

        def verify(results: dict[str, int]) -> None:
            assert results["a"] == results["b"], "they differ"

        calls = {"a": lambda: called.append("a") or 1, "b": lambda: called.append("b") or 2}
        with pytest.raises(AssertionError, match="they differ"):
            harness.alternate(calls, verify=verify)
        assert called == ["a", "b"]


class TestMeasured:
    def test_ratios_are_of_medians_and_above_1_where_it_is_faster(self) -> None:
        rows = harness.measured({"slow": [8.0, 6.0, 100.0], "fast": [2.0, 3.0, 1.0]}, baselines=["slow"])
        assert rows["slow"]["over_slow"] == 1
        assert rows["fast"]["median_ms"] == 2
        assert rows["fast"]["over_slow"] == 4
        assert rows["fast"]["calls"] == 3

    def test_noise_is_the_deciles_of_the_ratio_round_by_round(self) -> None:
        fast = [1.0] * 11
        slow = [float(2 + i) for i in range(11)]
        row = harness.measured({"slow": slow, "fast": fast}, baselines=["slow"])["fast"]
        assert (row["over_slow_low"], row["over_slow"], row["over_slow_high"]) == pytest.approx((3, 7, 11))

    def test_one_call_is_its_own_spread(self) -> None:
        row = harness.measured({"a": [5.0]})["a"]
        assert (row["low_ms"], row["median_ms"], row["high_ms"]) == (5, 5, 5)


class TestPeakMemory:
    @pytest.mark.slow
    def test_is_of_what_the_call_takes_and_not_of_this_process(self) -> None:
        before, _ = harness.peak_memory(fill, 2**20)
        here = torch.ones(2**27)  # 512 MiB
        little, _ = harness.peak_memory(fill, 2**20)
        much, last = harness.peak_memory(fill, 2**28)
        assert last == 1
        assert little - before < here.nbytes / 10
        assert 0.9 * 2**28 < much - little < 1.1 * 2**28


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., harness.Run]:
    """Starts a benchmark of nothing with options of the command line."""
    monkeypatch.setattr(harness.torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("RAYON_NUM_THREADS", "")  # and given back afterwards

    def run(*options: object) -> harness.Run:
        monkeypatch.setattr(sys, "argv", ["bench_none.py", *map(str, options)])
        return harness.Run("bench_none", harness.parser("Nothing."), keys=("what", "prompts"), shown=("median_ms",))

    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestRun:
    def test_writes_each_row_with_its_circumstances_as_soon_as_it_is_there(
        self, start: Callable[..., harness.Run], tmp_path: Path
    ) -> None:
        run = start("--out", tmp_path / "new", "--threads", 3)
        run.add({"what": "a", "prompts": 10, "median_ms": 1.5})
        assert len(rows_of(tmp_path / "new" / "bench_none-cpu.csv")) == 1
        run.add({"what": "a", "prompts": 20, "peak_mib": 7})
        first, second = rows_of(tmp_path / "new" / "bench_none-cpu.csv")
        assert (first["what"], first["prompts"], first["median_ms"], first["peak_mib"]) == ("a", "10", "1.5", "")
        assert (second["median_ms"], second["peak_mib"]) == ("", "7")
        assert first["threads"] == "3"
        assert first["keys"] == "what prompts"
        assert all(first[fact] for fact in ("date", "machine", "torch", "nemo_ext", "diffusers", "transformers"))

    def test_draws_all_panels_in_one_picture(self, start: Callable[..., harness.Run], tmp_path: Path) -> None:
        run = start("--out", tmp_path)
        run.add({"what": "a", "prompts": 10, "median_ms": 1.5})
        run.finish([harness.Panel("time", run.rows, x="prompts")] * 4)
        assert (tmp_path / "bench_none-cpu.png").read_bytes().startswith(PNG)

    def test_writes_nothing_unless_asked_to(
        self, start: Callable[..., harness.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = start()
        run.add({"what": "a", "prompts": 10})
        run.finish([])
        assert not list(tmp_path.iterdir())

    def test_refuses_a_row_that_could_not_be_told_from_others(self, start: Callable[..., harness.Run]) -> None:
        with pytest.raises(ValueError, match="a row must have what, prompts, got none of prompts"):
            start().add({"what": "a"})

    def test_says_why_there_is_no_gpu_to_run_on(
        self, start: Callable[..., harness.Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(harness, "cuda_obstacle", lambda: "torch sees no GPU")
        with pytest.raises(SystemExit):
            start("--device", "cuda")
        assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


class TestCompare:
    @pytest.fixture
    def older(self, start: Callable[..., harness.Run], tmp_path: Path) -> Path:
        run = start("--out", tmp_path)
        run.add({"what": "a", "prompts": 10, "median_ms": 6.0})
        run.add({"what": "gone", "prompts": 10, "median_ms": 6.0})
        run.add({"what": "memory", "prompts": 10, "peak_mib": 6})
        return tmp_path / "bench_none-cpu.csv"

    def test_prints_how_much_faster_it_is_and_what_only_one_of_them_has(
        self, start: Callable[..., harness.Run], older: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = start("--compare", older)
        run.add({"what": "a", "prompts": 10, "median_ms": 1.5})
        run.add({"what": "a", "prompts": 20, "median_ms": 1.5})
        capsys.readouterr()
        run.finish([])
        _, *lines = capsys.readouterr().out.strip().splitlines()
        assert [line.split() for line in lines] == [
            ["what", "prompts", "then", "now", "then/now"],
            ["a", "10", "6", "1.5", "4"],
            ["only", "now:", "a", "20"],
            ["only", "then:", "gone", "10"],
        ]

    def test_warns_where_not_the_code_alone_has_changed(
        self, start: Callable[..., harness.Run], older: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        older.write_text(older.read_text().replace(torch.__version__, "1.0"))
        run = start("--compare", older, "--threads", 2)
        run.add({"what": "a", "prompts": 10, "median_ms": 1.5})
        run.finish([])
        said = capsys.readouterr().out
        assert f"warning: torch was '1.0' and is '{torch.__version__}'" in said
        assert "warning: threads was '1' and is '2'" in said
        assert "warning: machine" not in said

    def test_a_missing_file_is_said_before_the_work(self, start: Callable[..., harness.Run], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            start("--compare", tmp_path / "none.csv")


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_script_finds_the_harness_in_its_own_folder(script: Path) -> None:
    """Started as `python benchmarks/bench_NAME.py` it finds no package `benchmarks`."""
    assert "from harness import" in script.read_text()
    assert "from benchmarks" not in script.read_text()


def run_all(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_unknown_benchmarks_are_refused() -> None:
    result = run_all("nothing")
    assert result.returncode == 2
    assert f"NAME must be of {', '.join(NAMES)}, got nothing" in result.stderr


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Runs a benchmark by name, once for all tests: the folder of its files, and what was printed."""

    @functools.cache
    def run(name: str) -> tuple[Path, str]:
        out = tmp_path_factory.mktemp(name)
        result = run_all("--quick", "--out", out, name)
        assert result.returncode == 0, result.stderr
        return out, result.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
class TestQuickRun:
    def test_every_measurement_is_a_row_of_its_own_with_what_it_was_measured_on(
        self, quick_run: Callable[[str], tuple[Path, str]], name: str
    ) -> None:
        out, _ = quick_run(name)
        rows = rows_of(out / f"bench_{name}-cpu.csv")
        assert rows
        assert len({harness.key(row, row["keys"].split()) for row in rows}) == len(rows)
        for row in rows:
            assert row["device"] == "cpu"
            assert row["threads"] == "1"
            assert all(row[fact] for fact in ("date", "machine", "torch", "nemo_ext"))
            if row.get("low_ms"):
                assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])

    def test_ratios_to_a_baseline_are_of_the_same_run(
        self, quick_run: Callable[[str], tuple[Path, str]], name: str
    ) -> None:
        out, _ = quick_run(name)
        rows = rows_of(out / f"bench_{name}-cpu.csv")
        baselines = [column for column in rows[0] if column.startswith("over_") and column.count("_") == 1]
        assert baselines
        for column in baselines:
            ratios = [float(row[column]) for row in rows if row[column]]
            assert any(ratio != 1 for ratio in ratios)
            assert any(ratio == 1 for ratio in ratios)  # the baseline's own
            assert all(ratio > 0 for ratio in ratios)

    def test_the_plot_is_a_picture(self, quick_run: Callable[[str], tuple[Path, str]], name: str) -> None:
        out, _ = quick_run(name)
        assert (out / f"bench_{name}-cpu.png").read_bytes().startswith(PNG)

    def test_the_table_at_the_end_has_a_line_for_each_row(
        self, quick_run: Callable[[str], tuple[Path, str]], name: str
    ) -> None:
        out, printed = quick_run(name)
        rows = rows_of(out / f"bench_{name}-cpu.csv")
        lines = printed.splitlines()[-len(rows) :]
        for line, row in zip(lines, rows, strict=True):
            assert line.split()[0] == name
            assert " ".join(harness.key(row, row["keys"].split())) in line


@pytest.mark.slow
def test_speeds_of_operators_are_shares_of_the_ceilings_of_the_same_run(
    quick_run: Callable[[str], tuple[Path, str]],
) -> None:
    out, _ = quick_run("ops")
    rows = {(row["what"], row["dtype"]): row for row in rows_of(out / "bench_ops-cpu.csv")}
    copied = float(rows["copy", "uint8"]["gbs"])
    sides = ("values", "stats", "both", "linear", "eager", "compiled")
    for side, dtype in itertools.product(sides, ("float32", "bfloat16", "float16")):
        row = rows[side, dtype]
        flop = 2 * int(row["batch"]) * int(row["tokens"]) * int(row["in_features"]) * int(row["out_features"])
        tflops = flop / float(row["median_ms"]) / 1e9
        assert float(row["tflops"]) == pytest.approx(tflops)
        assert float(row["of_matmul"]) == pytest.approx(tflops / float(rows["matmul", dtype]["tflops"]))
        assert float(row["of_copy"]) == pytest.approx(float(row["gbs"]) / copied)


@pytest.mark.slow
def test_memory_of_statistics_does_not_grow_with_the_prompts(quick_run: Callable[[str], tuple[Path, str]]) -> None:
    out, _ = quick_run("statistics")
    peaks = {
        int(row["prompts"]): float(row["peak_mib"])
        for row in rows_of(out / "bench_statistics-cpu.csv")
        if row["peak_mib"] and row["what"] == "collect"
    }
    fewest, most = min(peaks), max(peaks)
    assert most >= 10 * fewest
    assert peaks[most] < 1.1 * peaks[fewest]


@pytest.mark.slow
def test_several_threads_are_compared_with_one_and_there_again_afterwards() -> None:
    import bench_ops

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rows = bench_ops.measure_shape((1, 16, 8), torch.float32, "cpu", seconds=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {row["what"] for row in rows if row.get("over_one_thread")} == {"values", "stats", "both", "linear"}
