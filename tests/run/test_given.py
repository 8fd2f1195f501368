"""A run from a notebook: functions and data sets as objects."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import yaml

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer

ROWS = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(12)]


def digits(completions, **columns):
    return [sum(c.isdigit() for c in reply) / 10 for reply in completions]


class Shorter:
    def __call__(self, completion_ids, **columns):
        return [-len(ids) / 10 for ids in completion_ids]


@pytest.fixture
def bare(tree):
    """A config without a task and rewards."""
    del tree["task"], tree["rewards"]
    tree["train"] |= {"steps": 2, "save_steps": 1}
    return tree


def asked(run):
    return set(pyarrow.parquet.read_table(run / "completions")["question"].to_pylist())


def test_functions_and_data_sets_as_objects(bare, tmp_path):
    trainer = Trainer(
        bare, tmp_path / "run", reward_functions=[digits, Shorter()], train_dataset=ROWS,
        eval_dataset={"first": ROWS[:3], "second": [{"prompt": "Who?", "answer": "me"}]},
    )  # fmt: skip
    summary = trainer.run()
    assert (summary["eval_n"], summary["eval_n_second"]) == (3, 1)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/digits/mean", "reward/Shorter/mean"} < row.keys()
    assert asked(tmp_path / "run") <= {row["prompt"] for row in ROWS[3:]}  # held out are not trained on


def test_a_data_set_of_datasets_and_one_that_streams(bare, tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    for name, given in (("map", data), ("stream", data.to_iterable_dataset())):
        Trainer(bare | {"task": {"eval_n": 0}}, tmp_path / name, reward_functions=[digits], train_dataset=given).run()
        assert asked(tmp_path / name) <= {row["prompt"] for row in ROWS}


def test_it_is_resumed_with_the_objects_given_again(bare, tmp_path):
    given = {"reward_functions": [digits], "train_dataset": ROWS, "eval_dataset": ROWS[:2]}
    Trainer(bare, tmp_path / "run", **given).run()
    with pytest.raises(ConfigError, match=r"'given:digits' was given to Trainer as an object: give it again"):
        Trainer.resume(tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["rewards"][0]["weight"] = 0.5  # stays, as do all values of the config
    config.write_text(yaml.safe_dump(tree))
    resumed = Trainer.resume(tmp_path / "run", ["--train.steps", "3"], **given)
    assert resumed.config.rewards[0].weight == 0.5
    assert resumed.run()["steps"] == 3


def test_they_take_the_place_of_what_the_config_has(tree, tmp_path):
    trainer = Trainer(build_config(tree), tmp_path / "run", reward_functions=[digits])
    assert [reward.name for reward in trainer.loop.collector.rewarding.rewards] == ["digits"]
    assert trainer.config.task.name == "chain_sum"


def test_without_a_directory_a_run_has_a_new_one(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(Trainer(build_config(tree)).directory) for _ in range(2)] == ["runs/run", "runs/run-2"]
    tree["output_dir"] = "mine"
    assert str(Trainer(build_config(tree)).directory) == "mine"


def test_arguments_that_there_are_not(tree, tmp_path):
    Trainer(build_config(tree), tmp_path / "run")
    with pytest.raises(ConfigError, match="has no argument 'reward_funcs': it takes reward_functions"):
        Trainer.resume(tmp_path / "run", reward_funcs=[digits])


def double(x: int) -> int:
    """Doubles a digit.

    Args:
        x: the digit
    """
    return 2 * x


class Game:
    """As TRL takes it."""

    def reset(self, **row):
        self.count = 0
        return f" ({row['answer']})"

    def get_reward(self):
        return float(self.count)


def test_tools_and_environments_as_objects(bare, tmp_path):
    bare["task"] = {"tool_pattern": r"(?P<x>\d)", "eval_n": 0}
    bare["rewards"] = [{"function": "environment_reward"}]
    bare["rollout"] |= {"max_completion_length": 80, "turn_tokens": 10, "max_turns": 3}
    bare["train"]["probe_prompts"] = 0
    given = {"train_dataset": ROWS, "tools": [double], "environment_factory": Game}
    Trainer(bare, tmp_path / "run", **given).run()
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["task"]["tools"] == ["given:tool-double"]
    assert config["task"]["environment"] == "given:environment_factory"
    rows = pyarrow.parquet.read_table(tmp_path / "run/completions").to_pylist()
    assert any(len(json.loads(row["messages"])) > 1 for row in rows)
    assert {row["reward/environment_reward"] for row in rows} == {0.0}
    Trainer.resume(tmp_path / "run", ["--train.steps", "3"], **given).run()
    with pytest.raises(ConfigError, match="give it again"):
        Trainer.resume(tmp_path / "run", ["--train.steps", "4"], train_dataset=ROWS)
    with pytest.raises(ConfigError, match="is a dict of 2 factories"):
        Trainer(bare, tmp_path / "mixed", **{**given, "environment_factory": {"game": Game, "other": Game}}).run()
