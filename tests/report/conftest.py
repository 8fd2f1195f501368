"""A browser that opens reports, and a run whose model writes what it should not."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import os
import re
import shutil

import pytest
import torch

from longgrpo.config.run import build_config, dump_config
from longgrpo.rollout.protocol import Completion
from longgrpo.run.tracking import Tracker
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.data import Problem
from longgrpo.tasks.sample import Rollout, Sample
from testing import OWN_REWARDS
from testing.own_rewards import PAYLOADS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements/test.txt")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens a file as a page that notes what it should not do: ask for another address, complain, open a dialog."""
    pages = []

    def open_page(path, **options):
        page = chromium.new_page(**options)
        page.faults = []
        page.on("request", lambda request: page.faults.append(request.url) if request.url != path.as_uri() else None)
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("dialog", lambda dialog: (page.faults.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        pages.append(page)
        page.wait_for_selector("body[data-ready]", state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()


def packed_in(path):
    """What the templates of a page hold, as JSON."""
    texts = re.findall(r"<template[^>]*>([^<]*)</template>", path.read_text())
    return [json.loads(gzip.decompress(base64.b64decode(text))) for text in texts]


@pytest.fixture
def unpacked():
    return packed_in


@pytest.fixture
def hostile(tree, tmp_path):
    """A run whose completions are PAYLOADS, written by the tracker as any are."""
    directory = tmp_path / "hostile"
    directory.mkdir()
    config = build_config(tree)
    (directory / "config.yaml").write_text(dump_config(config))
    metrics = {"step": 1, "reward/mean": 1.0, "reward/digits/mean": 1.0, "completion_length/sum": 6}
    metrics |= {"completion_length/mean": 2.0, "seconds/step": 1.0}
    metrics |= {f"seconds/{name}": 0.2 for name in ("roll_out", "reward", "score", "loss_and_backward")}
    problems = [Problem(PAYLOADS[0], PAYLOADS[0], {})]
    samples = [
        Sample(0, [1], Completion([1, 2], [0.0, 0.0], "stop"), text, extra={PAYLOADS[1]: text}) for text in PAYLOADS
    ]
    rollout = Rollout.of(problems, samples, torch.tensor([[range(len(PAYLOADS))]], dtype=torch.float64))
    with Tracker(directory, config, 0) as tracker:
        tracker.step(metrics | {"seconds/optimizer_step": 0.1}, rollout)
    return directory


@pytest.fixture(scope="package")
def two_runs(base_tree, tmp_path_factory):
    """Three steps each; the second has a KL term, two updates a rollout and a reward that logs PAYLOADS."""
    tree, directory = copy.deepcopy(base_tree), tmp_path_factory.mktemp("runs")
    tree["train"] |= {"steps": 3, "save_steps": 0}
    Trainer(build_config(tree), directory / "plain").run()
    tree["loss"] = {"beta": 0.04}
    tree["train"] |= {"num_iterations": 2, "learning_rate": 2e-2}
    tree["rewards"].append({"function": f"{OWN_REWARDS}:logs_payloads", "weight": 0, "name": PAYLOADS[0]})
    Trainer(build_config(tree), directory / "with-kl").run()
    return directory / "plain", directory / "with-kl"
