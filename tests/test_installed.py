"""Tests refuse a build that is not of this tree: told apart by content, on trees and builds that are made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import installed
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"CMakeLists.txt": "project(x)", "csrc/math/loss.h": "ratio * advantage", "csrc/ops/loss.cpp": "register"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def lay_build(root: Path, package: Path) -> None:
    """A library in `package`, with the manifest that CMake writes of the sources in `root`."""
    (package / "_cpu.so").write_bytes(b"")
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("needs cmake")
    script = ROOT / "csrc" / "manifest.cmake"
    subprocess.run([cmake, "-D", f"ROOT={root}", "-D", f"OUT={package / installed.MANIFEST}", "-P", script], check=True)


@pytest.fixture
def tree(tmp_path):
    """A source tree with an up-to-date build in python/longgrpo."""
    root = tmp_path / "tree"
    write(root, SOURCES | {"python/longgrpo/__init__.py": "", "python/longgrpo/loss/grpo.py": "one"})
    lay_build(root, root / "python" / "longgrpo")
    return root


@pytest.fixture
def wheel(tree, tmp_path):
    """The same, installed."""
    return Path(shutil.copytree(tree / "python" / "longgrpo", tmp_path / "site-packages" / "longgrpo"))


def test_a_build_of_this_tree_is_tested(tree, wheel):
    assert installed.problem(tree / "python" / "longgrpo", tree) is None
    assert installed.problem(wheel, tree) is None


def test_a_checkout_makes_no_build_old(tree):
    """git gives the files that it writes a new time, whatever they held before."""
    for name in SOURCES:
        os.utime(tree / name, (2**32, 2**32))
    assert installed.problem(tree / "python" / "longgrpo", tree) is None


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("gone", [False, True], ids=["edited", "removed"])
def test_a_source_that_was_edited(tree, wheel, name, gone):
    (tree / name).unlink() if gone else (tree / name).write_text("edited")
    for package, remedy in ((tree / "python" / "longgrpo", "run make dev"), (wheel, "or make setup (the wheel)")):
        problem = installed.problem(package, tree)
        assert f"the compiled part in {package} is older than {name}: " in problem
        assert problem.endswith(remedy)


def test_several_sources_make_one_line(tree):
    write(tree, {name: "edited" for name in SOURCES})
    problem = installed.problem(tree / "python" / "longgrpo", tree)
    assert " and 2 more: run make dev" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("edit", ["edited", "new", "removed"])
def test_an_edit_in_python_makes_the_wheel_old_and_not_the_editable_package(tree, wheel, edit):
    path = tree / "python/longgrpo/loss" / ("new.py" if edit == "new" else "grpo.py")
    path.unlink() if edit == "removed" else path.write_text("two")
    assert installed.problem(tree / "python" / "longgrpo", tree) is None
    problem = installed.problem(wheel, tree)
    assert f"imported from {wheel}, which differs from this tree in python/longgrpo/loss/{path.name}" in problem


def test_what_is_missing_is_named(tree):
    package = tree / "python" / "longgrpo"
    (package / installed.MANIFEST).unlink()
    assert "nothing says what" in installed.problem(package, tree)
    (package / "_cpu.so").unlink()
    assert "has no compiled part: run make dev" in installed.problem(package, tree)
    assert "not installed" in installed.problem(None, tree)


def test_pytest_stops_before_the_first_test(tmp_path):
    """The whole way, in a copy of this tree with one test of its own."""
    for name in ("python", "csrc", "third_party", "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        write(tmp_path, {name: (ROOT / name).read_text()})
    write(tmp_path, {"tests/test_one.py": "def test_one(): pass"})

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_one.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "1 passed" in run().stdout
    with (tmp_path / "CMakeLists.txt").open("a") as file:
        file.write("# edited")
    done = run()
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is older than CMakeLists.txt: run make dev" in done.stderr
    assert "passed" not in done.stdout
