"""A model as a reward: its scores are the classifier's own, whatever the batch."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.config.task import RewardConfig
from longgrpo.errors import ConfigError, RewardError
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.reward_model import RewardModel
from testing.models import SIZES
from testing.tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A directory with a small random classifier of one label."""
    return write(tmp_path_factory.mktemp("judge"))


def write(directory, labels=1, chat=True):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokenizer = character_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_labels=labels, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


def score_of(directory, text):
    """The oracle: one text at a time, without padding; the logit at its last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    ids = torch.tensor([character_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return (model.model(ids).last_hidden_state[0, -1] @ model.score.weight.T).item()


CHATS = [[{"role": "user", "content": text}] for text in ("1+1?", "a much longer question?", "?", "12+3?", "0?")]
REPLIES = [[{"role": "assistant", "content": text}] for text in ("2", "no", "a long reply of many words", "15", "")]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_the_models_own_through_its_chat_template(classifier, batch_size):
    scores = RewardModel(str(classifier), batch_size=batch_size)(CHATS, REPLIES, answer=["1"] * 5)
    chats = [(p[0]["content"], r[0]["content"]) for p, r in zip(CHATS, REPLIES, strict=True)]
    texts = [f"<user>{question}\n<assistant>{reply}<end>\n" for question, reply in chats]
    assert scores == pytest.approx([score_of(classifier, text) for text in texts], abs=1e-5)
    assert len(set(scores)) == 5


def test_text_is_read_as_it_is(classifier):
    scores = RewardModel(str(classifier))(["1+1=", "2+2="], ["2", "five"])
    assert scores == pytest.approx([score_of(classifier, "1+1=2"), score_of(classifier, "2+2=five")], abs=1e-5)


def test_the_end_of_a_long_text_is_kept(classifier):
    scores = RewardModel(str(classifier), max_length=6)(["0123456789"], ["abc"])
    assert scores == pytest.approx([score_of(classifier, "789abc")], abs=1e-5)


def test_a_run_is_rewarded_by_it(tree, tmp_path, classifier):
    tree["rewards"] = [{"model": str(classifier), "name": "judge", "parameters": {"batch_size": 4}}]
    tree["task"]["eval_n"] = 0
    tree["train"] |= {"steps": 1}
    Trainer(build_config(tree), tmp_path / "run").run()
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["reward/judge/std"] > 0
    assert row["reward/mean"] == row["reward/judge/mean"]


def test_models_that_are_no_judge(tmp_path):
    with pytest.raises(ConfigError, match=r"'/no/such' cannot be loaded as a classifier"):
        load_reward(RewardConfig(model="/no/such"))
    with pytest.raises(ConfigError, match="has 3 labels: a reward model has one"):
        RewardModel(str(write(tmp_path / "three", labels=3)))
    with pytest.raises(RewardError, match=r"has no chat template .* task\.chat: false"):
        RewardModel(str(write(tmp_path / "plain", chat=False)))(CHATS, REPLIES)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "a reward has either `function` or `model`"),
        ({"function": "exact_answer", "model": "x"}, "a reward has either `function` or `model`"),
        ({"model": "x", "timeout": 3}, "a model runs in the trainer's process"),
    ],
)
def test_either_a_function_or_a_model(tree, reward, message):
    tree["rewards"] = [reward]
    with pytest.raises(ConfigError, match=message):
        build_config(tree)
