"""A long run with everything on holds no more memory and no more files at its end than near its beginning."""

from __future__ import annotations

import gc

import psutil
import pytest

from longgrpo.config.run import build_config
from longgrpo.run import trainer as train_module
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS

STEPS, WARM = 1000, 300
PER_STEP = 16 << 10  # bytes: a fifth of the weights


@pytest.mark.long
def test_a_thousand_steps_grow_neither_in_memory_nor_in_open_files(tree, tmp_path, monkeypatch):
    tree["train"] |= {"steps": STEPS, "prompts_per_step": 1, "probe_prompts": 0, "save_steps": 100}
    del tree["lora"]
    tree["rollout"] |= {"num_generations": 2, "max_completion_length": 2}
    tree["task"]["eval_n"] = 0
    tree["loss"] = {"beta": 0.01}
    tree["rewards"] = [{"function": f"{OWN_REWARDS}:{name}"} for name in ("noisy_digits", "digits_async", "logs_mixed")]
    held, process, whole = {}, psutil.Process(), train_module.step

    def watched(loop, number):
        if number in (WARM, STEPS):
            gc.collect()
            held[number] = (process.memory_info().rss, process.num_fds(), process.num_threads())
        return whole(loop, number)

    monkeypatch.setattr(train_module, "step", watched)
    assert Trainer(build_config(tree), tmp_path / "run").run()["steps"] == STEPS
    assert held[STEPS][1:] == held[WARM][1:]
    assert held[STEPS][0] - held[WARM][0] < PER_STEP * (STEPS - WARM)
    assert len(list((tmp_path / "run/completions").iterdir())) == STEPS
