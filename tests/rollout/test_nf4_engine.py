"""One packed copy of the weights: bytes, agreement and gradients, on SmolLM2 and on layouts that it does not have."""

import json

import psutil
import pytest
import torch
from torch.nn.functional import cross_entropy

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.model import nf4
from longgrpo.model.load import load_model, model_on
from longgrpo.model.lora import add_lora
from longgrpo.rollout import RolloutConfig, Sampling, make_engine, vllm_private
from testing.agreement import CONTEXT, SMOLLM2, assert_agrees, sampled_logprobs, trainer_logprobs
from testing.engines import PROMPTS, change, running, sample, write_model
from testing.models import trainable_parameters

pytest.importorskip("vllm")
pytest.importorskip("bitsandbytes")
LORA = LoraConfig(rank=8, alpha=8)
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def storages(module):
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def engine_module(engine):
    return vllm_private.engine_module(engine.llm)


def packed_modules(model):
    return {n.replace(".base_layer", "") for n, m in model.named_modules() if isinstance(m, nf4.NF4Linear)}


def gradients(model, tokens):
    model.zero_grad()
    logits = model(tokens).logits
    cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    return [p.grad.clone() for p in trainable_parameters(model)]


@pytest.mark.parametrize(("architecture", "linears"), [("llama", 7), ("qwen2", 7), ("gemma3_text", 7), ("phi3", 4)])
def test_one_packed_copy_serves_both(architecture, linears, tmp_path):
    write_model(architecture, tmp_path)
    with running(tmp_path, quantization="nf4") as (engine, model):
        assert len(packed_modules(model)) == 2 * linears
        assert storages(model) == storages(engine_module(engine))
        assert_agrees(model, PROMPTS, sample(engine))


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=4, alpha=8)], ids=["views", "copy"])
def test_agreement_under_an_adapter(lora, tmp_path):
    write_model("llama", tmp_path)
    with running(tmp_path, lora, quantization="nf4") as (engine, model):
        for _ in range(2):
            change(model)
            engine.weights_changed()
            completions = sample(engine)
            assert_agrees(model, PROMPTS, completions)
        with model.disable_adapter():
            base = trainer_logprobs(model, PROMPTS, completions)
        assert (base - sampled_logprobs(completions)).abs().mean() > 1e-2


def test_gradients_are_the_same_after_a_rollout(tmp_path):
    """bitsandbytes' own layer packs itself anew in eval mode on a CPU with AVX512-BF16: then they are not."""
    write_model("llama", tmp_path)
    tokens = torch.tensor([PROMPTS[3]])
    with running(tmp_path, LORA, quantization="nf4") as (engine, model):
        change(model)
        engine.weights_changed()
        packed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        before = gradients(model.train(), tokens)
        sample(engine)
        model.eval()(tokens)
        sample(engine)
        after = gradients(model.train(), tokens)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert any(gradient.abs().max() > 0 for gradient in before)
        assert all(torch.equal(model.get_parameter(name), kept) for name, kept in packed.items())
        # The same again from a model that no engine has touched.
        alone = add_lora(load_model(tmp_path, quantization="nf4"), LORA, seed=0)
        change(alone)
        for ours, theirs in zip(after, gradients(alone.train(), tokens), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_transformers_engine_takes_it_as_well(tmp_path):
    write_model("llama", tmp_path)
    config = ModelConfig(str(tmp_path), quantization="nf4")
    engine = make_engine(RolloutConfig(engine="transformers"), config, LORA)
    model = add_lora(engine.model, LORA, seed=0)
    assert len(packed_modules(model)) == 2 * 7
    engine.attach(model)
    change(model)
    tokens = torch.tensor([PROMPTS[3]])
    before = gradients(model.train(), tokens)
    completions = sample(engine)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model.train(), tokens), before, strict=True))
    assert_agrees(model, PROMPTS, completions)


def test_a_fused_projection_is_left_out_whole(tmp_path):
    """The config leaves out one part of qkv, and all of an MLP: dynamic 4-bit."""
    write_model("llama", tmp_path)
    left_out = ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = NF4 | {"llm_int8_skip_modules": left_out}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with running(tmp_path, LORA, quantization="nf4") as (engine, model):
        whole = {"model.layers.0.self_attn." + part for part in ("q_proj", "k_proj", "v_proj")}
        whole |= {"model.layers.1.mlp." + part for part in ("gate_proj", "up_proj", "down_proj")}
        linears = {n.removesuffix(".base_layer") for n, m in model.get_base_model().named_modules() if "_proj" in n}
        linears = {name for name in linears if name.endswith("_proj")}
        assert packed_modules(model.get_base_model()) == linears - whole
        change(model)
        engine.weights_changed()
        assert_agrees(model, PROMPTS, sample(engine))


@pytest.mark.parametrize("left_out", [[], ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]])
def test_a_checkpoint_that_is_packed_already(left_out, tmp_path):
    """Written by transformers and bitsandbytes, with scales in 8 bits; the trainer's own loading agrees as well."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    write_model("llama", tmp_path / "whole")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *left_out],
    )
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    packed.save_pretrained(tmp_path / "packed")
    with running(tmp_path / "packed", quantization="nf4") as (engine, model):
        assert storages(model) == storages(engine_module(engine))
        completions = sample(engine)
        assert_agrees(model, PROMPTS, completions)
        assert_agrees(load_model(tmp_path / "packed", quantization="nf4"), PROMPTS, completions)


def test_smollm2_in_a_third_of_its_memory(prompts):
    """538 MB of weights are 173 in the engine, and next to nothing more in the trainer."""
    config = ModelConfig(SMOLLM2.path, quantization="nf4")
    engine = make_engine(RolloutConfig(engine="vllm", max_model_len=CONTEXT, kv_cache_gib=0.2), config)
    try:
        assert sum(p.nbytes for p in engine_module(engine).parameters()) < 175e6
        assert storages(engine.model) == storages(engine_module(engine))
        process = psutil.Process()
        before = process.memory_info().rss
        views = vllm_private.weight_views(engine_module(engine), engine.model.config.vocab_size)
        again = model_on(views, engine.directory)
        assert process.memory_info().rss - before < 20e6
        completions = engine.generate(prompts, Sampling(max_tokens=16), range(8))
        assert_agrees(again, prompts, completions)
    finally:
        engine.close()


def test_what_packed_weights_cannot_do_is_refused(tmp_path):
    write_model("llama", tmp_path)
    with (
        pytest.raises(ValueError, match=r"lora\.mode = merge: B A would be rounded away"),
        running(tmp_path, LoraConfig(mode="merge"), quantization="nf4"),
    ):
        pass
    tree = {
        "model": {"path": "x", "quantization": "nf4"},
        "task": {"name": "chain_sum"},
        "rewards": [{"function": "f"}],
    }
    with pytest.raises(ConfigError, match=r"quantization = nf4 without lora: packed weights cannot be trained"):
        build_config(tree)
    assert build_config(tree | {"lora": {}}).model.quantization == "nf4"
