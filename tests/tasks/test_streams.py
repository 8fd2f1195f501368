"""Rows that can only be read in their order, as a run draws from them."""

from __future__ import annotations

import json

import pytest

from longgrpo.config.run import build_config
from longgrpo.config.task import TaskConfig
from longgrpo.errors import DataError
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.data import Problems, PromptStream, held_out_problems, make_sampler
from longgrpo.tasks.sources import Streamed, load_rows

ROWS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(7)]


def drawn(task, given=None, held_out=frozenset()):
    source = Problems(load_rows(task, given=given), task, chat=False)
    return PromptStream(source, set(held_out), make_sampler(task, source))


def questions(problems):
    return [problem.question for problem in problems]


def test_a_stream_is_read_in_its_order_again_and_again():
    begun = []

    def rows():
        begun.append(1)
        yield from ROWS

    stream = Streamed(rows)
    assert [stream[i]["answer"] for i in (0, 1, 2, 2, 1, 5)] == ["0", "1", "2", "2", "1", "5"]
    assert len(begun) == 2
    assert [stream[i]["answer"] for i in range(5, 16)] == [str(i % 7) for i in range(5, 16)]
    assert len(stream) == 7


def test_a_function_that_yields_and_a_data_set_that_streams(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.py"
    own.write_text("def rows(split, count):\n    for i in range(count): yield {'prompt': f'{i}?', 'answer': str(i)}\n")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    for task in (
        TaskConfig(f"{own}:rows", {"count": 7}),
        TaskConfig(str(tmp_path / "rows.parquet"), {"streaming": True}),
    ):
        assert isinstance(load_rows(task), Streamed)
        stream = drawn(task)
        assert questions(stream.take(9)) == [row["prompt"] for row in [*ROWS, *ROWS[:2]]]
        assert stream.epoch == pytest.approx(9 / 7)


def test_a_stream_given_its_position_goes_on():
    task = TaskConfig("given:rows")
    running = drawn(task, {"given:rows": iter_again()})
    running.take(10)
    state = json.loads(json.dumps(running.state))
    rest = questions(running.take(6))
    again = drawn(task, {"given:rows": iter_again()})
    again.state = state
    assert questions(again.take(6)) == rest


def iter_again():
    class Rows:
        def __iter__(self):
            return iter(ROWS)

    return Rows()


def test_the_first_of_a_stream_are_held_out():
    task = TaskConfig("given:rows", eval_n=2)
    source = Problems(load_rows(task, True, {"given:rows": iter_again()}), task, chat=False)
    held_out = questions(held_out_problems(source, task))
    assert held_out == ["0?", "1?"]
    assert questions(drawn(task, {"given:rows": iter_again()}, held_out).take(6)) == [
        "2?",
        "3?",
        "4?",
        "5?",
        "6?",
        "2?",
    ]


def test_what_cannot_be_read_again_is_named():
    task = TaskConfig("given:rows")
    running = drawn(task, {"given:rows": iter(ROWS)})
    running.take(7)
    with pytest.raises(DataError, match="was read before and does not begin again"):
        running.take(1)
    with pytest.raises(DataError, match="the stream of rows is empty"):
        drawn(task, {"given:rows": iter([])})


def test_a_run_on_a_stream_is_resumed_bit_for_bit(tree, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def rows(split):\n    for i in range(5): yield {'prompt': f'What is {i}?', 'answer': str(i)}\n")
    tree["task"] = {"name": f"{own}:rows", "eval_n": 0}
    Trainer(build_config(tree), tmp_path / "whole").run()
    tree["train"]["steps"] = 2
    Trainer(build_config(tree), tmp_path / "parts").run()
    Trainer.resume(tmp_path / "parts", ["--train.steps", "4"]).run()
    names = [path.name for path in (tmp_path / "whole/completions").iterdir()]
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "whole/completions" / name).read_bytes() == (
            tmp_path / "parts/completions" / name
        ).read_bytes()
