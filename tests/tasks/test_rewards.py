import asyncio
import math
import os
from functools import partial

import numpy
import pytest
import torch
from transformers import TrainerState

from longgrpo.config.task import RewardConfig
from longgrpo.errors import ConfigError, RewardError
from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.builtin_rewards import (
    exact_answer,
    graded_error,
    last_number,
    matches_format,
    math_answer,
    numeric_answer,
    score_answer,
    soft_overlong,
    target_length,
)
from longgrpo.tasks.data import Problem
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.rewards import Reward, Rewarding
from longgrpo.tasks.sample import Sample
from testing import OWN_REWARDS
from testing.own_rewards import digits


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


def test_numeric_answer():
    texts = replies("so 1,024.", "1024.4", "none", "1 then 7")
    assert numeric_answer(texts, answer=["1024"] * 3 + ["seven"]) == [1, 0, 0, None]
    assert numeric_answer(texts, answer=["1024"] * 4, tolerance=0.5) == [1, 1, 0, 0]
    assert numeric_answer(texts, column="solution", solution=[1024] * 4) == [1, 0, 0, 0]


def test_math_answer_compares_expressions():
    seen = {}
    texts = (r"so \boxed{\frac{1}{2}}", "The answer is 0.5", "$x = 1/2$", r"\boxed{2}", "I do not know", "0.5")
    values = math_answer(
        replies(*texts),
        answer=[r"$\frac{1}{2}$"] * 5 + ["no number"],
        log_extra=lambda name, read: seen.update({name: read}),
    )
    assert values == [1, 1, 1, 0, 0, None]
    assert len(seen["math_answer"]) == len(texts)


def test_matches_format():
    texts = ("<think>a\nb</think>\n7", "<think>a</think>", "7", "<think>a", "x <think>a</think>",
             "<think>a<think>b</think>")  # fmt: skip
    assert matches_format(replies(*texts)) == [1, 1, 0, 0, 0, 0]
    assert matches_format(replies("7", "7."), pattern=r"\d+") == [1, 0]


@pytest.mark.parametrize(
    "reward",
    [exact_answer, numeric_answer, math_answer, graded_error, partial(matches_format, pattern="7"), score_answer],
)
def test_only_the_assistants_last_message_is_the_answer(reward):
    """Not what a tool says, nor what the model said before."""

    def episode(first, result, last):
        turns = [("assistant", first), ("tool", result), ("assistant", last)]
        return [{"role": role, "content": text} for role, text in turns]

    right, tools, earlier = episode("8", "8", "7"), episode("8", "7", "8"), episode("7", "8", "8")
    columns = {"answer": ["7"] * 4, "metadata": [{"source_dataset": "chain_sum"}] * 4}
    values = reward([right, tools, earlier, tools[:2]], **columns)
    assert values == reward(replies("7", "8", "8", "8"), **columns)
    assert values[0] > values[1]


def test_lengths():
    ids = [[0] * n for n in (70, 80, 90, 100, 120)]
    assert soft_overlong(ids, max_length=100, buffer=20) == [0, 0, -0.5, -1, -1]
    assert target_length(ids, target=80) == [-0.125, 0, -0.125, -0.25, -0.5]
    assert target_length([[0] * 200], target=80) == [-1]


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
        call(load_reward(RewardConfig(f"{OWN_REWARDS}:{name}")))


def test_a_function_that_returns_no_list():
    with pytest.raises(RewardError, match="f returned float"):
        call(Reward("f", lambda **_: 1.0))
    with pytest.raises(RewardError, match="f returned NoneType"):
        call(Reward("f", lambda **_: None))


@pytest.mark.parametrize("kind", [tuple, torch.tensor, numpy.array, iter])
def test_any_sequence_of_numbers_will_do(kind):
    assert call(Reward("f", lambda **_: kind([0.5, 1.0]))).tolist() == [0.5, 1.0]


def test_never_applicable():
    assert call(load_reward(RewardConfig(f"{OWN_REWARDS}:never"))).isnan().all()


