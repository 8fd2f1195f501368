"""The self-test of a run with tools: each fault between turns is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longgrpo.checks.selftest import selftest
from longgrpo.config.run import build_config
from longgrpo.rollout.turns import Episodes
from longgrpo.run.trainer import Trainer
from testing import OWN_TOOLS


@pytest.fixture
def start(tree, tmp_path):
    """A random model whose every digit is a call, with more tokens that end a turn than it has itself."""
    tree["rewards"] = [{"function": f"{OWN_TOOLS}:letters"}]
    tree["rollout"] |= {"max_completion_length": 150, "turn_tokens": 12, "max_turns": 4, "max_model_len": 256}
    tree["rollout"]["sampling"] = {"stop_token_ids": list(range(40, 70))}
    begun = []

    def build(pattern=r"(?P<x>\d)", tool="later"):
        tree["task"] |= {"tools": [f"{OWN_TOOLS}:{tool}"], "tool_pattern": pattern}
        begun.append(Trainer(build_config(tree), tmp_path / "run"))
        return begun[-1].loop

    yield build
    for trainer in begun:
        trainer.close()


def outcome(loop):
    return {check.name: check for check in selftest(loop, 4).checks}


def test_a_run_with_a_tool_passes(start):
    checks = outcome(start())
    assert {"calls", "later turns", "agreement", "engine"} <= checks.keys()
    assert [str(check) for check in checks.values() if not check.passed] == []


def test_a_pattern_that_finds_no_call(start):
    check = outcome(start(r"\[calc: (?P<x>[^\]]*)\]"))["calls"]
    assert not check.passed
    assert "0 answered in" in check.seen
    assert "compare task.tool_pattern with what the model writes" in check.remedy


def test_a_tool_that_always_breaks(start):
    check = outcome(start(tool="breaks"))["calls"]
    assert not check.passed
    assert "raised" in check.seen
    assert "look at the tool" in check.remedy


def test_a_token_that_is_lost_between_turns(start, monkeypatch):
    """The engine goes on from other tokens than the trainer reads: what a tool's end is re-tokenized into, say."""
    request = Episodes._request

    def loses_one(self, i):
        asked = request(self, i)
        return replace(asked, prompt=asked.prompt[:-1]) if self._episodes[i].turns else asked

    monkeypatch.setattr(Episodes, "_request", loses_one)
    checks = outcome(start())
    assert not checks["later turns"].passed
    assert "do not read the same tokens" in checks["later turns"].remedy
