"""Episodes in the report, in a real browser."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.report import read_run, write_report
from longgrpo.rollout.protocol import Completion, Turn
from longgrpo.run.tracking import Tracker
from longgrpo.tasks.data import Problem
from longgrpo.tasks.episodes import Answered, Episode
from longgrpo.tasks.sample import Rollout, Sample
from testing.own_rewards import PAYLOADS


@pytest.fixture
def talks(hostile, tree):
    """The same with episodes: a tool says PAYLOADS, in its name and its errors too."""
    directory = hostile
    config = build_config(tree)
    samples = []
    for text in PAYLOADS:
        messages = [
            {"role": "assistant", "content": f"calls {text}"},
            {"role": "tool", "content": f"says {text}"},
            {"role": "assistant", "content": "done"},
        ]
        answered = [Answered(0, text, {text: text}, 0.25, "raised")]
        episode = Episode("q", {}, messages=messages, answered=answered, failed=text)
        turns = (Turn(0, 1), Turn(2, 3))
        samples.append(Sample(0, [1], Completion([1, 2, 3], [0.0, 0.0], "stop", None, turns), text, episode=episode))
    metrics = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    metrics |= {"step": 2, "seconds/optimizer_step": 0.1, "turns/mean": 2.0, "calls/mean": 1.0}
    rollout = Rollout.of([Problem("q", "q", {})], samples, torch.tensor([[range(len(PAYLOADS))]], dtype=torch.float64))
    with Tracker(directory, config, 1) as tracker:
        tracker.step(metrics, rollout)
    return directory


def test_an_episode_is_a_conversation_with_its_calls(talks, browse):
    write_report([read_run(talks)], talks / "report.html")
    page = browse(talks / "report.html")
    last = page.locator("article.completion").filter(has_text="says").all()
    assert len(last) == len(PAYLOADS)
    for article in last:
        roles = [role.text_content() for role in article.locator("p.role").all()]
        assert roles[0].startswith("left out of its group")
        assert roles[1:] == ["assistant", "tool", "assistant"]
        assert article.locator("pre").nth(1).text_content().startswith("says ")
        assert article.locator("pre").count() == 3
        (call,) = article.locator("p.call").all()
        assert call.text_content().endswith("0.25 s, raised")
    assert not page.faults
    assert page.evaluate("window.hit") is None
