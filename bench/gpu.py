"""`make gpu`: builds for the card that is here, tests, measures. Downloads nothing.

    make gpu PYTHON=/path/to/python [STAGE="build test"] [RESULTS=directory] [WHEELS=directory]

Stages, of at most five minutes each: build test sanitize bench peers step autotune train; all of them by default. What
is missing for one is said at once. Each writes RESULTS/STAGE.log as it goes and ends with one line; RESULTS/record.json
holds what all stages so far have found. WHEELS holds the wheels of the peers (trl, liger-kernel, ...) and of vLLM for
CUDA, which are unpacked into build/gpu. Needs torch >= 2.11 (CUDA), nvcc, cmake >= 3.31, ninja and pytest; no git.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
UNPACKED = BUILD / "wheels"
SECONDS = 300  # of a stage
TOOLS = ("memcheck", "racecheck")
NOTHING_FAILED = ("passed", "skipped")


@dataclass(frozen=True)
class Stage:
    """tools, modules: without these it cannot run. optional: a wheel that it is about, and is skipped without."""

    tools: Sequence[str]
    modules: Sequence[str]
    commands: Callable[[Path], list[list[str]]]
    optional: str | None = None


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def build(results: Path) -> list[list[str]]:
    return [
        ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         "-DLONGGRPO_BENCH_CUDA=ON", f"-DLONGGRPO_CUDA_ARCHITECTURES={architecture()}"],
        ["cmake", "--build", str(BUILD)],
        python(Path(__file__).resolve(), "--install"),
    ]  # fmt: skip


def test(results: Path) -> list[list[str]]:
    return [python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", f"--junitxml={results}/tests.xml")]


def sanitize(results: Path) -> list[list[str]]:
    """tests/gpu/test_each_kernel.py launches every kernel but those of bench_cuda's scoring."""
    cases = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_each_kernel.py")
    score = bench_cuda("--tokens", "64", "--hidden", "128", "--vocabulary", "2000", "--workspace", "16")
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    return [[*sanitizer, tool, *command] for tool in TOOLS for command in (cases, score)]


def bench(results: Path) -> list[list[str]]:
    return [
        bench_cuda("--workspace", workspace, "--json", results / "cases.jsonl", "--about",
                   f'"workspace_mib": {workspace}', *candidates)
        for workspace, candidates in ((256, ("--candidates", 4)), (1024, ()))
    ]  # fmt: skip


def bench_cuda(*arguments: object) -> list[str]:
    """torch's cuBLAS wants the cuBLASLt beside it, and not the toolkit's: bench/cublas.py says which that is."""
    return python("bench/cublas.py", BUILD / "bench_cuda", *arguments)


def peers(results: Path) -> list[list[str]]:
    options = ("--device", "cuda", "--targets", "--no-memory", "--seconds", 3, "--rounds", 5)
    return [python("bench/peers.py", *options, "--json", results / "peers.jsonl")]


def step(results: Path) -> list[list[str]]:
    return [python("bench/step.py", "--json", results / "step.jsonl")]


def autotune(results: Path) -> list[list[str]]:
    return [python("bench/autotune.py", "--json", results / "autotune.jsonl")]


def train(results: Path) -> list[list[str]]:
    return [python("bench/gpu_train.py", "--json", results / "train.jsonl")]


