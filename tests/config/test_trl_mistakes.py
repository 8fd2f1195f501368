"""What a user of TRL types first, and the answer to it."""

from __future__ import annotations

import pytest
import yaml

from longgrpo import cli
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer


@pytest.fixture
def said(tree, tmp_path, capsys):
    """What `longgrpo train` says of a config with these changes, by dotted keys."""

    def train(*arguments, **groups):
        for name, keys in groups.items():
            tree[name] = {**tree[name], **keys} if isinstance(keys, dict) else keys
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        status = cli.main(["train", str(file), "--output_dir", str(tmp_path / "run"), *arguments])
        assert status == 2
        return capsys.readouterr().err

    return train


MISTAKES = {
    "max_steps": ({"max_steps": 100}, "TRL's max_steps is train.steps here"),
    "epochs": (
        {"train": {"num_train_epochs": 2}},
        "TRL's num_train_epochs is train.steps here (epochs x rows / train.prompts_per_step",
    ),
    "batch size": (
        {"train": {"per_device_train_batch_size": 8}},
        "is train.prompts_per_step, train.token_budget here (prompts_per_step = batch size x devices",
    ),
    "rank": ({"lora": {"r": 8}}, "PEFT's r is lora.rank here"),
    "dropout": (
        {"lora": {"lora_dropout": 0.05}},
        "PEFT's lora_dropout has no counterpart: completions are sampled without dropout",
    ),
    "rsLoRA": ({"lora": {"use_rslora": True}}, "is lora.alpha here (the scale is alpha / rank: take alpha x sqrt"),
    "modules to save": ({"lora": {"modules_to_save": ["lm_head"]}}, "has no counterpart: whole layers beside"),
    "warm-up": (
        {"train": {"warmup_ratio": 0.1}},
        "TRL's warmup_ratio is train.warmup_steps here (ratio x",
    ),
    "evaluation": ({"train": {"eval_steps": 50}}, "TRL's eval_steps is task.eval_n, task.eval_steps here"),
    "rewards": ({"reward_funcs": ["my.py:f"]}, "TRL's reward_funcs is rewards here"),
    "weights": ({"reward_weights": [1.0]}, "TRL's reward_weights is rewards here (each reward has its own weight)"),
    "vllm": ({"rollout": {"use_vllm": True}}, "TRL's use_vllm is rollout.engine here (auto, vllm, transformers)"),
    "the loss's": ({"train": {"beta": 0.04}}, "TRL's beta is loss.beta here"),
    "code of others": ({"model": {"trust_remote_code": True}}, "has no counterpart: code from a model's repository"),
}


@pytest.mark.parametrize("changes", MISTAKES.values(), ids=MISTAKES)
def test_a_name_of_theirs_in_the_file(said, changes):
    groups, answer = changes
    inner = next(iter(groups.values()))
    name = next(iter(inner if isinstance(inner, dict) else groups))
    message = said(**groups)
    assert answer in message
    assert "unknown key '" in message
    assert name in message


def test_a_name_of_theirs_on_the_command_line(said):
    assert "unknown key 'max_steps'; TRL's max_steps is train.steps here" in said("--max_steps", "5")


def test_their_config_object(tmp_path):
    class GRPOConfig:
        """Not a mapping."""

    with pytest.raises(ConfigError, match="config is a GRPOConfig: give a mapping, as a YAML file has it"):
        Trainer(GRPOConfig(), tmp_path / "run")


def test_a_rate_that_nobody_set_is_of_what_is_trained(tree, tmp_path, capfd):
    del tree["train"]["learning_rate"]
    tree["train"] |= {"steps": 1, "probe_prompts": 0}
    tree["task"]["eval_n"] = 0
    adapter = Trainer(tree, tmp_path / "adapter")
    assert adapter.config.train.learning_rate == 1e-5
    adapter.run()
    assert "training an adapter of rank 4 (all-linear), learning rate 1e-05\n" in capfd.readouterr().err
    del tree["lora"]
    whole = Trainer(tree, tmp_path / "whole")
    assert whole.config.train.learning_rate == 1e-6
    whole.run()
    assert "training all weights (the config has no lora group), learning rate 1e-06\n" in capfd.readouterr().err
    again = Trainer.resume(tmp_path / "whole")
    assert again.config.train.learning_rate == 1e-6
    again.close()
