"""The wheel as a user gets it: alone outside the source tree, beside any torch and Python of its declared range."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import longgrpo
from testing import ROOT


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("longgrpo-*.whl"))
    assert wheels, "no wheel in dist/: run make wheel"
    return wheels[-1]


def test_the_tests_run_on_the_installed_wheel():
    assert ROOT / "python" not in Path(longgrpo.__file__).parents, "these are the wheel's tests: run make test"


def test_one_wheel_for_every_python(wheel):
    assert "-py3-none-manylinux_2_" in wheel.name


def test_the_tag_holds(wheel):
    """auditwheel's own judgment of what the libraries ask of the system; torch comes with torch."""
    show = [sys.executable, "-m", "auditwheel", "show", wheel]
    verdict = " ".join(subprocess.run(show, check=True, capture_output=True, text=True).stdout.split())
    tag = re.search(r"manylinux_2_\d+_\w+", wheel.name)[0]
    assert f'constrains the platform tag to "{tag}"' in verdict
    assert int(re.search(r"manylinux_2_(\d+)", tag)[1]) <= 34, "RHEL 9 has glibc 2.34"


def test_the_wheel_is_complete(wheel):
    """Both libraries where nvcc was found, type information and the license; and nothing that belongs elsewhere."""
    names = zipfile.ZipFile(wheel).namelist()
    uplot = {f"longgrpo/report/third_party/uplot/{name}" for name in ("uPlot.iife.min.js", "uPlot.min.css", "LICENSE")}
    parts = ("page.html", "page.css", "base.js", "lines.js", "zoom.js", "charts.js", "replies.js", "page.js")
    page = {f"longgrpo/report/{name}" for name in parts}
    wanted = (
        {"longgrpo/_cpu.so", "longgrpo/py.typed"}
        | page
        | uplot
        | ({"longgrpo/_cuda.so"} if shutil.which("nvcc") else set())
    )
    assert wanted <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"longgrpo"}


def test_works_outside_the_source_tree(wheel, tmp_path):
    """Installed alone into an empty directory; only torch comes from the environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True
    )
    code = """
import sys
sys.path[:0] = sys.argv[1:]
import torch, longgrpo
assert longgrpo.__file__.startswith(sys.argv[1]), longgrpo.__file__
hidden = torch.randn(6, 8, requires_grad=True)
loss = longgrpo.linear_grpo_loss(hidden, torch.randn(50, 8), torch.arange(6), torch.ones(6)).loss
loss.backward()
print(hidden.grad.abs().sum().item() > 0)
"""
    run = subprocess.run(  # -S: an editable longgrpo, which would come first, is not seen
        [sys.executable, "-I", "-S", "-c", code, tmp_path / "site", sysconfig.get_path("purelib")],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout.strip() == "True"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_abi_is_stable():
    """No unstable libtorch symbol, and nothing newer than the torch that the wheel promises."""
    library = Path(longgrpo.__file__).parent / "_cpu.so"
    audit = Path(sys.executable).parent / "torch-abi-audit"
    run = subprocess.run([audit, "--json", library], check=True, capture_output=True, text=True)
    (report,) = json.loads(run.stdout)["bundled_libs"]
    assert report["torch"]["stable"]
    assert report["torch"]["unstable_symbols"] == []
    assert tuple(map(int, report["torch"]["min_torch_version"].split("."))) <= (2, 11, 0)
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
