"""What a user meets who builds or installs the package, when it works and when something is missing."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from nemo_ext import info

ROOT = Path(__file__).parent.parent


def python(arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_without_torch_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("No module named \'torch\'", name="torch")\n')
    result = python(["setup.py", "--version"], ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert 'nemo_ext needs torch to build: install it first (pip install "torch>=2.13' in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_with_an_old_torch_says_what_it_needs(tmp_path):
    package = tmp_path / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.12.1+cpu"\n')
    (package / "utils" / "__init__.py").write_text("")
    (package / "utils" / "cpp_extension.py").write_text("BuildExtension = CppExtension = object\n")
    result = python(["setup.py", "--version"], ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "nemo_ext needs torch>=2.13 to build, got 2.12.1+cpu" in result.stderr


def test_setup_without_a_compiler_says_what_to_install(tmp_path):
    build = ["setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    result = python(build, ROOT, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "nemo_ext needs a C++20 compiler to build, and 'no-such-compiler' was not found" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_source_tree_without_binaries_says_what_to_do(tmp_path):
    """As when Python is started in the repository after a plain `pip install .`."""
    package = tmp_path / "nemo_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text((ROOT / "nemo_ext" / "ops.py").read_text())
    # -S leaves out the hooks of an editable install, which would find the binaries after all.
    libraries = Path(torch.__file__).parent.parent
    result = python(["-S", "-c", "import nemo_ext.ops"], tmp_path, PYTHONPATH=str(libraries))
    assert result.returncode != 0
    assert "has no compiled operators" in result.stderr
    assert "pip install -e ." in result.stderr


def test_info_tells_how_it_was_built_and_what_runs():
    facts = info.collect()
    assert "error" not in facts
    assert facts["build"]["version"] == facts["packages"]["nemo_ext"]
    assert set(facts["build"]) == {"version", "platform", "compiler", "flags", "torch", "cuda_architectures"}
    assert facts["cpu"]["capabilities"][facts["cpu"]["used"]]


@pytest.mark.slow
def test_a_source_distribution_is_complete_and_installs(tmp_path):
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    assert python(["-c", build], ROOT).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")}
    assert tracked <= names

    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "--target", site, archive]
    result = python(install, tmp_path)
    assert result.returncode == 0, result.stderr
    program = "import nemo_ext.ops, torch; print(nemo_ext.ops.__file__, torch.ops.nemo_ext.value_projection)"
    result = python(["-c", program], tmp_path, PYTHONPATH=str(site))
    assert result.stdout.startswith(str(site)), result.stderr
    assert {path.name.split(".")[0] for path in (site / "nemo_ext").glob("*.so")} == {"_C", "_module"}
    assert (site / "nemo_ext" / "py.typed").exists()
