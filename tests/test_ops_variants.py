"""Every variant of the CPU kernels that this machine can run passes the same tests.

The variant is chosen once in a process, so each gets a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ext import _module

pytestmark = pytest.mark.leg("cpu")

TESTS = Path(__file__).parent
VARIANTS = [name for name, supported in _module.cpu_capabilities().items() if supported]


def run(arguments, capability):
    # Without a GPU: what runs there has no variants.
    environment = {**os.environ, "NEMO_EXT_CPU_CAPABILITY": capability, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != _module.cpu_capability()])
def test_variant_passes_the_numerical_tests(variant):
    files = ["test_ops_reference.py", "test_ops_determinism.py", "test_ops_statistics.py"]
    result = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)], variant)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_environment_variable_chooses_the_variant(variant):
    result = run(["-c", "from nemo_ext import _module; print(_module.cpu_capability())"], variant)
    assert result.stdout.strip() == variant


def test_an_unknown_variant_is_an_error_that_lists_those_there_are():
    program = "import torch; from nemo_ext import ops; ops.value_projection(torch.ones(1, 1, 1), torch.ones(1, 1))"
    result = run(["-c", program], "sse9")
    assert result.returncode != 0
    assert f"must be one that this CPU supports ({', '.join(VARIANTS)}), got sse9" in result.stderr
