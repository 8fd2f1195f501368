from pathlib import Path

import pytest
import torch

from longgrpo.rewards import exact_answer, graded_error, last_number, score_answer
from longgrpo.train.config import RewardConfig
from longgrpo.train.errors import ConfigError, RewardError
from longgrpo.train.rewards import Reward, load_reward

OWN = Path(__file__).parent / "own_rewards.py"


def replies(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def call(reward, texts=("1", "2")):
    return reward([[]] * len(texts), replies(*texts), [[1]] * len(texts), {}).values


@pytest.mark.parametrize(
    ("text", "number"),
    [("71", "71"), ("99 - 28 = 71.", "71"), ("-5", "-5"), ("1,024 apples", "1024"), ("3.5", "3.5"), ("none", None),
     ("1,2,3", "3"), ("12,3456", "3456"), ("", None)],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


def test_score_answer_is_right_or_wrong_for_numbers():
    metadata = [{"source_dataset": "chain_sum"}] * 6
    texts = ["7", "The sum is 7.", "07", "17", "7 or 8", "seven"]
    assert score_answer(replies(*texts), ["7"] * 6, metadata) == [1, 1, 1, 0, 0, 0]


def test_score_answer_leaves_other_answers_to_the_task():
    metadata = [{"source_dataset": "spell_backward", "word": "abc"}] * 2
    good, bad = score_answer(replies(" cba ", "abc"), ["cba", "cba"], metadata)
    assert good == 1
    assert bad < 1


def test_exact_answer():
    assert exact_answer(replies(" 7\n", "7.", "The sum is 7"), answer=["7"] * 3) == [1, 0, 0]


def test_graded_error():
    got = graded_error(replies("7", "9", "none", "7"), answer=["7", "7", "7", "cba"])
    assert got == [0.5, 0.5 / 3, 0.0, None]


def test_functions_get_trls_arguments():
    seen = {}

    def function(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [1, torch.tensor(2.0)]

    values = Reward("f", function)(["p", "q"], ["a", "b"], [[1], [2]], {"answer": ["x", "y"]}).values
    assert values.tolist() == [1, 2]
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen.pop("trainer_state") is None
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "completion_ids": [[1], [2]],
        "answer": ["x", "y"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raises raised KeyError: 'no such column' \(.*own_rewards\.py:\d+\)"),
        ("too_few", "too_few returned 1 values for 2 completions"),
        ("nan", r"nan returned nan for completion 0.*None where it does not apply"),
        ("text", "text returned '1' for completion 0"),
    ],
)
def test_a_function_at_fault_is_named(name, message):
    with pytest.raises(RewardError, match=message):
        call(load_reward(RewardConfig(f"{OWN}:{name}")))


def test_a_function_that_returns_no_list():
    with pytest.raises(RewardError, match="f returned float"):
        call(Reward("f", lambda **_: 1.0))
    with pytest.raises(RewardError, match="f returned NoneType"):
        call(Reward("f", lambda **_: None))


def test_never_applicable():
    assert call(load_reward(RewardConfig(f"{OWN}:never"))).isnan().all()


def test_functions_are_found_by_module(monkeypatch):
    monkeypatch.syspath_prepend(str(OWN.parent))
    assert call(load_reward(RewardConfig("own_rewards:constant", 2.0))).tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("score_answr", "did you mean 'score_answer'"),
        (f"{OWN}:absent", "no function 'absent'"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ],
)
def test_functions_that_cannot_be_found(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(RewardConfig(spec))
