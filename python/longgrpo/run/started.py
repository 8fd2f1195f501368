"""When, where and by which command a run was started: a comment of its config.yaml for each process that worked on it.

# started: {"at": "2026-11-30T09:12:05+00:00", "step": 0, "command": "longgrpo train my.yaml", "commit": "4be1...", ...}
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from longgrpo.config.run import TrainConfig, dump_config
from longgrpo.memory.cards import GIB
from longgrpo.run.files import write_file
from longgrpo.run.summary import versions

MARK = "# started: "
LONGEST = 2000  # characters of a command


def write_config(directory: Path, config: TrainConfig, step: int) -> None:
    """Writes config.yaml, with a line on this start after those that are there. step: that are done."""
    path = directory / "config.yaml"
    earlier = [line for line in path.read_text("utf-8").splitlines() if line.startswith(MARK)] if path.exists() else []
    write_file(path, "\n".join([*earlier, MARK + json.dumps(_start(step)), dump_config(config)]))


def starts_of(text: str) -> list[dict[str, Any]]:
    """The starts that stand in the text of a config.yaml, the first one first; none in one of an earlier version."""
    found = []
    for line in text.splitlines():
        if line.startswith(MARK):
            with suppress(ValueError, RecursionError):
                start = json.loads(line.removeprefix(MARK))
                found += [start] if isinstance(start, dict) else []
    return found


def _start(step: int) -> dict[str, Any]:
    return {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": _command(),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def _command() -> str:
    path = Path(sys.argv[0])
    program = {"cli.py": "longgrpo", "__main__.py": path.parent.name}.get(path.name, path.name)
    return shlex.join([program, *sys.argv[1:]])[:LONGEST]


def _commit() -> str:
    """Of the repository that holds the current directory, "-dirty" if files differ from it; "" outside of one."""
    asked = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""


def _machine() -> str:
    cores = f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().total / GIB:.1f} GiB"
    parts = [cores, f"{platform.system()} {platform.release()}"]
    if count := torch.cuda.device_count():
        parts.insert(0, f"{count} x {torch.cuda.get_device_name(0)}")
    return "; ".join(parts)


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        for name in (line.partition(":")[2].strip() for line in lines if line.startswith("model name")):
            return name
    return platform.machine()
