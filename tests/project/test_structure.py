"""The structure that CONTRIBUTING.md describes is the one that the files have, and imports go one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemo_ext"


def structure() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text().split("## Structure")[1].split("\n## ")[0]


def rows() -> list[list[str]]:
    """For each row of the map the paths that it names; `a.py` after `folder/b.py` is `folder/a.py`."""
    found = []
    for line in structure().splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else []
        folder = names[0].rpartition("/")[0] if names else ""
        found.append([name if "/" in name else f"{folder}/{name}" for name in names])
    return [row for row in found if row]


def test_every_path_of_the_map_exists() -> None:
    for row in rows():
        for name in row:
            assert (ROOT / name).exists(), name


def test_every_module_of_the_package_is_in_the_map() -> None:
    """A folder stands in the first column, and its modules in the second."""
    described = structure()
    named = {name.rstrip("/") for row in rows() for name in row}
    for path in sorted(PACKAGE.iterdir()):
        if path.suffix == ".py" and not path.stem.startswith("__"):
            assert f"nemo_ext/{path.name}" in named, path.name
        if (path / "__init__.py").exists():
            assert f"nemo_ext/{path.name}" in named, path.name
            if path.name not in ("commands", "demo"):  # "one file for each command", and data
                for module in sorted(path.glob("*.py")):
                    assert module.stem == "__init__" or f"`{module.name}`" in described, f"{path.name}/{module.name}"


def test_no_module_of_the_package_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_tests_lie_in_folders_like_the_package() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} - {"tests"}
    assert folders - {path.name for path in PACKAGE.iterdir()} == {"kernels", "ops", "project"}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions; types alone do not count."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nemo_ext"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("nemo_ext")}
        todo += ast.iter_child_nodes(node)
    return names


def modules() -> dict[str, Path]:
    files = [
        path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE / "commands"
    ]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def test_imports_make_no_circle() -> None:
    known = modules()
    TopologicalSorter({name: imports(path) & known.keys() - {name} for name, path in known.items()}).prepare()


def test_nothing_imports_what_is_above_it() -> None:
    """The order of CONTRIBUTING.md's "Calls go one way"."""
    sentence = structure().split("Calls go one way: ")[1].split(".")[0]
    levels = [re.split(r",\s*", level.strip()) for level in sentence.replace("\n", " ").split("→")]
    level_of = {name: number for number, names in enumerate(levels) for name in names}
    for name, path in modules().items():
        part = name.split(".")[1] if "." in name else ""
        for imported in imports(path):
            other = imported.split(".")[1] if "." in imported else ""
            if part in level_of and other in level_of:
                assert level_of[part] <= level_of[other], f"{name} imports {imported}"
