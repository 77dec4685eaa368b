"""What a user meets who builds or installs the package, when it works and when something is missing."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from nemo_ext import info, ops
from nemo_ext.commands.shared import load_model
from nemo_ext.errors import NemoError
from nemo_ext.ranks.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


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
    assert 'nemo_ext needs torch to build: install it first (pip install "torch>=2.10' in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_with_an_old_torch_says_what_it_needs(tmp_path):
    package = tmp_path / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.9.1+cpu"\n')
    (package / "utils" / "__init__.py").write_text("")
    (package / "utils" / "cpp_extension.py").write_text("BuildExtension = CppExtension = object\n")
    result = python(["setup.py", "--version"], ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "nemo_ext needs torch>=2.10 to build, got 2.9.1+cpu" in result.stderr


@pytest.mark.slow
def test_setup_without_a_compiler_says_what_to_install(tmp_path):
    build = ["setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    result = python(build, ROOT, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "nemo_ext needs a C++20 compiler to build, and 'no-such-compiler' was not found" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_source_tree_without_binaries_says_what_to_do(tmp_path):
    """As when Python is started in the repository after a plain `pip install .`."""
    package = tmp_path / "nemo_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("ops.py", "first_use.py", "reference.py"):
        (package / name).write_text((ROOT / "nemo_ext" / name).read_text())
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
    assert set(facts["build"]) == {"version", "platform", "compiler", "flags", "torch", "cuda", "cuda_architectures"}
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["capabilities"][facts["cpu"]["used"]]
    assert facts["cpu"]["because"]


def ops_binary():
    return importlib.import_module("nemo_ext._C").__file__


def test_the_binary_holds_cuda_kernels_where_info_says_so():
    facts = info.collect()
    compiled = facts["build"]["cuda_architectures"]
    binary = Path(ops_binary()).read_bytes()
    assert (b".nv_fatbin" in binary) == bool(compiled)
    assert facts["backends"] == (["cpu", "cuda"] if compiled else ["cpu"])
    assert facts["build"]["cuda"].startswith("compiled by nvcc " if compiled else "left out: ")


@pytest.mark.parametrize("name", ["_C", "_module"])
def test_the_binaries_keep_to_pythons_stable_abi(name):
    binary = importlib.import_module(f"nemo_ext.{name}").__file__
    assert binary.endswith(f"{name}.abi3.so")
    audit = [Path(sys.executable).with_name("abi3audit"), "--strict", "--assume-minimum-abi3", "3.10", binary]
    done = subprocess.run(audit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_operators_keep_to_pytorchs_stable_abi():
    audit = [Path(sys.executable).with_name("torch-abi-audit"), "--check", "both", "--json"]
    done = subprocess.run([*audit, ops_binary()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operator_has_a_kernel_for_every_backend():
    keys = ["Meta", *(backend.upper() for backend in info.collect()["backends"])]
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nemo_ext::")]
    assert {f"nemo_ext::{name}" for name in ops.__all__} <= set(names)
    for name in names:
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} on {key}"


@pytest.mark.parametrize("name", ops.__all__)
@pytest.mark.parametrize("key", ["Autograd", "AutocastCPU", "AutocastCUDA"])
def test_autograd_and_autocast_are_registered_without_a_gpu_too(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nemo_ext::{name}", key)


COMPILED = {"cuda": "compiled by nvcc 13.0.88", "cuda_architectures": ["sm_86", "sm_100", "compute_100"]}


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (10, 0), (10, 3), (12, 0)])
def test_kernels_run_within_a_major_version_and_by_ptx_on_all_later_ones(capability):
    assert info.cuda_obstacle(COMPILED, info.Gpu("Some GPU", capability, (13, 0))) is None


@pytest.mark.parametrize(
    ("toolkit", "driver", "obstacle"),
    [
        (
            "13.0.88",
            (12, 8),
            "need a driver for CUDA 13, which is 580 or newer, and that of Some GPU is for CUDA 12.8: ",
        ),
        ("14.0.1", (13, 0), "need a driver for CUDA 14 and that of Some GPU is for CUDA 13.0: update the driver, or"),
        ("12.8.93", (12, 0), None),
        ("12.8.93", (13, 1), None),
    ],
)
def test_a_driver_older_than_the_kernels_version_of_cuda_is_named(toolkit, driver, obstacle):
    build = {**COMPILED, "cuda": f"compiled by nvcc {toolkit}, which does not know sm_120"}
    found = info.cuda_obstacle(build, info.Gpu("Some GPU", (8, 6), driver))
    assert found is None if obstacle is None else obstacle in found


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_gpu_that_nothing_was_compiled_for_is_named_with_what_to_do(capability):
    obstacle = info.cuda_obstacle(COMPILED, info.Gpu("Some GPU", capability, (13, 0)))
    name = "{}{}".format(*capability)
    assert f"(sm_86, sm_100, compute_100) don't run on Some GPU (sm_{name})" in obstacle
    assert f"NEMO_EXT_CUDA_ARCHS={name} pip install" in obstacle


def test_a_gpu_that_is_too_old_for_the_kernels_is_named():
    obstacle = info.cuda_obstacle(COMPILED, info.Gpu("Old GPU", (7, 5), (13, 0)))
    assert obstacle.endswith("don't run on Old GPU (sm_75), they need sm_80 or newer")


def test_info_says_what_to_do_for_a_gpu_without_kernels(monkeypatch):
    monkeypatch.delenv("NEMO_EXT_CUDA_PATH", raising=False)
    module = importlib.import_module("nemo_ext._module")
    facts = {**module.build_facts(), "cuda": "left out: no nvcc", "cuda_architectures": []}
    monkeypatch.setattr(module, "build_facts", lambda: facts)
    monkeypatch.setattr(info, "gpus", lambda: [info.Gpu("Some GPU", (9, 0), (13, 0))] * 2)
    facts = info.collect()
    assert facts["devices"] == ["cpu", "Some GPU (sm_90)", "Some GPU (sm_90)"]
    assert facts["cuda_paths"] == {"sm_90": {"float32": "kernel", "bfloat16": "library", "float16": "library"}}
    (note,) = facts["notes"]
    assert "has no CUDA kernels (left out: no nvcc)" in note
    assert "install a CUDA toolkit and run NEMO_EXT_CUDA=1 pip install" in note


def test_the_command_refuses_a_gpu_that_the_kernels_do_not_run_on(monkeypatch):
    monkeypatch.setattr(info, "gpus", lambda: [info.Gpu("Old GPU", (7, 5), (13, 0))])
    with pytest.raises(NemoError, match=r"--device cuda: .*Old GPU.*; or use --device cpu"):
        load_model(argparse.Namespace(device="cuda", model=Path("model"), dtype="float32", ranks=Ranks()))


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module: nothing is built by importing it."""
    spec = importlib.util.spec_from_file_location("nemo_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit as far as the build looks at it. Its nvcc logs what it is asked to compile, and does as if."""
    home = tmp_path / "toolkit"
    for file in ("include/cuda_runtime.h", "lib/libcudart_static.a", "bin/nvcc"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    (home / "bin" / "nvcc").write_text(
        f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-code) printf 'sm_80\nsm_90\n' ;;
--list-gpu-arch) printf 'compute_80\ncompute_90\n' ;;
--dryrun)
    echo '#$ INCLUDES="-I{home}/bin/../include"' >&2
    echo '#$ LIBRARIES=  "-L{home}/bin/../lib/stubs" "-L{home}/bin/../lib"' >&2 ;;
