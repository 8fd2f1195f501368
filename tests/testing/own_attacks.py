"""Reward functions that try what a process of its own is there against; each does what its prompt says."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def children(path):
    """Three processes that write on and on: a child, one in a session of its own, and one whose parent is gone."""
    code = f"import time\nwhile True: open({path!r}, 'a').write('x'); time.sleep(0.02)"
    subprocess.Popen([sys.executable, "-c", code])
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}])"
    subprocess.run([sys.executable, "-c", orphan], check=True)


def squared(x):
    return x * x


def does(prompts, completions, log_extra, log_metric, **columns):
    what, _, argument = prompts[0].partition(" ")
    count = len(completions)
    if what == "pickle":
        log_extra("seen", [Payload(Path(argument))] * count)
        return [Payload(Path(argument))] * count
    if what == "children":
        children(argument)
        time.sleep(600)
    if what == "exit":
        sys.exit(0)
    if what == "raw":  # a half answer, on every pipe that it has
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"\x10")
            except OSError:
                continue
        time.sleep(600)
    if what == "pool":
        with multiprocessing.Pool(2) as pool:
            return [float(sum(pool.map(squared, [1, 2, 3])))] * count
    if what == "memory":
        return [float(len(bytearray(int(argument))))] * count
    if what == "together":
        held = [subprocess.Popen([sys.executable, "-c", f"x = bytearray({argument}); import time; time.sleep(600)"])
                for _ in range(3)]  # fmt: skip
        return [float(held[0].wait())] * count
    if what == "processes":
        held = [subprocess.Popen(["sleep", "600"]) for _ in range(int(argument))]
        return [float(held[0].wait())] * count
    if what == "file":
        Path(argument).write_bytes(b"x" * (1 << 21))
    if what == "network":
        with socket.create_connection(("127.0.0.1", int(argument)), timeout=5):
            return [1.0] * count
    return [0.5] * count


def exits(completions, **columns):
    sys.exit(0)


async def blocks(completions, **columns):
    time.sleep(30)


async def blocks_for_one(completions, answer, **columns):
    if answer[0] == 1:
        time.sleep(30)
    return [1.0] * len(completions)


async def exits_async(completions, **columns):
    sys.exit(0)


def logs_a_name_of_the_trainers(completions, log_metric, **columns):
    log_metric("reward/mean", 7.0)
    return [1.0] * len(completions)
