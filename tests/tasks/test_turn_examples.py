"""The examples with tools and turns."""

from __future__ import annotations

import pytest

from longgrpo.config.run import load_config
from longgrpo.model.load import end_token_ids, load_tokenizer, resolve_model
from longgrpo.tasks.data import Problem
from longgrpo.tasks.episodes import make_conversations, prompts_for
from longgrpo.tasks.event_loop import EventLoop
from testing import ROOT, load


@pytest.fixture(scope="module")
def calculator():
    return load(ROOT / "examples/calculator.py")


@pytest.mark.parametrize(
    ("expression", "result"), [("12 + 30", "42"), ("3-10", "-7"), (" -4 * 5 ", "-20"), ("999 + -1", "998")]
)
def test_the_calculator_calculates(calculator, expression, result):
    assert calculator.calculator(expression) == result


@pytest.mark.parametrize(
    "expression", ["", "1", "1 + 2 + 3", "__import__('os')", "2 ** 9999", "9" * 99 + " * 9", "1/0"]
)
def test_the_calculator_refuses_what_it_does_not_know(calculator, expression):
    with pytest.raises(ValueError, match="cannot calculate"):
        calculator.calculator(expression)


def test_what_is_held_out_is_never_trained_on(calculator):
    train, held_out = ({row["prompt"][-1]["content"] for row in calculator.rows(s)} for s in ("train", "held out"))
    assert len(held_out) > 3000
    assert not train & held_out


def test_the_worked_example_is_what_an_episode_is(calculator):
    """What the prompt shows as turns is, token for token, what a call and its result become."""
    config = load_config(ROOT / "examples/smollm2-calculator.yaml")
    directory = resolve_model(config.model.path)
    tokenizer, loop = load_tokenizer(directory), EventLoop()
    talks = make_conversations(config, tokenizer, end_token_ids(directory), loop)
    assert [tool.name for tool in talks._tools] == ["calculator"]
    row = calculator.row(321, "-", 123)
    shown = row["prompt"]
    assert (shown[2]["content"], shown[3]["content"]) == ("[calc: 214 + 571]", "785")
    (call,) = talks._parse(shown[2]["content"])[1]
    assert calculator.calculator(**call.arguments) == shown[4]["content"]
    prompts = prompts_for(config, tokenizer, 512, talks)
    whole = prompts.encode(Problem("q", shown, {}))
    begun = prompts.encode(Problem("q", shown[:2], {}))
    end = tokenizer.eos_token_id
    called = [*tokenizer(shown[2]["content"])["input_ids"], end]
    given = talks.between.ids([{"role": "tool", "content": "785"}], end)
    assert whole[: len(begun) + len(called) + len(given)] == [*begun, *called, *given]
    talks.close()
    loop.close()


def test_the_game_is_a_valid_config():
    config = load_config(ROOT / "examples/smollm2-guess.yaml")
    assert config.task.takes_turns
    assert config.task.environment == f"{ROOT}/examples/guess_the_number.py:Game"
