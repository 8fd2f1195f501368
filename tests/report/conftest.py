from __future__ import annotations

import copy

import pytest

from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS
from testing.own_rewards import PAYLOADS


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
