"""Two ranks with vLLM in each, by the command that a user types, against one rank with all prompts."""

from __future__ import annotations

import json
import math
import os
import subprocess

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from longgrpo._ops import fixed
from testing import OWN_REWARDS, ROOT
from testing.commands import train_command, write_config
from testing.models import write_tiny_llama

pytest.importorskip("vllm")

BITWISE = "bfloat16" if fixed.has_bf16() else "float32"
EXAMPLE = ROOT / "examples" / "smollm2-sums.yaml"
WHOLE = ["--train.steps", "2", "--train.save_steps", "1", "--train.probe_prompts", "0", "--task.eval_n", "0"]


def trained(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        train_command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def steps_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]  # 0: what the self-test measured


def distance(one, two, prefix):
    """Of the tensors of two checkpoints whose names begin so, and the length of the first ones."""
    names = [name for name in one if name.startswith(prefix)]
    assert names
    length = math.hypot(*(float(one[name].double().norm()) for name in names))
    return math.hypot(*(float((one[name].double() - two[name].double()).norm()) for name in names)), length


def assert_like_one_rank(one, two, loss=1e-7):
    assert len(steps_of(one)) == 2
    moved = 0.0  # how far apart the step's weights are: that moves its loss by at most the gradient times as much
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        step, gradient = a["step"], 1e-6 if a["step"] == 1 else 2e-5
        tables = [pyarrow.parquet.read_table(run / f"completions/step-{step:06d}.parquet") for run in (one, two)]
        assert tables[0].to_pydict() == tables[1].to_pydict()  # replies and advantages
        states = [load_file(run / f"checkpoints/step-{step:06d}/state.safetensors") for run in (one, two)]
        apart, length = distance(*states, "exp_avg.")  # the gradient, in AdamW's first moment
        assert apart <= gradient * length
        assert math.isclose(a["loss"], b["loss"], abs_tol=loss + a["grad_norm"] * moved)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=gradient)
        assert a["grad_norm"] > 0
        assert b["engine_trainer_logprob_diff_max"] < 5e-4
        moved = distance(*states, "weight.")[0]


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.long)])
def test_two_ranks_of_a_tiny_model(tree, tmp_path, lora):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # as vLLM has them
    tree["model"]["path"] = str(write_tiny_llama(tmp_path / "model", **sizes))
    tree["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.05}
    tree["rewards"] = [{"function": f"{OWN_REWARDS}:digits"}]
    tree["train"]["prompts_per_step"] = 4
    if not lora:
        del tree["lora"]
    file = write_config(tree, tmp_path / "tiny.yaml")
    options = WHOLE if lora else [*WHOLE, "--train.probe_prompts", "2"]
    trained(file, *options, "--output_dir", tmp_path / "one")
    trained(file, *options, "--output_dir", tmp_path / "two", "--ranks", "2")
    # The loss is the sum of terms that cancel: their magnitudes add up to 1 or so, and float32 rounds both sums.
    assert_like_one_rank(tmp_path / "one", tmp_path / "two", loss=2 * torch.finfo(torch.float32).eps)


@pytest.mark.long
def test_two_ranks_of_smollm2(tmp_path):
    options = [EXAMPLE, "--rollout.engine", "vllm", *WHOLE, "--train.prompts_per_step", "8"]
    options += ["--train.token_budget", "128"]  # a micro-batch a group
    # The importance ratio has the engine's logprobs in it, which round by how many sequences share a forward.
    options += ["--rollout.importance", "none"]
    trained(*options, "--output_dir", tmp_path / "one")
    trained(*options, "--output_dir", tmp_path / "two", "--ranks", "2")
    assert_like_one_rank(tmp_path / "one", tmp_path / "two")


def test_two_ranks_with_shared_operators_have_no_difference(tree, tmp_path):
    """rollout.bitwise: of both ranks' tokens, in every step."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    tree["model"] = {"path": str(write_tiny_llama(tmp_path / "model", **sizes)), "dtype": BITWISE}
    tree["lora"] = {"rank": 8, "alpha": 8, "mode": "views"}
    tree["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.05, "bitwise": True, "importance": "none"}
    tree["task"]["eval_n"] = 0
    tree["train"] |= {"prompts_per_step": 4, "steps": 20, "probe_prompts": 0, "token_budget": 60}
    trained(write_config(tree, tmp_path / "tiny.yaml"), "--output_dir", tmp_path / "run", "--ranks", "2")
    steps = steps_of(tmp_path / "run")
    names = ("engine_trainer_logprob_diff_max", "probe_logprob_diff", "importance_ratio_mean")
    assert [tuple(step[name] for name in names) for step in steps] == [(0.0, 0.0, 1.0)] * 20
    assert any(step["grad_norm"] > 0 for step in steps)