def test_functions_are_found_by_module(monkeypatch):
    monkeypatch.syspath_prepend(str(OWN_REWARDS.parent))
    assert call(load_reward(RewardConfig("own_rewards:constant", 2.0))).tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("score_answr", "did you mean 'score_answer'"),
        (f"{OWN_REWARDS}:absent", "no function 'absent'"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ],
)
def test_functions_that_cannot_be_found(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(RewardConfig(spec))


# ---- at work


@pytest.fixture
def at_work():
    made = []

    def rewarding(*configs):
        rewards = [load_reward(RewardConfig(f"{OWN_REWARDS}:{name}", **options)) for name, options in configs]
        made.append(Rewarding(rewards))
        return made[-1]

    yield rewarding
    for one in made:
        one.close()


def groups(count, size=2):
    """Problems, one a sample, and samples whose text is their number."""
    samples = [
        Sample(g, [1], Completion([1] * (g + 1), [0.0] * (g + 1), "stop"), str(size * g + i))
        for g in range(count)
        for i in range(size)
    ]
    problems = [Problem(str(g), f"prompt {g}", {"answer": g}) for g in range(count) for _ in range(size)]
    return problems, samples


def run(rewarding, count=3, state=None):
    state = state or TrainerState()
    problems, samples = groups(count)
    for g in range(count):
        rewarding.begin(problems[2 * g], samples[2 * g : 2 * g + 2], state)
    return rewards_by_name(rewarding, rewarding.finish(problems, samples, state)), samples


def rewards_by_name(rewarding, values):
    """values [F, B]"""
    rows = [[None if math.isnan(value) else value for value in row] for row in values.tolist()]
    return dict(zip((reward.name for reward in rewarding.rewards), rows, strict=True))


def test_sync_and_async_functions_log_columns_and_metrics(at_work):
    rewarding = at_work(("logs", {}), ("logs_async", {"parameters": {"factor": 10}}))
    rewards, samples = run(rewarding, state=TrainerState(global_step=7, max_steps=9))
    assert rewards["logs"] == [0, 1, 2, 3, 4, 5]
    assert rewards["logs_async"] == [0, 10, 20, 30, 40, 50]
    assert [sample.extra for sample in samples] == [{"seen": f"7/9 {i}", "seen_async": i // 2} for i in range(6)]
    metrics = rewarding.metrics()
    assert metrics == {"calls_of": 6.0, "calls_of_async": 2.0}  # one call of all, one call a group
    assert rewarding.metrics() == {}


def test_an_async_function_works_while_others_are_sampled(tree, tmp_path, monkeypatch):
    """The second batch of the rollout waits for the reward of the first."""
    from longgrpo.config.run import build_config
    from longgrpo.rollout import transformers as engine_module
    from longgrpo.run.trainer import Trainer
    from longgrpo.train.loop import step

    tree["rewards"] = [{"function": f"{OWN_REWARDS}:digits_async"}]
    tree["task"]["eval_n"] = 0
    loop = Trainer(build_config(tree), tmp_path / "run").loop
    engine, rewarding = loop.collector.engine, loop.collector.rewarding
    monkeypatch.setattr(engine_module, "BATCH", 4)  # one group
    batch, waits = engine._batch, []
    done = rewarding.rewards[0].function.__globals__["digits_done"]

    def waiting(*arguments):
        waits.append(not waits or done.wait(30))
        return batch(*arguments)

    monkeypatch.setattr(engine, "_batch", waiting)
    result = step(loop, 1)
    assert waits[:3] == [True, True, True]  # then the probe
    assert result.metrics["grad_norm"] > 0
    assert result.rollout.rewards[0].flatten().tolist() == digits(
        [[{"content": s.text}] for s in result.rollout.samples]
    )
    rewarding.close()


@pytest.mark.parametrize("isolate", [False, True])
def test_training_and_evaluations_share_one_event_loop(tree, tmp_path, isolate):
    """Also if the caller has a loop that runs, as a notebook has."""
    from longgrpo.config.run import build_config
    from longgrpo.run.trainer import Trainer

    tree["rewards"] = [{"function": f"{OWN_REWARDS}:keeps_a_loop", "isolate": isolate}]
    tree["task"] |= {"eval_n": 2, "eval_reward": None}
    tree["train"]["steps"] = 1

    async def notebook():
        return Trainer(build_config(tree), tmp_path / "run").run()

    assert asyncio.run(notebook())["steps"] == 1


def test_an_object_with_an_async_call(at_work):
    rewarding = at_work(("judge", {}))
    assert rewarding.rewards[0].is_async
    rewards, _ = run(rewarding)
    assert rewards["judge"] == [1] * 6


def test_an_async_function_that_is_late_or_fails(at_work):
    late = at_work(("forever", {"timeout": 0.05}))
    with pytest.raises(RewardError, match=r"forever took longer than its timeout of 0\.05 s"):
        run(late)
    rewarding = at_work(("late_for_one", {"timeout": 0.2, "on_error": "none"}), ("logs", {}))
    rewards, _ = run(rewarding)
    assert rewards["late_for_one"] == [1, 1, None, None, 1, 1]
    assert rewarding.metrics()["reward/late_for_one/failed_calls"] == 1


def test_errors_may_count_as_not_applicable(at_work, caplog):
    rewarding = at_work(("raises", {"on_error": "none"}), ("too_few", {"on_error": "none"}), ("logs", {}))
    rewards, _ = run(rewarding)
    assert rewards["raises"] == rewards["too_few"] == [None] * 6
    assert rewards["logs"] == [0, 1, 2, 3, 4, 5]
    metrics = rewarding.metrics()
    assert metrics["reward/raises/failed_calls"] == metrics["reward/too_few/failed_calls"] == 1
    assert "raises raised KeyError" in caplog.text


def test_a_function_in_a_process_of_its_own(at_work):
    rewarding = at_work(("in_a_process", {"timeout": 60.0, "on_error": "none"}))
    here = os.getpid()
    for text in ("fine", "hang", "die"):
        rewarding.rewards[0].timeout = 0.5 if text == "hang" else 60.0
        problems, samples = groups(1)
        problems = [Problem(text, text, {}) for _ in problems]
        rewards = rewards_by_name(rewarding, rewarding.finish(problems, samples, TrainerState(global_step=3)))
        metrics = rewarding.metrics()
        if text == "fine":
            assert rewards["in_a_process"] == [3, 3]
            assert samples[0].extra["process"] != here
            assert metrics["in_a_process"] == 1
        else:
            assert rewards["in_a_process"] == [None, None]
            assert metrics["reward/in_a_process/failed_calls"] == 1


def test_a_function_that_cannot_be_loaded_in_its_process():
    with pytest.raises(ConfigError, match="has no function 'absent'"):
        load_reward(RewardConfig(f"{OWN_REWARDS}:absent", isolate=True))


def test_extra_columns_have_one_entry_a_completion(at_work):
    with pytest.raises(RewardError, match="logs_too_little logged as 'seen' 1 values for 6 completions"):
        run(at_work(("logs_too_little", {})))


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_a_function_changes_no_one_else_sees(kind):
    """Neither its group, nor another function, nor the next call on the same problems, nor the trained tokens."""

    def spoil(prompts, completions, completion_ids, meta, options, trainer_state, **_):
        seen = [len(p) + len(c) + len(i) + len(m) + len(options) for p, c, i, m in zip(
            prompts, completions, completion_ids, meta, strict=True)]  # fmt: skip
        for changed in (*prompts, *completions, *completion_ids, *meta, options):
            changed.append({"role": "user", "content": "more"})
        trainer_state.global_step += 1
        return [value + trainer_state.global_step for value in seen]

    async def spoil_async(**arguments):
        return spoil(**arguments)

    function = spoil if kind == "plain" else spoil_async
    rewards = [Reward(name, function, parameters={"options": [1]}) for name in ("first", "second")]
    problem = Problem("q", [{"role": "user", "content": "q"}], {"meta": [1, 2]})
    samples = [Sample(0, [1], Completion([5, 6], [0.0, 0.0], "stop"), "text") for _ in range(3)]
    rewarding, state = Rewarding(rewards), TrainerState()
    for _ in range(2):
        rewarding.begin(problem, samples, state)
        assert rewarding.finish([problem] * 3, samples, state).unique().tolist() == [1 + 1 + 2 + 2 + 1 + 1]
    rewarding.close()
    assert samples[0].completion.token_ids == [5, 6]
    again = [rewards[0]([problem.prompt], [[{"role": "assistant", "content": "x"}]], [[1, 2]], {"meta": [[1, 2]]},
             TrainerState()).values.tolist() for _ in range(2)]  # fmt: skip
    assert again == [[8], [8]]
