"""The weight of the entropy bonus follows the entropy, and is resumed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from longgrpo.config.loss import LossConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run import checkpoint
from longgrpo.run.trainer import Trainer
from longgrpo.train.entropy import EntropyControl
from longgrpo.train.loop import controlled_loss_and_backward, loss_and_backward
from testing.steps import rolled_out

HIGH = {"entropy_target": 50.0, "entropy_coef_delta": 0.01, "entropy_coef_max": 0.025}  # above any entropy


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def test_the_rule_of_skywork():
    config = LossConfig(entropy_target=1.0, entropy_coef=0.01, entropy_coef_delta=0.02, entropy_coef_max=0.04)
    control, applied, weights = EntropyControl(config.entropy_coef), [], []
    for entropy in (1.5, 0.9, 1.0, 0.5, 1.1, 2.0, 2.0, 0.1):
        applied.append(control.applied(config))
        control.observe(entropy, config)
        weights.append(control.coefficient)
    assert weights == pytest.approx([0, 0.02, 0.04, 0.04, 0.02, 0, 0, 0.02])
    assert applied == pytest.approx([0, 0, 0.02, 0.04, 0.04, 0, 0, 0])  # only after an entropy at or below 1


def test_a_run_moves_it_and_a_resumed_run_goes_on(tree, tmp_path):
    tree["loss"] = HIGH
    tree["task"]["eval_n"] = 0
    Trainer(build_config(tree), tmp_path / "whole").run()
    assert [row["entropy_coef"] for row in rows(tmp_path / "whole")] == pytest.approx([0, 0.01, 0.02, 0.025])
    tree["train"]["steps"] = 2
    Trainer(build_config(tree), tmp_path / "parts").run()
    Trainer.resume(tmp_path / "parts", ["--train.steps", "4"]).run()
    assert [row["entropy_coef"] for row in rows(tmp_path / "parts")] == pytest.approx([0, 0.01, 0.02, 0.025])
    whole, parts = (
        load_file(checkpoint.checkpoints(tmp_path / name)[-1] / "state.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_its_gradient_is_that_of_the_constant_weight(tree, tmp_path):
    tree["task"]["eval_n"] = 0
    gradients = []
    for name, loss in (("steered", HIGH), ("constant", {"entropy_coef": 0.02}), ("none", {})):
        loop = Trainer(build_config(tree | {"loss": loss}), tmp_path / name).loop
        if loop.state.entropy_control:
            loop.state.entropy_control = EntropyControl(0.02, entropy=1.0)
        _, update = rolled_out(loop)
        run = controlled_loss_and_backward if name == "steered" else loss_and_backward
        run(loop.loss, loop.state, update)
        gradients.append(torch.cat([gradient.flatten() for gradient in loop.state.gradients.values()]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"entropy_target": 0}, "entropy_target = 0.0: must be above 0 nats"),
        ({"entropy_target": 1, "entropy_coef": 2}, "entropy_coef_max = 1.0: must rise from 0"),
        ({"entropy_target": 1, "entropy_coef_delta": 0}, "entropy_coef_delta = 0.0: must be above 0"),
        ({"entropy_target": 1, "function": "a.py:f"}, "a function has its own"),
    ],
)
def test_bounds_that_make_no_sense(tree, loss, message):
    with pytest.raises(ConfigError, match=message):
        build_config(tree | {"loss": loss})
