"""Kills a run with SIGKILL at random moments (in steps, saves and evaluations), resumes it, and compares it with the
run that was not killed.

    python bench/resume.py examples/smollm2-sums.yaml --kills 3 --train.steps 6 --train.save_steps 2

Prints each moment and, at the end, what differs: nothing, or the names of the files. The exit status says the same.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

CLOCKS = ("seconds", "tokens_per_second", "peak_", "memory")  # what no two runs have in common


def timeless(record: Any) -> Any:
    """A record without what its run's clock and memory say."""
    if not isinstance(record, dict):
        return record
    return {key: timeless(value) for key, value in record.items() if not key.startswith(CLOCKS)}


def content(path: Path) -> Any:
    """A file of a run, in the form that two equal runs have in common."""
    if path.suffix == ".jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "config.yaml":  # each start of a process is a comment in it
        return [line for line in path.read_text().splitlines() if not line.startswith("#")]
    if path.name == "SHA256SUMS":  # state.json has clocks in it
        return [line for line in path.read_text().splitlines() if not line.endswith("state.json")]
    return timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def differences(whole: Path, other: Path) -> list[str]:
    """The files in which two runs differ, bit for bit; a file that only one of them has is one. TensorBoard's are
    stamped with the time, and are left out."""
    files = {run: [path for path in run.rglob("*") if path.is_file()] for run in (whole, other)}
    names = {
        str(path.relative_to(run)) for run, paths in files.items() for path in paths if "tfevents" not in path.name
    }
    both = {name for name in names if (whole / name).is_file() and (other / name).is_file()}
    return sorted(names - both | {name for name in both if content(whole / name) != content(other / name)})


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps in a run's metrics.jsonl; a line that is being written is none yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [record for line in lines if line.endswith("\n") and (record := json.loads(line))["step"] > 0]


def seconds_between_steps(command: list[str], run: Path) -> list[float]:
    """Runs the command to its end: the seconds until its first step is written, from each step to the next, and from
    the last to the end. Saves and evaluations lie in them."""
    marks, process = [time.monotonic()], subprocess.Popen(command)
    while process.poll() is None:
        marks += [time.monotonic()] * (len(metrics(run)) + 1 - len(marks))
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    marks.append(time.monotonic())
    return [after - before for before, after in pairwise(marks)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    longgrpo, draw = [sys.executable, "-m", "longgrpo.cli", "train"], random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"

        def command(run: Path) -> list[str]:
            if (run / "config.yaml").exists():
                return [*longgrpo, "--resume", str(run)]
            return [*longgrpo, str(options.config), *overrides, "--output_dir", str(run)]

        seconds = seconds_between_steps(command(whole), whole)
        for kill in range(options.kills):  # each in its part of the run, at any moment from one step's line to the next
            begin, end = (len(seconds) * part // options.kills for part in (kill, kill + 1))
            number = draw.randrange(begin, end)
            moment = draw.uniform(0, seconds[number])
            process = subprocess.Popen(command(killed))
            while process.poll() is None and len(metrics(killed)) < number:
                time.sleep(0.05)
            time.sleep(moment)
            process.kill()
            print(f"killed {moment:.1f} s after step {number}: exit status {process.wait()}", flush=True)
        subprocess.run(command(killed), check=True)
        for run in (whole, killed):  # the one thing that is meant to differ is where the run lives
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace(f"output_dir: {run}", "output_dir: RUN"))
        different = differences(whole, killed)
    print(f"killed {options.kills} times and resumed: {', '.join(different) or 'nothing'} differs")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
