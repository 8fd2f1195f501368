"""Every stage of `make gpu` without a GPU: its Python runs on the simulator, on `meta` or on the CPU, so that nothing
fails on a rented machine for a reason that can be seen here.

    python bench/gpu_dryrun.py [STAGE ...]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu

ROOT = Path(__file__).parents[1]
SIMULATOR = ROOT / "tests" / "native" / "kernels"
BENCH_ONLY = {"score_kernel", "merge_kernel"}  # which the sanitizer sees in bench_cuda
# What asks for the card itself, and what is too long for the simulator.
LEFT_OUT = (
    "large_head", "exactly_one", "never_waits", "graph", "within_the_workspace", "length_limit", "few_inputs",
    "side_stream", "another_stream", "each_kernel", "full_arena", "retain", "before_any_work",
)  # fmt: skip


def call(command: list[str], **environment: str) -> str:
    tree = [str(ROOT / "python")] if (ROOT / "python/longgrpo/_cpu.so").is_file() else []  # else what is installed
    path = [*tree, str(ROOT / "tests"), str(SIMULATOR), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def simulated(*arguments: str) -> str:
    command = gpu.python("-m", "pytest", "-q", "-n", "0", "-p", "simulated_plugin", "-p", "no:cacheprovider")
    return call([*command, "-W", "ignore", "--simulated-examples", "5", *arguments], LONGGRPO_GPU_TESTS_ON="cpu")


def build(results: Path) -> str:
    """Every file that it names is there; compiling is tests/native/kernels/test_machine_code.py's and the wheel's."""
    needed = [
        ROOT / "CMakeLists.txt",
        ROOT / "scripts/architecture.sh",
        ROOT / "bench/cuda.cu",
        ROOT / "bench/cublas.py",
    ]
    for path in needed:
        assert path.is_file(), path
    return f"{len(needed)} files"


def test(results: Path) -> str:
    return simulated("tests/gpu", "-k", " and ".join(f"not {name}" for name in LEFT_OUT))


def sanitize(results: Path) -> str:
    """Whether the cases launch every kernel of csrc/cuda."""
    names = results / "launched"
    simulated("tests/gpu/test_each_kernel.py", "--simulated-launched", str(names))
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    kernels = set(re.findall(r'launch\("(\w+)"', sources))
    unseen = kernels - set(names.read_text().split()) - BENCH_ONLY
    if unseen or not kernels > BENCH_ONLY:
        sys.exit(f"compute-sanitizer would not see {', '.join(sorted(unseen))}: tests/gpu/test_each_kernel.py")
    return f"{len(kernels)} kernels, each launched"


def bench(results: Path) -> str:
    """Its options are those that bench/cuda.cu knows."""
    known = set(re.findall(r'"(--\w+)"', (ROOT / "bench/cuda.cu").read_text()))
    given = {
        word for command in (*gpu.bench(results), *gpu.sanitize(results)[1::2]) for word in command_options(command)
    }
    if unknown := given - known:
        sys.exit(f"bench_cuda does not know {', '.join(sorted(unknown))}")
    return f"{len(given)} options of bench_cuda"


def command_options(command: list[str]) -> list[str]:
    """The options after the binary."""
    at = next(i for i, word in enumerate(command) if word.endswith("bench_cuda"))
    return [word for word in command[at:] if word.startswith("--")]


def on_cpu(command: list[str]) -> list[str]:
    return [{"cuda": "cpu"}.get(word, word) for word in command]


def peers(results: Path) -> str:
    (command,) = gpu.peers(results)
    return call([*on_cpu(command), "--quick"])


def step(results: Path) -> str:
    (command,) = gpu.step(results)
    return call([*command, "--dry-run", "--tokens", "256", "--layers", "1"])


def autotune(results: Path) -> str:
    (command,) = gpu.autotune(results)
    return call([*command, "--dry-run"])


def train(results: Path) -> str:
    (command,) = gpu.train(results)
    return call([*command, "--dry-run"])


STAGES: dict[str, Callable[[Path], str]] = {
    "build": build, "test": test, "sanitize": sanitize, "bench": bench, "peers": peers, "step": step,
    "autotune": autotune, "train": train,
}  # fmt: skip


def main() -> None:
    assert list(STAGES) == list(gpu.STAGES)
    for name in sys.argv[1:] or STAGES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as results:
            last = STAGES[name](Path(results))
        print(f"{name}: {last} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
