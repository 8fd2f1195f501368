"""Two commands on one run at the same time, in all combinations: one works, the other works as well or is told."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import runpy
import shutil

import pytest
import torch
import yaml

from longgrpo import cli
from longgrpo.config.run import build_config
from longgrpo.run import checkpoint
from longgrpo.run.trainer import Trainer
from testing import ROOT

differences = runpy.run_path(str(ROOT / "bench" / "resume.py"))["differences"]
TOLD = ("another process works on this run", "another process is writing it", "exists already", "holds a run already",
        "was removed while it was read")  # fmt: skip


def commands(run, config, out):
    return {
        "train": ["train", str(config), "--output_dir", str(run)],
        "resume": ["train", "--resume", str(run), "--train.steps", "5"],
        "eval": ["eval", str(run)],
        "export": ["export", str(run), str(out), "--as", "adapter"],
        "report": ["report", str(run)],
    }


def act(arguments, barrier, log):
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    os.dup2(file, 1)
    barrier.wait()
    os._exit(cli.main(arguments))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longgrpo.run.trainer", "longgrpo.cli", "peft", "reasoning_gym"])
    return context


@pytest.fixture(scope="module")
def whole(base_tree, tmp_path_factory):
    """A run of three steps, one of five, and the config of both."""
    folder, tree = tmp_path_factory.mktemp("two"), copy.deepcopy(base_tree)
    tree["train"] |= {"steps": 3, "probe_prompts": 0, "save_steps": 1}
    tree["task"]["eval_n"] = 2
    Trainer(build_config(tree), folder / "three").run()
    shutil.copytree(folder / "three", folder / "five")
    Trainer.resume(folder / "five", ["--train.steps", "5"]).run()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


PAIRS = list(itertools.combinations_with_replacement(("train", "resume", "eval", "export", "report"), 2))


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_at_once(whole, tmp_path, server, pair):
    run = tmp_path / "run"
    if pair != ("train", "train"):
        shutil.copytree(whole / "three", run)
    barrier, logs = server.Barrier(2), [tmp_path / f"{i}.log" for i in range(2)]
    given = [commands(run, whole / "config.yaml", tmp_path / "out")[name] for name in pair]
    processes = [server.Process(target=act, args=(a, barrier, log)) for a, log in zip(given, logs, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = [log.read_text() for log in logs]
    codes = [process.exitcode for process in processes]
    assert 0 in codes or pair[0] == "train", said
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or (code == 2 and any(told in text for told in TOLD)), text
        assert "Traceback" not in text
    assert not checkpoint.damage(checkpoint.checkpoints(run)[-1])
    Trainer.resume(run, ["--train.steps", "5"]).run()
    (run / "report.html").unlink(missing_ok=True)
    assert [name for name in differences(whole / "five", run) if name != "config.yaml"] == []
