"""What a run leaves loads elsewhere, and says there what it said here."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longgrpo import cli
from longgrpo.config.model import LoraConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, UserError
from longgrpo.model.load import published_name
from longgrpo.model.lora import add_lora, save_adapter
from longgrpo.run.export import export
from longgrpo.run.trainer import Trainer
from testing.models import random_model

IDS = torch.tensor([[5, 9, 30, 12]])


@pytest.fixture
def run(tree, tmp_path):
    """A run's directory, and the logits of its model at the end."""

    def start(**groups):
        running = Trainer(build_config(tree | groups), tmp_path / "run")
        state = running.loop.state
        assert running.run()
        base = state.model.get_base_model() if groups.get("lora", True) else state.model
        base.set_attn_implementation("eager")
        with torch.no_grad():
            return tmp_path / "run", state.model(IDS).logits

    return start


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def test_the_adapter_loads_in_peft(run, tmp_path, tiny_model):
    directory, trained = run()
    export(directory, tmp_path / "out", "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    untrained = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    assert torch.allclose(loaded, trained, atol=1e-5)
    assert not torch.allclose(loaded, untrained, atol=1e-3)
    modules = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules)  # the same bytes from every process
    assert any(module.endswith("q_proj") for module in modules)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_the_model_loads_in_transformers(run, tmp_path, lora):
    directory, trained = run(lora=lora)
    export(directory, tmp_path / "out", "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert torch.allclose(logits(loaded), trained, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_merged_weight_is_rounded_once(run, tmp_path):
    directory, _ = run()
    export(directory, tmp_path / "wide", "model")
    export(directory, tmp_path / "narrow", "model", dtype="bfloat16")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_any_checkpoint_can_be_taken(run, tmp_path, tree):
    tree["train"] |= {"save_steps": 1, "keep_checkpoints": 2, "best_metric": "-completion_length/mean"}
    directory, _ = run()
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]
    shortest = min(steps, key=lambda metrics: metrics["completion_length/mean"])["step"]
    for which, step in (("last", 4), ("3", 3), ("best", shortest)):
        assert export(directory, tmp_path / which, "adapter", which).name == f"step-{step:06d}"
        saved = load_file(directory / f"checkpoints/step-{step:06d}/adapter/adapter_model.safetensors")
        exported = load_file(tmp_path / which / "adapter_model.safetensors")
        assert all(torch.equal(saved[name], exported[name]) for name in saved)
    with pytest.raises(UserError, match=r"no checkpoint '7'; it has .*last"):
        export(directory, tmp_path / "7", "adapter", "7")


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    directory, _ = run(lora=None)
    with pytest.raises(ConfigError, match="has no adapter: export it as a model"):
        export(directory, tmp_path / "out", "adapter")
    with pytest.raises(ConfigError, match="exists already"):
        export(directory, directory, "model")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_packed_weights_stays_one(run, tmp_path):
    directory, _ = run()
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("quantization: null", "quantization: nf4"))
    with pytest.raises(ConfigError, match=r"trained on nf4 weights.*export it as an adapter"):
        export(directory, tmp_path / "out", "model")
    export(directory, tmp_path / "out", "adapter")


def test_the_command_line(run, tmp_path, capsys):
    directory, _ = run()
    accuracy = json.loads((directory / "summary.json").read_text())["eval_after"]
    assert cli.main(["eval", str(directory)]) == 0
    assert f"accuracy {accuracy:.3f} on 8 held-out problems" in capsys.readouterr().out
    assert cli.main(["export", str(directory), str(tmp_path / "out"), "--as", "model", "--checkpoint", "2"]) == 0
    assert "step-000002 as model" in capsys.readouterr().out
    config = directory / "config.yaml"
    assert cli.main(["eval", str(config), "--model.path", str(tmp_path / "out"), "--lora", "null"]) == 0
    assert "untrained" in capsys.readouterr().out
    assert cli.main(["export", str(directory), str(tmp_path / "out")]) == 2
    assert cli.main(["eval", str(directory), "--checkpoint", "worst"]) == 2


def test_the_model_keeps_the_template_that_it_was_trained_with(run, tmp_path, tree):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[-1]['content'] }}!")
    tree["task"] |= {"chat_template": str(template)}
    tree["train"] |= {"probe_prompts": 0}  # its replies have no end
    directory, _ = run()
    export(directory, tmp_path / "out", "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template.read_text()


@pytest.mark.parametrize(
    ("path", "name"),
    [("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
     ("/models/mine", None), ("model.gguf", None), ("./a/b", None)],
)  # fmt: skip
def test_a_published_base_goes_by_its_name(path, name, tmp_path):
    assert published_name(path) == name
    model = add_lora(random_model("llama"), LoraConfig(rank=2), seed=0)
    model.get_base_model().name_or_path = model.peft_config["default"].base_model_name_or_path = "/cache/models--x"
    save_adapter(model, tmp_path / "adapter", name)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == (name or "/cache/models--x")
