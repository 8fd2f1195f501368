"""Training begins with an adapter, or on a base into which one was merged."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from longgrpo.config.model import LoraConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.rollout.adapters import choose_mode
from longgrpo.run.export import export
from longgrpo.run.trainer import Trainer
from testing.families import FAMILIES, write_family

TOKENS = torch.tensor([[5, 9, 30, 12]])


def saved_adapter(tiny_model, directory, seed=0, rank=3, **options):
    """An adapter that changes the model, as PEFT writes it; returns its logits beside the directory."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(
        r=rank, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(TOKENS).logits


def logits(model):
    """By transformers' own attention, whatever the model trains with."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(TOKENS).logits
    base.set_attn_implementation(own)
    return found


@pytest.fixture
def short(tree):
    tree["task"]["eval_n"] = 0
    tree["train"] |= {"steps": 2, "save_steps": 1}
    return tree


def test_a_run_continues_an_adapter(short, tmp_path, tiny_model):
    path, expected = saved_adapter(tiny_model, tmp_path / "adapter")
    short["lora"] = {"path": str(path)}
    trainer = Trainer(build_config(short), tmp_path / "run")
    lora = trainer.config.lora
    assert (lora.rank, lora.alpha, lora.targets) == (3, 6, ["q_proj", "up_proj"])
    assert torch.allclose(logits(trainer.loop.state.model), expected, atol=1e-5)
    trainer.run()
    continued = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run/adapter"
    )
    assert not torch.allclose(logits(continued), expected, atol=1e-3)
    again = Trainer.resume(tmp_path / "run", ["--train.steps", "3"])
    assert torch.allclose(logits(again.loop.state.model), logits(continued), atol=1e-5)


def test_a_kl_term_compares_with_the_adapter_that_it_began_with(short, tmp_path, tiny_model):
    path, _ = saved_adapter(tiny_model, tmp_path / "adapter")
    from longgrpo.train.loop import step

    short |= {"lora": {"path": str(path)}, "loss": {"beta": 0.1}}
    loop = Trainer(build_config(short), tmp_path / "run").loop
    first, second = step(loop, 1).metrics, step(loop, 2).metrics
    assert abs(first["kl"]) < 1e-6 < second["kl"]


def test_a_run_stacks_an_adapter_on_a_merged_one(short, tmp_path, tiny_model):
    path, expected = saved_adapter(tiny_model, tmp_path / "adapter")
    short["lora"] |= {"merged": str(path)}
    trainer = Trainer(build_config(short), tmp_path / "run")
    model = trainer.loop.state.model
    assert torch.allclose(logits(model), expected, atol=1e-5)  # the new adapter is fresh: it changes nothing
    assert {p.shape[0] for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n} == {4}
    trained = Trainer(build_config(short), tmp_path / "trained")
    trained.run()
    exported = export(tmp_path / "trained", tmp_path / "model", "model")
    assert exported
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    both = AutoModelForCausalLM.from_pretrained(tiny_model)
    for adapter in (path, tmp_path / "trained/adapter"):
        both = peft.PeftModel.from_pretrained(both, adapter).merge_and_unload()
    assert torch.allclose(logits(whole), logits(both), atol=1e-5)
    assert not torch.allclose(logits(whole), expected, atol=1e-3)


def test_a_base_that_has_changed_is_not_merged_into_by_the_engine():
    lora = LoraConfig(rank=8, alpha=8)
    assert choose_mode(lora, mergeable=True, ranks=(8, 16)) == "merge"
    stacked = replace(lora, merged="adapter")
    assert choose_mode(stacked, mergeable=True, ranks=(8, 16)) == "views"
    with pytest.raises(ValueError, match=r"lora\.mode = merge: .*lora\.merged has changed it"):
        choose_mode(replace(stacked, mode="merge"), mergeable=True, ranks=(8, 16))


def test_adapters_that_do_not_fit(short, tmp_path, tiny_model):
    def refused(message, **lora):
        short["lora"] = lora
        with pytest.raises(ConfigError, match=message):
            Trainer(build_config(short), tmp_path / "run")

    refused(r"lora\.path = '.*nowhere': holds no adapter of PEFT", path=str(tmp_path / "nowhere"))
    dora, _ = saved_adapter(tiny_model, tmp_path / "dora", use_dora=True)
    refused(r"has use_dora = True, which the trainer does not train", path=str(dora))
    good, _ = saved_adapter(tiny_model, tmp_path / "good")
    from safetensors.torch import load_file, save_file

    tensors = load_file(good / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), good / "adapter_model.safetensors")
    refused(r"its weights do not fit this model, the first that does not: .*lora_", path=str(good))
    short["model"]["quantization"] = "nf4"
    refused(r"lora\.merged needs weights that are not quantized", merged=str(good))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", ["path", "merged"])
def test_vllm_samples_from_the_adapter_that_a_run_began_with(short, tmp_path, key, dtype):
    """Engine and trainer agree in every step, and both are far from the bare base."""
    pytest.importorskip("vllm")
    base = write_family(FAMILIES["Llama"], tmp_path / "base")
    path, _ = saved_adapter(base, tmp_path / "adapter", rank=8)
    short["model"] |= {"path": str(base), "dtype": dtype}
    short["lora"] = {"path": str(path)} if key == "path" else {"rank": 8, "alpha": 8, "merged": str(path)}
    short["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.05, "max_model_len": 128}
    Trainer(build_config(short), tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    apart = [row["engine_trainer_logprob_diff_mean"] for row in rows if row["step"] > 0]
    assert len(apart) == 2
    assert max(apart) < (1e-5 if dtype == "float32" else 0.05)
    plain = AutoModelForCausalLM.from_pretrained(base)
    began = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    assert (logits(began).log_softmax(-1) - logits(plain).log_softmax(-1)).abs().mean() > 0.2
