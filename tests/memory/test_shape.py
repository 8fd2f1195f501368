"""Shapes read from config.json alone. The oracles: the published numbers of parameters, and transformers' own model."""

import pytest
import torch

from longgrpo.memory.shape import FAMILIES, UnknownArchitecture, model_shape, shape_from_config
from testing.planned_runs import MODELS, SMOLLM2

PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "phi-4": 14_659_507_200,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-8b-128k": 8_190_735_360,
    "gemma-7b": 8_537_680_896,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert model_shape(str(MODELS / name)).parameters == PUBLISHED[name]


def test_there_is_a_model_of_each_family():
    assert {model_shape(str(MODELS / name)).kind for name in PUBLISHED} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_linears_are_those_of_transformers(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(MODELS / name, local_files_only=True)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    ours = {(x.name, x.inputs, x.outputs, x.bias) for x in model_shape(str(MODELS / name)).linears}
    theirs = {
        (path.rpartition(".")[2], m.in_features, m.out_features, m.bias is not None)
        for path, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert ours == theirs


def test_an_architecture_without_formulas_has_the_sizes_of_its_class():
    shape = shape_from_config({"model_type": "gpt2", "n_embd": 96, "n_head": 4, "n_positions": 77}, "here")
    assert (shape.hidden, shape.heads, shape.head_dim, shape.kv_heads, shape.mlp) == (96, 4, 24, 4, 384)
    assert (shape.layers, shape.vocabulary, shape.context) == (12, 50257, 77)  # the class's own
    assert not shape.has_formulas


def test_an_architecture_that_transformers_does_not_know_is_named():
    with pytest.raises(UnknownArchitecture, match=r"here: transformers does not know the architecture 'llama9'"):
        shape_from_config(SMOLLM2 | {"model_type": "llama9"}, "here")


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match=r"here: config\.json has no 'vocab_size'"):
        shape_from_config({k: v for k, v in SMOLLM2.items() if k != "vocab_size"}, "here")
