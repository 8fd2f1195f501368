"""A run that is killed and resumed is, bit for bit, the run that was not: killed in processes of its own, forked from a
server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.errors import UserError
from longgrpo.run.trainer import Trainer
from testing import OWN_DATA, OWN_REWARDS, ROOT
from testing.full_disk import limited_file_size

KILLS = 10
differences = runpy.run_path(str(ROOT / "bench" / "resume.py"))["differences"]


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longgrpo.run.trainer", "peft", "reasoning_gym", "transformers.models.llama"])
    return context


def run_to_the_end(tree, directory, kill_before=None, room=None):
    """Starts or resumes the run. `kill_before`: dies before its n-th operation on the run's own files; `room`: the most
    bytes that a file can have, and then it ends as the command line does."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    operations = 0

    def hook(event, arguments):
        nonlocal operations
        if event.startswith(("open", "os.", "shutil.")) and any(str(directory) in str(a) for a in arguments):
            if operations == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    sys.addaudithook(hook)
    with nullcontext() if room is None else limited_file_size(room):
        try:
            if (directory / "config.yaml").exists():
                Trainer.resume(directory, ["--train.steps", str(tree["train"]["steps"])]).run()
            else:
                Trainer(build_config(tree), directory).run()
        except UserError as error:
            sys.exit(2 if "cannot be written" in str(error) else str(error))
    directory.with_suffix(".operations").write_text(str(operations))


def in_a_process(server, *arguments, seconds=None):
    """Runs it in a process, killed after some seconds if it then still runs; returns its exit code."""
    process = server.Process(target=run_to_the_end, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def assert_same_run(whole, other):
    assert differences(whole, other) == []


@pytest.fixture
def eventful(tree):
    """A config with all that a checkpoint has to bring back."""
    tree["rewards"] = [{"function": f"{OWN_REWARDS}:noisy_digits"}]
    tree["loss"] = {"beta": 0.05}
    tree["task"] = {"name": f"{OWN_DATA}:thirty", "eval_n": 4, "eval_steps": 2, "eval_samples": 2}
    tree["train"] |= {"steps": 7, "warmup_steps": 5, "num_iterations": 2, "reference_sync_steps": 2, "max_refills": 1}
    tree["train"]["best_metric"] = "reward/mean"
    return tree


@pytest.mark.long
@pytest.mark.parametrize("lora", [True, False])
def test_killed_anywhere_and_resumed_it_is_the_same_run(eventful, tmp_path, server, lora):
    if not lora:
        del eventful["lora"]
    assert in_a_process(server, eventful, tmp_path / "whole") == 0
    start = time.monotonic()
    assert in_a_process(server, eventful, tmp_path / "again") == 0
    seconds, operations = time.monotonic() - start, int((tmp_path / "again.operations").read_text())
    assert_same_run(tmp_path / "whole", tmp_path / "again")

    draw = random.Random(f"lora {lora}")
    killed = 0
    for number in range(KILLS // 2):  # of each model, by turns at a moment and at an operation on files
        run = tmp_path / str(number)
        moment = draw.uniform(0.1, 1) * seconds if number % 2 else None
        operation = None if moment else draw.randrange(operations)
        killed += in_a_process(server, eventful, run, operation, seconds=moment) == -signal.SIGKILL
        assert in_a_process(server, eventful, run) == 0
        assert_same_run(tmp_path / "whole", run)
    assert killed >= KILLS // 2 - 1  # one may have come to its end before its moment


def test_killed_again_and_again(eventful, tmp_path, server):
    """Every operation on files of the second save and what is around it, in one run."""
    eventful["train"]["steps"] = 5
    assert in_a_process(server, eventful, tmp_path / "whole") == 0
    operations = int((tmp_path / "whole.operations").read_text())
    for operation in random.Random(0).sample(range(operations), 4):
        assert in_a_process(server, eventful, tmp_path / "run", operation) in (-signal.SIGKILL, 0)
    assert in_a_process(server, eventful, tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_fills_up_loses_nothing(eventful, tmp_path, server):
    eventful["train"]["save_steps"] = 1
    assert in_a_process(server, eventful, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert in_a_process(server, eventful | {"train": eventful["train"] | {"steps": 2}}, run) == 0
    saved = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")}
    for room in (0, 3_000, 20_000):  # bytes: config.yaml, metrics.jsonl and state.safetensors are the first to fail
        assert in_a_process(server, eventful, run, None, room) == 2
        assert {path: path.read_bytes() for path in saved} == saved
    assert in_a_process(server, eventful, run) == 0
    assert_same_run(tmp_path / "whole", run)
