"""Which devices the operators' tests run on, and the table of legs at the end of every run.

A test that takes the fixture `device` runs on the CPU, and on CUDA as well where there is one; `--require-device cuda`
makes a missing one a failure. A leg is one of the ways in which the operators are held to their specification; a test
names its own with `pytest.mark.leg("emulated")`, one that takes `device` belongs to that device's.
"""

import os

import psutil
import pytest
import torch

from nemo_ext import _module, info
from nemo_ext.ops import check_once

DEVICES = ("cpu", "cuda")
LEGS = {  # name in the marker -> name in the table
    "reference": "reference",
    "cpu": "CPU",
    "amx": "AMX",
    "emulated": "emulated",
    "compiled": "compiled",
    "cuda": "CUDA",
}


def missing(device):
    """Why the operators cannot run there, in one sentence; None where they can."""
    if device == "cpu":
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    gpus = info.gpus()
    return info.cuda_obstacle(_module.build_facts(), gpus[0]) if gpus else "torch sees no GPU"


def pytest_addoption(parser):
    parser.addoption(
        "--require-device",
        action="append",
        choices=DEVICES,
        default=[],
        help="fail, instead of skipping, where the operators cannot run on this device; may be repeated",
    )


def pytest_configure(config):
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # Otherwise each of them would use all cores, and two threaded programs on two cores take many times longer.
        threads = max(1, psutil.cpu_count() // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config.addinivalue_line("markers", f"leg(name): one of {', '.join(LEGS)}; counted in the table at the end")


def pytest_generate_tests(metafunc):
    """A test of one leg runs there, or is skipped; all others are not doubled where it would be to skip them."""
    if "device" not in metafunc.fixturenames:
        return
    leg = metafunc.definition.get_closest_marker("leg")
    required = metafunc.config.getoption("--require-device")
    wanted = leg.args if leg else [name for name in DEVICES if name in required or not missing(name)]
    devices = [pytest.param(name, marks=pytest.mark.leg(name)) for name in wanted]
    metafunc.parametrize("device", devices, indirect=True)


#: Files that take minutes. They begin first, so that no process is left alone with one of them at the end.
LONG = ("project/test_benchmarks", "ranks/test_killed", "commands/test_cli", "demo/test_demo_model", "demo/test_demo")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.with_suffix("").as_posix().endswith(LONG))
    for item in items:
        marker = item.get_closest_marker("leg")
        if marker is None:
            continue
        (leg,) = marker.args
        if leg not in LEGS:
            raise pytest.UsageError(f"{item.nodeid}: leg must be one of {', '.join(LEGS)}, got {leg}")
        item.user_properties.append(("leg", leg))  # what a report has of its item


def pytest_terminal_summary(terminalreporter):
    columns = {"passed": "passed", "failed": "failed", "error": "failed", "skipped": "skipped"}
    counts = {leg: dict.fromkeys(columns.values(), 0) for leg in LEGS}
    reasons = {leg: set() for leg in LEGS}
    for outcome, column in columns.items():
        for report in terminalreporter.getreports(outcome):
            leg = dict(report.user_properties).get("leg") if isinstance(report, pytest.TestReport) else None
            if leg is None:
                continue
            counts[leg][column] += 1
            if outcome == "skipped":
                reasons[leg].add(report.longrepr[2].removeprefix("Skipped: "))
    terminalreporter.section("legs")
    terminalreporter.line(f"{'leg':12}{'passed':>8}{'failed':>8}{'skipped':>9}  because")
    for leg, title in LEGS.items():
        count = counts[leg]
        if leg in DEVICES and (reason := missing(leg)):
            reasons[leg] = {reason}
        elif not any(count.values()):
            reasons[leg] = {"not in this run"}
        elif leg == "amx" and _module.cpu_capabilities()["amx"]:
            reasons[leg].add("executed on this CPU, and emulated")
        because = "; ".join(sorted(reasons[leg]))
        line = f"{title:12}{count['passed']:8}{count['failed']:8}{count['skipped']:9}  {because}"
        terminalreporter.line(line.rstrip())


@pytest.fixture
def device(request):
    """Where the operators run."""
    reason = missing(request.param)
    if reason and request.param in request.config.getoption("--require-device"):
        pytest.fail(f"--require-device {request.param}: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
    if request.param != "cuda":
        return torch.device(request.param)
    found = torch.device("cuda", 0)
    check_once(torch.empty(0, device=found))  # now, and not inside a test of what a call does
    return found


@pytest.fixture
def _path_of_the_kernel(monkeypatch):
    """On CUDA the kernel computes the products: a library's bits may depend on the batch, and they take memory."""
    monkeypatch.setenv("NEMO_EXT_CUDA_PATH", "kernel")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)
