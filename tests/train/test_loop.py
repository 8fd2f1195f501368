"""The loop, whole, on a tiny model with the transformers engine."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, DataError, RewardError, TrainingError
from longgrpo.offload import OffloadEngine
from longgrpo.run import building
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from longgrpo.train.collect import Collector
from longgrpo.train.loop import step
from testing import OWN_REWARDS as OWN
from testing.commands import train_command, write_config

FILES = {
    "config.yaml",
    "metrics.jsonl",
    "completions",
    "tensorboard",
    "summary.json",
    "eval_before.json",
    "eval_after.json",
}


def trainer(tree, directory):
    return Trainer(build_config(tree), directory)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_state(directory):
    return load_file(sorted((directory / "checkpoints").iterdir())[-1] / "state.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def deterministic(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds", "tokens_per_second", "peak_"))}


@pytest.fixture
def config_file(tree, tmp_path):
    return write_config(tree, tmp_path / "tiny.yaml")


def test_offload_changes_no_bit(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "OffloadEngine", functools.partial(OffloadEngine, min_bytes=0))
    trainer(tree, tmp_path / "plain").run()
    trainer(tree | {"memory": {"offload": True, "inputs_on_device": 1}}, tmp_path / "offload").run()
    assert same(final_state(tmp_path / "plain"), final_state(tmp_path / "offload"))
    steps = [m for m in records(tmp_path / "offload" / "metrics.jsonl") if m["step"] > 0]
    moved = [m for m in steps if m["grad_norm"] > 0]
    assert moved
    for metrics in moved:
        assert metrics["offload/bytes_out"] > 0
        assert metrics["offload/host_peak"] > 0
        assert metrics["seconds/offload_stall"] >= 0


def test_tiled_mlp_gives_the_same_gradients(tree, tmp_path):
    trainer(tree, tmp_path / "plain").run()
    trainer(tree | {"memory": {"tiled_mlp": True}}, tmp_path / "tiled").run()
    plain, tiled = (records(tmp_path / name / "metrics.jsonl") for name in ("plain", "tiled"))
    steps = [(a, b) for a, b in zip(plain, tiled, strict=True) if a["step"] > 0]
    assert steps
    for a, b in steps:
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_run_leaves_what_it_promises(tree, tmp_path):
    summary = trainer(tree, tmp_path / "run").run()
    assert {path.name for path in (tmp_path / "run").iterdir()} > FILES
    assert summary == json.loads((tmp_path / "run/summary.json").read_text()) | {
        "eval_diff_interval": summary["eval_diff_interval"]  # JSON has no tuples
    }
    assert {"eval_before", "eval_after", "steps", "seconds", "peak_rss_bytes", "versions"} < summary.keys()
    assert summary["engine_trainer_logprob_diff_max"] < 5e-4
    zero, *steps = records(tmp_path / "run/metrics.jsonl")
    assert zero["step"] == 0
    assert 0 <= zero["groups_with_spread"] <= 1
    assert [metrics["step"] for metrics in steps] == [1, 2, 3, 4]
    for phase in ("scoring", "training"):
        assert steps[0][f"measured_bytes/{phase}"] == pytest.approx(steps[0][f"predicted_bytes/{phase}"], rel=0.05)
    for metrics in steps:
        assert {"reward/digits/mean", "reward/digits/std", "entropy", "clip_low", "clip_high", "kl"} < metrics.keys()
        assert {f"seconds/{phase.__name__}" for phase in PHASES} < metrics.keys()
        assert math.isfinite(metrics["loss"])
        assert metrics["grad_norm"] > 0


PHASES = (
    Collector.sample_prompts, Collector.roll_out, Collector.reward, loop.advantage,
    loop.score, loop.loss_and_backward, loop.optimizer_step, loop.sync_weights,
)  # fmt: skip


def test_rewards_rise(tree, tmp_path):
    del tree["lora"]
    tree["train"] |= {"steps": 15, "probe_prompts": 0}
    tree["rollout"]["num_generations"] = 8
    tree["task"]["eval_n"] = 0
    trainer(tree, tmp_path / "run").run()
    means = [metrics["reward/mean"] for metrics in records(tmp_path / "run/metrics.jsonl")]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.2


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_stopped_and_resumed_equals_one_that_was_not(tree, tmp_path, lora):
    tree["train"]["save_steps"] = 1
    if not lora:
        del tree["lora"]
    trainer(tree, tmp_path / "whole").run()

    tree["rewards"] = [{"function": f"{OWN}:stops_the_run"}]
    assert trainer(tree, tmp_path / "parts").run() is None
    config = tmp_path / "parts/config.yaml"  # with another reward function of the same values
    config.write_text(config.read_text().replace("stops_the_run", "digits"))
    resumed = Trainer.resume(tmp_path / "parts")
    assert resumed.progress.step == 2
    assert resumed.run()["steps"] == 4

    assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    whole, parts = (records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [m["step"] for m in parts] == [0, 1, 2, 3, 4]
    assert [deterministic(m) for m in whole[3:]] == [deterministic(m) for m in parts[3:]]


def test_killed_between_checkpoints_the_steps_are_done_again(tree, tmp_path, config_file):
    trainer(tree, tmp_path / "whole").run()
    run = tmp_path / "killed"
    own = tmp_path / "killer.py"
    own.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(OWN.parent)!r})\n"
        "import own_rewards\n"
        "calls = 0\n"
        "def digits(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 5: os.kill(os.getpid(), signal.SIGKILL)\n"  # the probe, then step 4: saved was step 2
        "    return own_rewards.digits(completions)\n"
    )
    arguments = (config_file, "--output_dir", run, "--rewards.0.function", f"{own}:digits")
    assert subprocess.run(train_command(*arguments), check=False).returncode == -signal.SIGKILL
    assert records(run / "metrics.jsonl")[-1]["step"] == 3
    assert subprocess.run(train_command("--resume", run), check=False).returncode == 0
    assert same(final_state(tmp_path / "whole"), final_state(run))
    assert [m["step"] for m in records(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(config_file, tmp_path, number):
    run = tmp_path / "run"
    process = subprocess.Popen(
        train_command(config_file, "--output_dir", run, "--train.steps", "100000"), stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 3/"):
            process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number, said
    assert f"go on with: longgrpo train --resume {run}" in said[-1]
    saved = json.loads((sorted((run / "checkpoints").iterdir())[-1] / "state.json").read_text())["step"]
    assert saved >= 3
    assert f"saved at step {saved};" in said[-1]
    assert subprocess.run(train_command("--resume", run, "--train.steps", saved + 1), check=False).returncode == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == saved + 1


def test_a_second_signal_stops_at_once_and_leaves_what_was_saved(tree, tmp_path):
    tree["rewards"] = [{"function": f"{OWN}:stops_at_once"}]
    tree["train"]["save_steps"] = 1
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(tree, tmp_path / "run").run()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_first_reward_says_by_default_what_is_solved(tree, tmp_path):
    del tree["task"]["eval_reward"]
    tree["train"]["steps"] = 1
    trainer(tree, tmp_path / "run").run()
    after = json.loads((tmp_path / "run/eval_after.json").read_text())
    assert after["scores"] == [sum(c.isdigit() for c in text) / 10 + len(text) / 100 for text in after["replies"]]


def test_replies_have_their_special_tokens_if_it_is_asked_for(tree, tmp_path):
    tree["rollout"]["sampling"] = {"skip_special_tokens": False, "allowed_token_ids": [1, 20, 21]}  # 1 ends a reply
    tree["train"]["steps"] = 1
    trainer(tree, tmp_path / "run").run()
    table = pyarrow.parquet.read_table(tmp_path / "run/completions").to_pydict()
    texts = table["completion"] + json.loads((tmp_path / "run/eval_after.json").read_text())["replies"]
    ended = [text.endswith("<end>") for text in texts]
    assert any(ended)
    assert ended[: len(table["finish_reason"])] == [reason == "stop" for reason in table["finish_reason"]]


def test_rewards_that_never_apply(tree, tmp_path):
    tree["rewards"] += [{"function": f"{OWN}:never"}]
    tree["train"]["steps"] = 1
    trainer(tree, tmp_path / "run").run()
    metrics = records(tmp_path / "run/metrics.jsonl")[-1]
    assert metrics["reward/never/mean"] is None
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/digits/mean"])
    assert pyarrow.parquet.read_table(tmp_path / "run/completions")["reward/never"].null_count == 12


def test_the_split_into_micro_batches_changes_nothing(tree, tmp_path):
    gradients = []
    for i, budget in enumerate((10_000, 60)):
        tree["train"]["token_budget"] = budget
        running, kept = trainer(tree, tmp_path / str(i)).loop, []
        running.state.optimizer.step = lambda state=running.state, kept=kept: kept.extend(
            gradient.clone() for gradient in state.gradients.values()
        )
        step(running, 1)
        gradients.append(kept)
    assert any(g.abs().max() > 1e-4 for g in gradients[0])
    for one, many in zip(*gradients, strict=True):
        assert torch.allclose(one, many, rtol=1e-4, atol=1e-6)


def test_groups_without_spread_cost_no_backward(tree, tmp_path, monkeypatch):
    tree["rewards"] = [{"function": f"{OWN}:constant"}]
    running = trainer(tree, tmp_path / "run").loop
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("backward without spread"))
    before = {name: parameter.clone() for name, parameter in running.state.parameters.items()}
    metrics = step(running, 1).metrics
    assert metrics["groups_with_spread"] == 0
    assert metrics["grad_norm"] == 0
    assert 0 < metrics["engine_trainer_logprob_diff_max"] < 5e-4  # compared all the same
    assert same(before, dict(running.state.parameters))


def test_a_run_without_spread_is_stopped_before_step_one(tree, tmp_path):
    tree["rewards"] = [{"function": f"{OWN}:constant"}]
    with pytest.raises(TrainingError, match=r"(?s)cannot learn.*FAIL  spread: .*0 of 8 groups.*--resume"):
        trainer(tree, tmp_path / "run").run()
    assert records(tmp_path / "run/metrics.jsonl") == []
    tree["train"] |= {"probe_prompts": 0, "steps": 1}
    assert trainer(tree, tmp_path / "untested").run()["steps"] == 1


def test_little_spread_is_warned_about(tree, tmp_path, capfd):
    tree["rewards"] = [{"function": f"{OWN}:one_group_in_eight"}]
    tree["train"] |= {"steps": 1, "probe_prompts": 8}
    assert trainer(tree, tmp_path / "run").run()["groups_with_spread_before"] == 0.125
    assert "warning: in 88% of the groups all completions earn the same" in capfd.readouterr().err


@pytest.mark.parametrize("lora", [True, False])
def test_a_kl_term_holds_the_policy_near_its_reference(tree, tmp_path, lora):
    tree["loss"] = {"beta": 0.1}
    if not lora:
        del tree["lora"]
    running = trainer(tree, tmp_path / "run").loop
    first, second = step(running, 1).metrics, step(running, 2).metrics
    assert abs(first["kl"]) < 1e-6 < second["kl"]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_each_normalizer(tree, tmp_path, loss_type):
    tree["loss"] = {"loss_type": loss_type}
    metrics = step(trainer(tree, tmp_path / "run").loop, 1).metrics
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_a_reward_function_that_fails_loses_nothing(tree, tmp_path):
    trainer(tree, tmp_path / "whole").run()
    tree["rewards"] = [{"function": f"{OWN}:raises_at_step_three"}]
    with pytest.raises(RewardError, match=r"(?s)raises_at_step_three raised KeyError.*saved at step 2; go on with"):
        trainer(tree, tmp_path / "run").run()
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("raises_at_step_three", "digits"))
    Trainer.resume(tmp_path / "run").run()
    assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "run"))


def test_a_prompt_longer_than_the_context_is_refused_before_training(tree, tmp_path):
    tree["rollout"]["max_model_len"] = 40
    with pytest.raises(DataError, match="the context 40"):
        trainer(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(tree, tmp_path):
    trainer(tree, tmp_path / "run").run()
    with pytest.raises(ConfigError, match="holds a run already"):
        trainer(tree, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no run"):
        Trainer.resume(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.path", "/no/such/model"], "/no/such/model"),
        (["--train.stepz", "5"], "did you mean 'steps'"),
        (["--rollout.num_generations", "1"], "num_generations = 1"),
        (["--task.name", "chain_sumz"], "did you mean chain_sum"),
    ],
)
def test_the_command_line_says_what_to_put_right(config_file, arguments, message):
    done = subprocess.run(train_command(config_file, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config(config_file):
    done = subprocess.run(train_command(config_file, "--print-config"), capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["rollout"]["temperature"] == 1.0


def test_a_second_run_of_a_config_gets_its_own_directory(config_file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    for _ in range(2):
        arguments = train_command(config_file, "--train.steps", "1")
        subprocess.run(arguments, cwd=tmp_path, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2"}


def test_the_adapter_gives_peft_the_same_logits(tree, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    running = trainer(tree, tmp_path / "run")
    ids = torch.tensor([[5, 9, 30, 12]])
    state = running.loop.state
    running.run()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untrained = base(ids).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "run/adapter")(ids).logits
    state.model.base_model.model.set_attn_implementation("eager")
    assert torch.allclose(loaded, state.model(ids).logits, atol=1e-5)
    assert not torch.allclose(loaded, untrained, atol=1e-3)


def test_a_fully_trained_model_is_written_whole(tree, tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    del tree["lora"]
    trainer(tree, tmp_path / "run").run()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").chat_template
    saved = final_state(tmp_path / "run")
    written = load_file(tmp_path / "run/model/model.safetensors")
    assert {f"weight.{name}" for name in written} == {
        name for name in saved if name.startswith("weight.")
    }  # tied: once
    for name, tensor in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters():
        assert torch.equal(trained[name], saved[f"weight.{name}"])
        assert not torch.equal(trained[name], tensor)