TRAINER = ("transformers", "peft", "pydantic", "yaml")
STAGES = {
    "build": Stage(("nvcc", "cmake", "ninja"), ("torch",), build),
    "test": Stage((), ("torch", "pytest"), test),
    "sanitize": Stage(("compute-sanitizer",), ("torch", "pytest"), sanitize),
    "bench": Stage((), ("torch",), bench),
    "peers": Stage((), ("torch",), peers),
    "step": Stage((), ("torch", *TRAINER), step),
    "autotune": Stage((), ("torch",), autotune),
    "train": Stage((), ("torch", *TRAINER), train, optional="vllm"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--install", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.install:
        return install()
    if unknown := [name for name in options.stages if name not in STAGES]:
        return refuse(f"there is no stage {', '.join(unknown)}: the stages are {' '.join(STAGES)}")
    wanted = options.stages or list(STAGES)
    if options.wheels and not options.wheels.is_dir():
        return refuse(f"{options.wheels} is no directory: WHEELS names the folder of the wheels")
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    if not shutil.which("nvidia-smi"):
        return refuse("no nvidia-smi: make gpu needs an NVIDIA GPU")
    lacking = {name: text for name in wanted if (text := missing(STAGES[name], wheels))}
    for name, text in lacking.items():
        print(f"longgrpo: {name} cannot run here: {text}", file=sys.stderr, flush=True)
    card = query("name")
    results = options.results or ROOT / "bench" / "results" / f"{card.replace(' ', '-')}-{time.strftime('%Y-%m-%d')}"
    results.mkdir(parents=True, exist_ok=True)
    unpack(wheels)
    os.chdir(ROOT)
    statuses = [run_stage(name, STAGES[name], results.absolute(), lacking.get(name), wheels) for name in wanted]
    return 0 if all(status in NOTHING_FAILED for status in statuses) else 1


def refuse(text: str) -> int:
    print(f"longgrpo: {text}", file=sys.stderr)
    return 2


def missing(stage: Stage, wheels: Sequence[Path]) -> str:
    """What a stage cannot do without; nothing is imported."""
    there = {wheel.name.partition("-")[0].lower() for wheel in wheels}
    tools = [tool for tool in stage.tools if not shutil.which(tool)]
    modules = [name for name in stage.modules if not importlib.util.find_spec(name) and name not in there]
    lines = [f"no {tool} on PATH" for tool in tools] + [f"{sys.executable} has no {name}" for name in modules]
    return ", ".join(lines)


def unpack(wheels: Sequence[Path]) -> None:
    """Onto the path as they are: a wheel is an archive of its packages."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(UNPACKED)


def run_stage(name: str, stage: Stage, results: Path, lacking: str | None, wheels: Sequence[Path] = ()) -> str:
    """Runs a stage, within SECONDS, prints its one line, and writes the record anew."""
    print(f"==> {name}", flush=True)
    start, last, status = time.monotonic(), "", "passed"
    if stage.optional and not any(wheel.name.startswith(f"{stage.optional}-") for wheel in wheels):
        status, last = "skipped", f"no {stage.optional} wheel"
    elif lacking:
        status, last = "failed", lacking
    else:
        for old in results.glob(f"{OUTPUTS.get(name, name)}.*"):
            old.unlink()
        with (results / f"{name}.log").open("w") as log:
            for command in stage.commands(results):
                code, last = call(command, log, SECONDS - (time.monotonic() - start))
                status = status if code == 0 else "failed"
                if code is None:
                    last = f"stopped after {SECONDS} seconds; before that: {last}"
                    break
                if code and name == "build":
                    break
    line = f"==> {name}: {status}: {last}" if status == "skipped" else (
        f"==> {name}: {status}, {time.monotonic() - start:.0f} s: {last}"
    )  # fmt: skip
    print(line, flush=True)
    with (results / "stages.jsonl").open("a") as file:
        seconds = round(time.monotonic() - start, 1)
        file.write(json.dumps({"stage": name, "status": status, "seconds": seconds, "last": last}) + "\n")
    record(results)
    return status


OUTPUTS = {"bench": "cases", "test": "tests"}  # where a stage writes if not under its own name


def call(command: Sequence[str], log: object, seconds: float) -> tuple[int | None, str]:
    """(exit status, or None if its time was over; the last line that it printed)."""
    log.write(f"$ {' '.join(command)}\n")
    path = [str(ROOT / "python"), str(UNPACKED), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # fp32 is fp32, in the peers too
        "LONGGRPO_GPU_SECONDS": str(max(0.0, seconds - 30)),
    }  # fmt: skip
    environment.pop("NVIDIA_TF32_OVERRIDE", None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(1.0, seconds), stop)
    timer.start()
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        last = line.strip() or last
        for stream in (sys.stdout, log):
            stream.write(line)
            stream.flush()
    code = process.wait()
    timer.cancel()
    return (None if over.is_set() else code), last


def install() -> int:
    """What was built goes beside the Python that uses it."""
    if not (BUILD / "_cuda.so").is_file():
        return refuse("cmake left the CUDA part out, which takes cmake >= 3.31 (pip install cmake) and nvcc >= 13")
    for name in ("_cpu.so", "_cuda.so", "_sources.sha256"):
        shutil.copy(BUILD / name, ROOT / "python" / "longgrpo" / name)
    print(f"built for {architecture()}")
    return 0


def architecture() -> str:
    return subprocess.run(
        ["scripts/architecture.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def query(what: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def record(results: Path) -> None:
    """RESULTS/record.json: the card, and what every stage has left."""
    whole: dict[str, object] = {
        "card": query("name"), "driver": query("driver_version"), "python": sys.version.split()[0],
        "torch": importlib.metadata.version("torch"),  # with its CUDA: 2.13.0+cu130
    }  # fmt: skip
    if shutil.which("git"):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        whole["commit"] = found.stdout.strip() or None
    for path in sorted(results.glob("*.jsonl")):
        whole[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    (results / "record.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
