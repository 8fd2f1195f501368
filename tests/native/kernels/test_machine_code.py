"""What the compiler made of the kernels: no spills, no local memory, 16-byte loads. Needs nvcc, no GPU."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simulated import ROOT

KERNELS = ROOT / "csrc" / "cuda"
SOURCES = ("rows", "flash", "matrix", "score", "token_loss")
ARCHITECTURES = ("80", "90a")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def disassembler() -> str:
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs nvdisasm (requirements/cuda-test.txt)")
    return str(next(f.locate() for f in files if f.name == "nvdisasm"))


@functools.cache
def compiled(architecture: str, into: Path) -> dict[str, tuple[str, str]]:
    """Source -> (the assembler's report, machine code)."""

    def one(source: str) -> tuple[str, str]:
        cubin = into / f"{source}.{architecture}.cubin"
        report = subprocess.run(
            ["nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", "-cubin", f"-gencode=arch=compute_{architecture},"
             f"code=sm_{architecture}", KERNELS / f"{source}.cu", "-o", cubin],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert report.returncode == 0, report.stderr
        code = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout
        return report.stderr, code

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(one, SOURCES), strict=True))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request, tmp_path_factory):
    return compiled(request.param, tmp_path_factory.getbasetemp())


def functions(disassembly: str) -> dict[str, list[str]]:
    """Mangled kernel -> its instructions."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),", disassembly, flags=re.M)[1:]
    return {
        name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", body, flags=re.M)
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(code, source):
    report = code[source][0]
    assert re.findall(r"(\d+) bytes spill stores", report), report
    for pattern in (r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"):
        assert set(re.findall(pattern, report)) == {"0"}, report


@pytest.mark.parametrize("source", SOURCES)
def test_no_local_memory(code, source):
    for name, instructions in functions(code[source][1]).items():
        assert len(instructions) > 20, name
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], name


ROWS = [("rows", "row_kernel"), ("flash", "chunk_kernel"), ("flash", "weight_rows_kernel")]


@pytest.mark.parametrize(("source", "kernel"), ROWS)
def test_rows_are_read_in_16_bytes(code, source, kernel):
    kernels = {k: v for k, v in functions(code[source][1]).items() if kernel in k}
    assert kernels
    for name, instructions in kernels.items():
        wide = [i for i in instructions if re.search(r"\bLDG\.E(\.\w+)*\.128\b", i)]
        assert len(wide) >= 4, name


def test_scoring_runs_on_the_tensor_cores(code):
    """64 products and 16 ldmatrix a step; copies are asynchronous where rows lie on 16 bytes; two blocks fit."""
    kernels = {k: v for k, v in functions(code["score"][1]).items() if "score_kernel" in k}
    assert len(kernels) == 8
    for name, instructions in kernels.items():
        count = {word: sum(word in i for i in instructions) for word in ("HMMA.16816.F32", "LDSM", "LDGSTS")}
        assert count["HMMA.16816.F32"] == 64, name
        assert count["LDSM"] == 16, name
        wide = name.endswith("ELb1EEEvNS_9ScoreTileEii")
        assert (count["LDGSTS"] >= 8) is wide, name
        assert not wide or not [i for i in instructions if "LDGSTS" in i and ".128" not in i], name
    report = re.findall(r"score_kernel\S+' for '\S+'\n.*\n.*\n?.*Used (\d+) registers", code["score"][0])
    registers = 65_536
    assert len(report) == 8, code["score"][0]
    assert all(2 * 128 * -(-int(used) // 8) * 8 <= registers for used in report)


@pytest.mark.parametrize(("source", "kernel"), ROWS)
def test_a_multiprocessor_holds_several_blocks(code, source, kernel):
    """1024 threads of the row kernels, whose blocks have 256 or 512: one block's barrier is hidden by another. 512 of
    the one with a bias or soft cap and a gradient beyond logp's, which spills into local memory otherwise."""
    used = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", code[source][0], flags=re.S)
    used = [(name, int(registers)) for name, registers in used if kernel in name]
    assert used
    for name, registers in used:
        threads = int(re.findall(r"Li(\d+)E", name)[-1])
        assert threads in (256, 512), name
        per_warp = -(-registers // 8) * 8 * 32  # a warp takes registers in units of 256
        wanted = 512 if re.search(r"row_kernelI.*Lb1ELb1ELi", name) else 1024
        assert 65536 // (per_warp * threads // 32) >= wanted // threads, (name, registers)
