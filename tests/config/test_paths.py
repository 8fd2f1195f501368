"""Relative paths are those of the config file, or of the folder that the command is given in."""

import pytest
import yaml

from longgrpo.config.run import dump_config, load_config


@pytest.fixture
def beside(tmp_path):
    """A folder with a config's own files."""
    folder = tmp_path / "mine"
    (folder / "model").mkdir(parents=True)
    for name in ("rewards.py", "rows.jsonl", "loss.py", "template.jinja"):
        (folder / name).touch()
    return folder


@pytest.fixture
def path(tree, beside):
    tree["model"]["path"] = "model"
    tree["task"] |= {"name": "rows.jsonl", "chat_template": "template.jinja"}
    tree["rewards"] = [{"function": "rewards.py:first"}, {"function": "exact_answer"}, {"function": "package.of:mine"}]
    tree["loss"] = {"function": "loss.py:loss"}
    (beside / "run.yaml").write_text(yaml.safe_dump(tree))
    return beside / "run.yaml"


def test_a_run_is_made_beside_the_file_that_says_so(path, beside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path.write_text(path.read_text() + "output_dir: runs/own\n")
    config = load_config("mine/run.yaml")
    assert config.output_dir == str(beside / "runs/own")
    assert load_config("mine/run.yaml", ["--output_dir", "runs/x"]).output_dir == "runs/x"
    given = load_config("mine/run.yaml", ["--output_dir", "runs/x"])
    (tmp_path / "kept.yaml").write_text(dump_config(given))
    monkeypatch.chdir(beside)
    assert load_config(tmp_path / "kept.yaml").output_dir == str(tmp_path / "runs/x")


def test_a_files_paths_are_its_own(path, beside, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config("mine/run.yaml")
    assert config.model.path == str(beside / "model")
    assert config.task.name == str(beside / "rows.jsonl")
    assert config.task.chat_template == str(beside / "template.jinja")
    assert config.loss.function == f"{beside / 'loss.py'}:loss"
    assert [reward.function for reward in config.rewards] == [
        f"{beside / 'rewards.py'}:first", "exact_answer", "package.of:mine",
    ]  # fmt: skip


def test_the_command_lines_are_the_shells(path, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "other.py").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(path, ["--task.name", "rows.jsonl", "--rewards.1.function", "other.py:f"])
    assert config.task.name == str(tmp_path / "rows.jsonl")
    assert config.rewards[1].function == f"{tmp_path / 'other.py'}:f"


def test_every_key_that_may_be_a_path(path, beside):
    tree = yaml.safe_load(path.read_text())
    tree["lora"] = {"path": "model"}
    tree["train"] |= {"optimizer": "loss.py:C", "callbacks": ["loss.py:C", "rewards.py:D"]}
    tree["task"]["eval_sets"] = {"hard": {"name": "rows.jsonl", "reward": "rewards.py:first"}}
    tree["rewards"].append({"model": "model"})
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    assert config.lora.path == str(beside / "model")
    assert config.rewards[-1].model == str(beside / "model")
    assert config.train.optimizer == f"{beside / 'loss.py'}:C"
    assert config.train.callbacks == [f"{beside / 'loss.py'}:C", f"{beside / 'rewards.py'}:D"]
    hard = config.task.eval_sets["hard"]
    assert (hard.name, hard.reward) == (str(beside / "rows.jsonl"), f"{beside / 'rewards.py'}:first")


def test_what_is_nowhere_stays(path):
    config = load_config(path, ["--model.path", "owner/name", "--task.name", "chain_sum", "--task.sampler", "no.py:C"])
    assert (config.model.path, config.task.name, config.task.sampler) == ("owner/name", "chain_sum", "no.py:C")


def test_a_run_reads_the_same_from_anywhere(path, tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)  # a finished run has a model of its own
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(path)))
    monkeypatch.chdir(tmp_path / "run")
    assert load_config("config.yaml") == load_config(path)
