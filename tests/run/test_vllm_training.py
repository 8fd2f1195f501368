"""Five real steps: SmolLM2, vLLM in the process, the command of the README."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from testing import ROOT

EXAMPLE = ROOT / "examples" / "smollm2-sums.yaml"
SMALLER = ["--task.eval_n", "24", "--train.probe_prompts", "4"]


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


@pytest.mark.parametrize("phase", ["rollout", "scoring", "training"])
def test_the_peak_of_each_phase_is_the_predicted_one(phase, steps):
    assert steps[0][f"measured_bytes/{phase}"] == pytest.approx(steps[0][f"predicted_bytes/{phase}"], rel=0.05)


def test_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == "vllm"
    assert summary["steps"] == 5
    assert 0 <= summary["eval_before"] <= 1
    assert 0 <= summary["eval_after"] <= 1
    low, high = summary["eval_diff_interval"]
    assert low <= summary["eval_after"] - summary["eval_before"] <= high
    assert {"seconds", "peak_rss_bytes", "engine_trainer_logprob_diff_max", "versions"} < summary.keys()


def conversation(question):
    """The turns of a prompt: what to do, the example, its answer, and the question."""
    turns = zip(("system", "user", "assistant", "user"), question.splitlines(), strict=True)
    return [{"role": role, "content": content} for role, content in turns]


def test_peft_and_transformers_give_the_adapter_the_engines_replies(run):
    """The adapter, loaded as any user would, holds the trained weights, and says what the engine said at the end."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longgrpo.model.load import resolve_model

    directory = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), run / "adapter")
    saved = load_file(run / "checkpoints/step-000005/state.safetensors")
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert {f"weight.{name}" for name in adapter} == {name for name in saved if name.startswith("weight.")}
    assert all(torch.equal(parameter, saved[f"weight.{name}"]) for name, parameter in adapter.items())
    assert any(parameter.abs().max() > 0 for name, parameter in adapter.items() if "lora_B" in name)

    after = json.loads((run / "eval_after.json").read_text())
    for question, reply in list(zip(after["questions"], after["replies"], strict=True))[:4]:
        inputs = tokenizer.apply_chat_template(
            conversation(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == reply


ADAPTER = """
import json, sys
from longgrpo.rollout import vllm_private
vllm = vllm_private.import_vllm()
from vllm.lora.request import LoRARequest
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = vllm.LLM(base, dtype="float32", max_model_len=512, enable_lora=True, max_lora_rank=16, enforce_eager=True,
               kv_cache_memory_bytes=2**28, disable_log_stats=True)
with vllm_private.no_dynamo():
    greedy = vllm.SamplingParams(temperature=0, max_tokens=16)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    done = llm.generate(requests, greedy, lora_request=LoRARequest("run", 1, adapter))
print("REPLIES", json.dumps([output.outputs[0].text for output in done]))
"""


@pytest.mark.long
def test_vllm_loads_what_is_exported(run, tmp_path):
    """The merged model and the adapter alone, each in a vLLM of its own, give the replies of the end of the run."""
    from transformers import AutoTokenizer

    from longgrpo.model.load import resolve_model
    from longgrpo.run.export import export

    export(run, tmp_path / "model", "model")
    export(run, tmp_path / "adapter", "adapter")
    after = json.loads((run / "eval_after.json").read_text())
    command = [sys.executable, "-m", "longgrpo.cli", "eval", run / "config.yaml", "--model.path", tmp_path / "model"]
    done = subprocess.run([*map(str, command), "--lora", "null"], capture_output=True, text=True, check=True)
    accuracy = sum(score >= 1 for score in after["scores"]) / len(after["scores"])
    assert f"accuracy {accuracy:.3f} on 24 held-out problems" in done.stdout

    directory = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chats = [conversation(question) for question in after["questions"][:8]]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    command = [sys.executable, "-c", ADAPTER, directory, tmp_path / "adapter", json.dumps(prompts)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    replies = next(line for line in done.stdout.splitlines() if line.startswith("REPLIES"))
    assert json.loads(replies.removeprefix("REPLIES ")) == after["replies"][:8]