*)
    echo "$*" >> {home}/log
    test ! -e {home}/broken || {{ echo "value_projection.cu(1): error: planted" >&2; exit 2; }}
    while test "$1" != -o; do shift; done
    touch "$2" ;;
esac
"""
    )
    (home / "bin" / "nvcc").chmod(0o755)
    return home


@pytest.mark.parametrize("choice", ["auto", "0", "1"])
def test_the_choice_of_cuda_is_taken_as_given(setup, choice):
    assert setup.cuda_choice({"NEMO_EXT_CUDA": choice}) == choice


def test_without_a_choice_of_cuda_the_toolkit_decides(setup):
    assert setup.cuda_choice({}) == "auto"


def test_another_choice_of_cuda_is_an_error(setup):
    with pytest.raises(SystemExit, match=r"NEMO_EXT_CUDA must be auto, 0 or 1, got 'yes'\."):
        setup.cuda_choice({"NEMO_EXT_CUDA": "yes"})


@pytest.mark.parametrize(
    ("environment", "architectures"),
    [
        ({}, "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_80"),
        ({"NEMO_EXT_CUDA_ARCHS": "80;90"}, "sm_80 sm_90"),
        ({"NEMO_EXT_CUDA_ARCHS": "80+PTX, 120"}, "sm_80 sm_120 compute_80"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "sm_80 sm_90 compute_90"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a 9.0 10.0f+PTX"}, "sm_80 sm_90 sm_100 compute_100"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "NEMO_EXT_CUDA_ARCHS": "90"}, "sm_90"),
    ],
)
def test_architectures_are_read_from_the_environment(setup, environment, architectures):
    assert setup.cuda_architectures(environment) == architectures.split()


@pytest.mark.parametrize("variable", ["NEMO_EXT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
@pytest.mark.parametrize("name", ["8", "Hopper", "9.0+ptx", "sm_90", "90b"])
def test_the_name_of_no_architecture_is_an_error(setup, variable, name):
    with pytest.raises(SystemExit) as exit:
        setup.cuda_architectures({variable: f"8.0;{name}"})
    assert exit.value.code == (
        f"{variable} must name architectures like 80, 9.0 or 9.0+PTX, separated by ';', got '{name}'."
    )


def test_an_architecture_older_than_the_kernels_is_an_error(setup):
    with pytest.raises(SystemExit, match=r"NEMO_EXT_CUDA_ARCHS must name architectures of 80 or newer.* got '75'"):
        setup.cuda_architectures({"NEMO_EXT_CUDA_ARCHS": "75;80"})


def test_what_is_too_old_in_pytorchs_list_is_left_out_aloud(setup, capsys):
    assert setup.cuda_architectures({"TORCH_CUDA_ARCH_LIST": "7.5 8.0"}) == ["sm_80"]
    assert "7.5 of TORCH_CUDA_ARCH_LIST is left out, the kernels need 8.0 or newer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "variable"),
    [({"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST"), ({"NEMO_EXT_CUDA_ARCHS": ";"}, "NEMO_EXT_CUDA_ARCHS")],
)
def test_a_list_without_any_architecture_is_an_error(setup, environment, variable):
    with pytest.raises(SystemExit, match=f"{variable} must name an architecture of 8.0 or newer, got '"):
        setup.cuda_architectures(environment)


@pytest.mark.parametrize("command", [["g++"], ["g++", "-m64"], ["/usr/bin/ccache", "g++"]])
def test_nvcc_gets_the_compiler_without_its_launcher_and_options(setup, command):
    assert setup.host_compiler_of(command) == "g++"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_is_found_by_its_folder(setup, toolkit, variable):
    found = setup.find_toolkit({variable: str(toolkit)}, "c++", ["sm_80", "compute_80"])
    assert found.nvcc == str(toolkit / "bin" / "nvcc")
    assert found.version == "12.4.131"
    assert Path(found.runtime).samefile(toolkit / "lib" / "libcudart_static.a")


def test_a_toolkit_is_found_where_nvcc_on_the_path_is_a_wrapper_script(setup, toolkit, tmp_path):
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    found = setup.find_toolkit({"PATH": str(wrapper.parent)}, "c++", ["sm_90"])
    assert found.nvcc == str(wrapper)
    assert Path(found.runtime).samefile(toolkit / "lib" / "libcudart_static.a")


def test_a_toolkit_is_found_among_the_python_packages(setup, toolkit, tmp_path, monkeypatch):
    """Where `pip install nvidia-cuda-nvcc` puts it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "cu13").symlink_to(toolkit)
    assert str(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc") in setup.nvcc_candidates({"PATH": ""})


def test_a_toolkit_that_was_asked_for_is_not_replaced_by_another(setup, toolkit, tmp_path):
    with pytest.raises(setup.Unusable, match=f"{tmp_path}/bin/nvcc does not start"):
        setup.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(toolkit / "bin")}, "c++", ["sm_80"])


