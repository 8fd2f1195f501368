"""Prompts that fill the context: refused, dropped or cut, and counted before training."""

from __future__ import annotations

import json
import logging

import pytest

from longgrpo.config.run import build_config
from longgrpo.errors import DataError
from longgrpo.run.trainer import Trainer

CONTEXT = 60


@pytest.fixture
def tree_with_long_prompts(tree, tmp_path):
    """Twenty prompts, of which every fifth has more characters than the context has tokens."""
    path = tmp_path / "rows.jsonl"
    prompts = [f"{i:02}:" + ("x" * 2 * CONTEXT if i % 5 == 4 else "what?") for i in range(20)]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    tree["task"] = {"name": str(path), "eval_n": 0, "shuffle": False}
    tree["rewards"] = [{"function": "exact_answer"}]
    tree["rollout"] |= {"max_model_len": CONTEXT}
    tree["train"] |= {"steps": 7, "prompts_per_step": 3, "probe_prompts": 0}
    return tree


def test_a_run_with_long_prompts_does_not_begin(tree_with_long_prompts, tmp_path):
    with pytest.raises(DataError, match=r"4 of 20 training prompts have 60 tokens or more.*the first begins '04:xxx"):
        Trainer(build_config(tree_with_long_prompts), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["drop", "cut"])
def test_a_long_prompt_stops_no_run(tree_with_long_prompts, tmp_path, caplog, rule):
    tree_with_long_prompts["task"]["long_prompts"] = rule
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(build_config(tree_with_long_prompts), tmp_path / "run")
    assert "4 of 20 training prompts have 60 tokens or more" in caplog.text
    collector = trainer.loop.collector
    problems = collector.sample_prompts(20)
    names = [problem.question[:2] for problem in problems]
    if rule == "drop":
        assert names == [f"{i:02}" for i in range(20) if i % 5 != 4] + ["00", "01", "02", "03"]
    else:
        assert names == [f"{i:02}" for i in range(20)]
        ids = collector.prompts.encode(problems[4])
        assert len(ids) == CONTEXT - 6  # room for a whole completion
        assert collector.tokenizer.decode(ids).replace(" ", "").endswith("xxx\n<assistant>")
    assert trainer.run()["steps"] == 7


def test_held_out_prompts_follow_the_same_rule(tree_with_long_prompts, tmp_path):
    tree_with_long_prompts["task"] |= {"eval_n": 18, "long_prompts": "drop"}
    trainer = Trainer(build_config(tree_with_long_prompts), tmp_path / "run")
    assert 14 <= len(trainer.held_out) <= 16
    assert all(len(problem.question) < CONTEXT for problem in trainer.held_out)


def test_no_prompt_is_left(tree_with_long_prompts, tmp_path):
    tree_with_long_prompts["task"]["long_prompts"] = "drop"
    tree_with_long_prompts["rollout"]["max_model_len"] = 8
    with pytest.raises(DataError, match=r"20 of 20 training prompts .*none of them is left"):
        Trainer(build_config(tree_with_long_prompts), tmp_path / "run")
