"""transformers' callbacks, unchanged: what they see and what they bring about."""

from __future__ import annotations

import json

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run import checkpoint
from longgrpo.run.trainer import Trainer


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Recorder(TrainerCallback):
    """Keeps every event with the step at which it came."""

    def __init__(self):
        self.events, self.logs = [], {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(args, state, control, **kwargs):
            self.events.append((name, state.global_step))
            self.logs[name] = (args, kwargs)

        return event


class Asks(TrainerCallback):
    """Wants something at a step."""

    def __init__(self, **wanted):
        self.wanted = wanted

    def on_step_end(self, args, state, control, **kwargs):
        for name, step in self.wanted.items():
            if state.global_step == step:
                setattr(control, name, True)
        return control


@pytest.fixture
def short(tree):
    tree["train"] |= {"steps": 3, "save_steps": 2, "probe_prompts": 0}
    return tree


def test_the_events_of_a_run_in_their_order(short, tmp_path):
    short["task"]["eval_steps"] = 2
    recorder = Recorder()
    trainer = Trainer(build_config(short), tmp_path / "run", callbacks=[recorder])
    model = trainer.loop.state.model
    trainer.run()
    step = [("on_step_begin", 0), ("on_step_end", 1), ("on_log", 1), ("on_step_begin", 1), ("on_step_end", 2)]
    assert recorder.events == [
        ("on_init_end", 0), ("on_train_begin", 0), *step, ("on_evaluate", 2), ("on_log", 2), ("on_save", 2),
        ("on_step_begin", 2), ("on_step_end", 3), ("on_log", 3), ("on_save", 3), ("on_train_end", 3),
    ]  # fmt: skip
    args, seen = recorder.logs["on_log"]
    assert seen["model"] is model
    assert seen["optimizer"] is trainer.loop.state.optimizer
    assert seen["logs"]["reward/mean"] == rows(tmp_path / "run")[-1]["reward/mean"]
    assert (args.max_steps, args.learning_rate, args.output_dir) == (3, 1e-2, str(tmp_path / "run"))
    assert recorder.logs["on_evaluate"][1]["metrics"]["eval_accuracy"] == rows(tmp_path / "run")[2]["eval/accuracy"]


def test_control_stops_saves_and_evaluates(short, tmp_path):
    short["train"] |= {"steps": 9, "save_steps": 0, "keep_checkpoints": 9}
    asks = Asks(should_save=1, should_evaluate=2, should_training_stop=4)
    summary = Trainer(build_config(short), tmp_path / "run", callbacks=[asks]).run()
    assert (summary["steps"], summary["stopped_early"]) == (4, True)
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/accuracy" in row] == [0, 2]
    assert "step-000001" in {path.name for path in checkpoint.checkpoints(tmp_path / "run")}
    assert Trainer.resume(tmp_path / "run").run()["steps"] == 9  # without the callback it goes on


@pytest.fixture
def scored(short, tmp_path):
    """Evaluations that solve this many of the 8 problems, one after the other."""

    def of(*solved):
        own = tmp_path / "scripted.py"
        own.write_text(
            f"solved = iter({list(solved)})\n"
            "def score(completions, **columns):\n"
            "    right = next(solved)\n"
            "    return [float(i < right) for i in range(len(completions))]\n"
        )
        short["task"] |= {"eval_reward": f"{own}:score", "eval_steps": 1}
        short["train"]["steps"] = 9
        return short

    return of


def test_early_stopping_as_it_comes(scored, tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    tree = scored(0, 3, 5, 5, 4, 8)
    assert Trainer(build_config(tree), tmp_path / "run", callbacks=[stopping]).run()["steps"] == 4


def test_a_callbacks_state_is_resumed(scored, tmp_path):
    tree = scored(0, 3, 2)
    tree["train"]["steps"] = 2
    Trainer(build_config(tree), tmp_path / "run", callbacks=[EarlyStoppingCallback(2)]).run()
    scored(3, 8)
    again = Trainer.resume(tmp_path / "run", ["--train.steps", "9"], callbacks=[EarlyStoppingCallback(2)])
    assert again.run()["steps"] == 3  # the second evaluation in a row without a higher one


def test_a_callback_named_in_the_config(short, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from transformers import TrainerCallback\n"
        "class Stops(TrainerCallback):\n"
        "    def on_log(self, args, state, control, logs, **kwargs):\n"
        "        control.should_training_stop = logs['step'] == 2\n"
    )
    short["train"]["callbacks"] = [f"{own}:Stops"]
    assert Trainer(build_config(short), tmp_path / "run").run()["steps"] == 2
    with pytest.raises(ConfigError, match=r"is no transformers\.TrainerCallback"):
        Trainer(build_config(short), tmp_path / "other", callbacks=[object()])
