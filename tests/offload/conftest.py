import os
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import ROOT, build, load

CORE = ("engine.cpp", "arena.cpp", "host_backend.cpp")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:offload. a saved tensor of shape:UserWarning")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are tiny; a team of threads would only wait for each other."""
    set_threads(1)


def compile_stress(root: Path, into: Path, *flags: str, reuse: Path | None = None) -> Path:
    """Builds the stress program of the tree `root`. Objects of unchanged sources are taken from `reuse`."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if cxx is None:
        pytest.skip("needs a C++ compiler")
    into.mkdir(parents=True, exist_ok=True)

    def unchanged(path: Path) -> bool:
        return path.read_bytes() == (ROOT / path.relative_to(root)).read_bytes()

    core, objects, jobs = root / "csrc" / "offload", [], []
    for source in [*(core / name for name in CORE), root / "tests" / "native" / "offload" / "stress.cpp"]:
        ours = into / f"{source.stem}.o"
        if reuse is not None and unchanged(source) and all(map(unchanged, core.glob("*.h"))):
            ours = reuse / ours.name
        else:
            command = [cxx, "-std=c++20", "-g", "-Wall", "-Wextra", *flags, f"-I{core}", "-c", source, "-o", ours]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(ours)
    for job in jobs:
        _, error = job.communicate()
        assert job.returncode == 0, error
    subprocess.run([cxx, *flags, *objects, "-pthread", "-o", into / "stress"], check=True)
    return into / "stress"


@pytest.fixture(scope="session")
def native():
    """The torch-free core as a Python module; see tests/native/offload/module.cpp."""
    folder = ROOT / "build" / "native" / "offload"
    return load(build(ROOT / "tests" / "native" / "offload", folder, "-DCMAKE_BUILD_TYPE=Release"))