def test_the_first_usable_toolkit_is_taken(setup, toolkit, tmp_path, monkeypatch):
    nvcc = str(toolkit / "bin" / "nvcc")
    monkeypatch.setattr(setup, "nvcc_candidates", lambda environment: [str(tmp_path / "nvcc"), nvcc])
    assert setup.find_toolkit({}, "c++", ["sm_80"]).nvcc == nvcc


# What the toolkits of NVIDIA list, from sm_80 on.
KNOWN = {
    "11.8.89": "80 86 87 89 90",
    "12.4.131": "80 86 87 89 90",
    "12.6.85": "80 86 87 89 90",
    "12.8.93": "80 86 87 89 90 100 101 120",
    "13.0.88": "80 86 87 88 89 90 100 103 110 120 121",
}


def make_of_version(toolkit, version):
    nvcc = toolkit / "bin" / "nvcc"
    code, ptx = ("".join(f"{kind}_{number}\n" for number in KNOWN[version].split()) for kind in ("sm", "compute"))
    text = nvcc.read_text().replace("12.4.131", version)
    nvcc.write_text(text.replace("sm_80\nsm_90\n", code).replace("compute_80\ncompute_90\n", ptx))


@pytest.mark.parametrize("choice", ["auto", "1"])
@pytest.mark.parametrize(
    ("version", "unknown"),
    [("12.4.131", "sm_100 sm_120"), ("12.6.85", "sm_100 sm_120"), ("12.8.93", ""), ("13.0.88", "")],
)
def test_by_default_architectures_that_a_toolkit_does_not_know_are_left_out(setup, toolkit, choice, version, unknown):
    make_of_version(toolkit, version)
    environment = {"CUDA_HOME": str(toolkit), "NEMO_EXT_CUDA": choice}
    found = setup.find_toolkit(environment, "c++", setup.cuda_architectures(environment))
    assert found.unknown == unknown.split()
    assert found.architectures == [name for name in setup.cuda_architectures({}) if name not in found.unknown]
    assert "compute_80" in found.architectures
    without = f", which does not know {', '.join(found.unknown)}" if unknown else ""
    assert found.outcome() == f"compiled by nvcc {version}{without}"


