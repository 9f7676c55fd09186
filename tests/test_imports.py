"""How the packages may import each other, and what no file of the repository may hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = {"prune", "interpret", "difftest"}
MAY_IMPORT = {
    "nnslicer_jax": {"nnslicer_jax"},
    **{name: {name, "nnslicer_jax"} for name in MIDDLE},
    "experiments": {"experiments", "nnslicer_jax", *MIDDLE},
}
MODULES = sorted(
    path.relative_to(ROOT) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
)


def imported(tree):
    """Names of every module a syntax tree imports; relative ones keep their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            separator = "" if module.endswith(".") else "."
            yield from (f"{module}{separator}{alias.name}" for alias in node.names)


def faults(package, source):
    """What is wrong with a module of one package, as texts."""
    tree = ast.parse(source)
    ours = {*MAY_IMPORT, "tests"}
    found = []
    for name in imported(tree):
        top = name.split(".")[0]
        if name.startswith(".."):
            # Two dots may leave a package; the absolute name says where to.
            found.append(f"imports {name}, not an absolute name")
        if top in ours and top not in MAY_IMPORT[package]:
            found.append(f"imports {name}")
        if f"{name}.".startswith("jax._src."):
            found.append(f"imports {name}, which is private to JAX")
    if not ast.get_docstring(tree):
        found.append("has no docstring")
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_keeps_to_its_place(path):
    assert faults(path.parts[0], (ROOT / path).read_text(encoding="utf-8")) == []


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for path in MODULES if drawers & {path.stem, *path.parts[:-1]}] == []


@pytest.mark.parametrize(
    ("package", "source", "fault"),
    [
        ("nnslicer_jax", "import prune.masks", "imports prune.masks"),
        ("nnslicer_jax", "def f():\n    from experiments import x", "imports experiments"),
        ("prune", "from interpret.cdrp import route", "imports interpret.cdrp"),
        ("difftest", "import tests", "imports tests"),
        ("prune", "from jax import _src", "private to JAX"),
        ("prune", "import jax._src.core as core", "private to JAX"),
        ("interpret", "from ... import prune", "not an absolute name"),
        ("experiments", "x = 1", "no docstring"),
    ],
)
def test_the_check_finds(package, source, fault):
    assert any(fault in text for text in faults(package, source))


def test_the_check_admits_the_right_way():
    source = '"""A study."""\nimport jax\nfrom jax import numpy\nimport prune, nnslicer_jax as nns'
    assert faults("experiments", source) == []


def test_packages_import_from_the_root_of_a_clone():
    code = (
        "import importlib, pathlib, sys\n"
        f"for name in {sorted(MAY_IMPORT)!r}:\n"
        "    print(pathlib.Path(importlib.import_module(name).__file__).parents[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == [str(ROOT)] * len(MAY_IMPORT)


def test_studies_import_side_by_side():
    # Flags of the same name, defined while a module is imported, collide in one process.
    studies = [f"experiments.{path.stem}" for path in MODULES if path.parts[0] == "experiments"]
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(studies)}; print('all')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


@pytest.mark.slow
def test_packages_import_after_installation(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    # The environment that runs the tests holds the dependencies; the new one borrows them.
    libraries = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site,) = (tmp_path / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(libraries), encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT]
    subprocess.run(install, check=True)
    code = f"import {', '.join(sorted(MAY_IMPORT))}; print(interpret.__file__)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "interpret" / "__init__.py"


def repository_files():
    """Every text file of the repository: tracked, or new and not ignored."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: the files of the repository are not known")
    for name in filter(None, done.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Built from pieces, so that this file holds none of what it looks for.
HOMES = "|".join(("root", r"home/\w+", r"Users/\w+", "work", r"tmp/\w+"))
FORBIDDEN = {
    "a folder of one machine": re.compile(rf"(?<![\w.~}}\-])/(?:{HOMES})\b"),
    "an e-mail address": re.compile(r"[\w.+-]+" + "@" + r"[\w-]+(\.[\w-]+)*\.[a-z]{2,}\b"),
    "a package registry": re.compile("(find-links|index-url)" + r"[ =]"),
}


def test_no_file_names_a_machine_or_a_person():
    found = [
        f"{name}: {what}: {match.group()}"
        for name, text in repository_files()
        for what, pattern in FORBIDDEN.items()
        if (match := pattern.search(text))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("open('" + "/" + "home/ann/x.npy')", "a folder of one machine"),
        ("see " + "/" + "root/data", "a folder of one machine"),
        ("ann" + "@" + "example.org", "an e-mail address"),
        ("pip install --index" + "-url=x", "a package registry"),
    ],
)
def test_the_patterns_find(text, what):
    assert [name for name, pattern in FORBIDDEN.items() if pattern.search(text)] == [what]


def test_the_patterns_leave_code_alone():
    assert not any(
        pattern.search("y = a @ b.T  # images/work, ../shared, {root}/work, https://x.org/home")
        for pattern in FORBIDDEN.values()
    )
