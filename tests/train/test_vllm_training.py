"""Five real steps: SmolLM2, vLLM in the process, the command of the README."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2-arithmetic.yaml"
SMALLER = ["--task.eval_n", "24", "--task.eval_prefill", "null", "--train.probe_prompts", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("five") / "run"
    command = [sys.executable, "-m", "longgrpo.cli", "train", EXAMPLE, "--rollout.engine", "vllm"]
    command += ["--output_dir", directory, "--train.steps", "5", "--train.prompts_per_step", "4", *SMALLER]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def steps(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def test_five_steps_are_finite(steps):
    assert [metrics["step"] for metrics in steps] == [1, 2, 3, 4, 5]
    for metrics in steps:
        assert all(math.isfinite(value) for value in metrics.values() if value is not None)
    assert any(metrics["grad_norm"] > 0 for metrics in steps)


def test_engine_and_trainer_agree_after_every_update(steps):
    for metrics in steps:
        assert metrics["engine_trainer_logprob_diff_mean"] <= 1e-5
        assert 0 < metrics["engine_trainer_logprob_diff_max"] <= 5e-4


def test_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == "vllm"
    assert summary["steps"] == 5
    assert 0 <= summary["eval_before"] <= 1
    assert 0 <= summary["eval_after"] <= 1
    low, high = summary["eval_diff_interval"]
    assert low <= summary["eval_after"] - summary["eval_before"] <= high
    assert {"seconds", "peak_rss_bytes", "engine_trainer_logprob_diff_max", "versions"} < summary.keys()


def test_the_adapter_gives_peft_and_transformers_what_was_trained(run):
    """Loaded afresh, the adapter says of the last completions what the engine would: the checkpoint's weights are in it."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from longgrpo.model.load import resolve_model

    torch.manual_seed(0)
    ids = torch.randint(0, 49_000, (1, 40))
    base = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m-instruct"), dtype=torch.float32)
    with torch.no_grad():
        untrained = base(ids).logits
        loaded = PeftModel.from_pretrained(base, run / "adapter")
        logits = loaded(ids).logits
        saved = load_file(run / "checkpoints/step-000005/state.safetensors")
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, saved[f"weight.{name}"])
    assert (logits - untrained).abs().max() > 1e-3