def test_a_toolkit_that_cannot_compile_the_kernels_is_not_tried(setup, toolkit):
    make_of_version(toolkit, "11.8.89")
    with pytest.raises(setup.Unusable, match=r"nvcc is of CUDA 11\.8\.89, and the kernels need 12\.0 or newer$"):
        setup.find_toolkit({"CUDA_HOME": str(toolkit)}, "c++", ["sm_80"])


@pytest.mark.parametrize("variable", ["NEMO_EXT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
def test_architectures_that_were_named_are_left_out_only_if_kernels_need_not_be_there(setup, toolkit, variable):
    environment = {"CUDA_HOME": str(toolkit), variable: "9.0;12.0"}
    wanted = setup.cuda_architectures(environment)
    assert setup.find_toolkit(environment, "c++", wanted).architectures == ["sm_90"]
    with pytest.raises(setup.Unusable, match=r"nvcc is of CUDA 12\.4\.131, which does not know sm_120$"):
        setup.find_toolkit({**environment, "NEMO_EXT_CUDA": "1"}, "c++", wanted)


def test_a_toolkit_that_knows_no_architecture_is_told(setup, toolkit):
    with pytest.raises(setup.Unusable, match=r"nvcc is of CUDA 12\.4\.131, which does not know sm_100, sm_120$"):
        setup.find_toolkit({"CUDA_HOME": str(toolkit)}, "c++", ["sm_100", "sm_120"])


def test_a_toolkit_that_fails_is_told_with_its_own_words(setup, toolkit):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'nvcc fatal:\nplanted' >&2\nexit 1\n")
    with pytest.raises(setup.Unusable, match=r"nvcc --version fails \(nvcc fatal: planted\)"):
        setup.find_toolkit({"CUDA_HOME": str(toolkit)}, "c++", ["sm_80"])


@pytest.mark.parametrize("file", ["include/cuda_runtime.h", "lib/libcudart_static.a"])
def test_a_toolkit_without_the_runtime_is_told(setup, toolkit, file):
    (toolkit / file).unlink()
    with pytest.raises(setup.Unusable, match=f"the toolkit of {toolkit}/bin/nvcc has no {Path(file).name}"):
        setup.find_toolkit({"CUDA_HOME": str(toolkit)}, "c++", ["sm_80"])


def test_kernels_are_compiled_for_every_architecture_and_again_only_after_a_change(
    setup, toolkit, tmp_path, monkeypatch
):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    found = setup.find_toolkit({"CUDA_HOME": str(toolkit)}, "g++", ["sm_90"])

    def compile(*architectures):
        wanted = found._replace(architectures=list(architectures))
        assert setup.compile_kernels(wanted, "g++", tmp_path / "build").exists()
        return (toolkit / "log").read_text().splitlines()

    (command,) = compile("sm_80", "sm_90", "compute_80")
    assert "-ccbin g++ " in command
    for flag in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_80,code=compute_80"):
        assert f"-gencode=arch={flag} " in command
    assert len(compile("sm_80", "sm_90", "compute_80")) == 1
    with (tmp_path / "csrc" / "math.h").open("a") as header:
        header.write("// changed\n")
    assert len(compile("sm_80", "sm_90", "compute_80")) == 2
    assert len(compile("sm_80", "sm_90")) == 3
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert len(compile("sm_80", "sm_90")) == 4


def build_extensions(tmp_path, **environment):
    return python(["setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path], ROOT, **environment)


@pytest.mark.slow
def test_a_build_that_must_have_cuda_kernels_says_what_is_missing(tmp_path):
    result = build_extensions(tmp_path, NEMO_EXT_CUDA="1", NEMO_EXT_CUDA_ARCHS="80", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert f"NEMO_EXT_CUDA=1 needs a CUDA toolkit for sm_80, and found none: {tmp_path}/bin/nvcc" in result.stderr
    assert "Set CUDA_HOME to the folder of one" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_what_nvcc_has_to_say_is_shown(tmp_path, toolkit):
    (toolkit / "broken").touch()
    result = build_extensions(tmp_path, NEMO_EXT_CUDA="auto", NEMO_EXT_CUDA_ARCHS="80", CUDA_HOME=str(toolkit))
    assert result.returncode != 0
    assert "value_projection.cu(1): error: planted" in result.stderr
    assert "nvcc 12.4.131 could not compile csrc/cuda/value_projection.cu, its messages are above" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_source_distribution_is_complete_and_installs_without_a_cuda_toolkit(tmp_path):
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    assert python(["-c", build], ROOT).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    suffixes = (".h", ".cpp", ".cuh", ".cu")
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes} <= names
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".md")}
    assert "examples/demo_model/README.md" in examples
    assert examples <= names

    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--verbose", "--target", site, archive]
    result = python(install, tmp_path, NEMO_EXT_CUDA="auto", NEMO_EXT_CUDA_ARCHS="", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"nemo_ext: CUDA kernels left out: {tmp_path}/bin/nvcc does not start" in result.stderr
    program = "import nemo_ext.ops, torch; print(nemo_ext.ops.__file__, torch.ops.nemo_ext.value_projection)"
    result = python(["-c", program], tmp_path, PYTHONPATH=str(site))
    assert result.stdout.startswith(str(site)), result.stderr
    assert {path.name for path in (site / "nemo_ext").glob("*.so")} == {"_C.abi3.so", "_module.abi3.so"}
    assert (site / "nemo_ext" / "py.typed").exists()
    # How the bundled model was made stays in the sources.
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} <= {"nemo_ext", "bin"}
    of_demo = {"__init__.py", "captions.py", "planted.py", "run.py"}
    assert {path.name for path in (site / "nemo_ext" / "demo").glob("*.py")} == of_demo
    assert (site / "nemo_ext" / "demo" / "model" / "carriers.json").exists()


def test_info_asks_the_driver_itself_which_cuda_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through a private function of PyTorch, which some versions don't have."""

    class Driver:
        @staticmethod
        def cuDriverGetVersion(version: object) -> int:
            version._obj.value = 12040  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(info.ctypes, "CDLL", lambda name: {"libcuda.so.1": Driver()}[name])
    assert info.cuda_of_driver() == (12, 4)


def test_info_tells_a_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> object:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(info.ctypes, "CDLL", missing)
    assert info.cuda_of_driver() == (0, 0)
