"""GGUF files that we write, read back by transformers' own loader and by ours."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from longgrpo.model import to_gguf
from longgrpo.model.load import load_model, load_tokenizer, resolve_model
from longgrpo.model.to_gguf import write_gguf
from testing.models import random_model

TEXTS = ["What is 12 + 345? Don't guess:  think.\n\n<|end|>", "naïve, 2026 räksmörgås\t!"]
SPLITS = {
    "qwen2": [pre_tokenizers.Split(Regex(to_gguf._WORDS % ""), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(to_gguf._WORDS % "{1,3}"), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGGRPO_CACHE", str(tmp_path / "cache"))


def byte_level(split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template="{{ messages[0].content }}"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("qwen2")


def tiny(architecture, tokenizer, **options):
    """A vocabulary larger than the tokenizer's, as Qwen's is."""
    special = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return random_model(architecture, vocab_size=len(tokenizer) + 20, intermediate_size=64, **special, **options)


def as_held(model, kind):
    """The model with its matrices rounded as the type says, by the definition of its blocks."""

    def q8(values):
        blocks = values.reshape(-1, 32)
        scale = numpy.abs(blocks).max(1, keepdims=True) / 127
        with numpy.errstate(divide="ignore", invalid="ignore"):
            whole = numpy.where(scale > 0, numpy.round(blocks / scale), 0)
        return (whole * scale.astype(numpy.float16).astype(numpy.float32)).reshape(values.shape)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                held = parameter.bfloat16() if kind == "bfloat16" else torch.from_numpy(q8(parameter.numpy()))
                parameter.copy_(held)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 30, 77, 12]])).logits.float()


@pytest.mark.parametrize("kind", ["bfloat16", "q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_comes_back_with_equal_logits(architecture, kind, tokenizer, tmp_path):
    heads = {"head_dim": 128} if architecture == "qwen3" else {}  # of another size transformers reads nothing
    model = tiny(architecture, tokenizer, tie_word_embeddings=architecture != "qwen2", **heads)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", kind)
    expected = logits(as_held(model, kind))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    ours = load_model(resolve_model(str(tmp_path / "model.gguf")))
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)
    assert ours.config.tie_word_embeddings == (architecture != "qwen2")


def test_llama_3s_rotary_embedding_comes_back(tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    model = tiny("llama", tokenizer, rope_parameters=rope)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "bfloat16")
    ours = load_model(resolve_model(str(tmp_path / "model.gguf")))
    assert ours.config.rope_parameters["factor"] == 8.0
    torch.testing.assert_close(logits(ours), logits(as_held(model, "bfloat16")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_is_said(split, tmp_path):
    tokenizer = byte_level(split)
    write_gguf(tiny("qwen2", tokenizer), tokenizer, tmp_path / "model.gguf", "bfloat16")
    header = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.get_field("tokenizer.ggml.pre").contents() == split
    assert header.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert header.get_field("tokenizer.ggml.eos_token_id").contents() == 0
    types = header.get_field("tokenizer.ggml.token_type").contents()
    assert (types[0], types[5], types[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    if split == "qwen2":  # transformers splits all of them so
        back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert [back(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_metadata_of_a_file_is_kept(tokenizer, tmp_path):
    model = tiny("llama", tokenizer)
    write_gguf(model, tokenizer, tmp_path / "first.gguf", "q8_0")
    directory = resolve_model(str(tmp_path / "first.gguf"))
    again, own = load_model(directory), load_tokenizer(directory)
    write_gguf(again, own, tmp_path / "second.gguf", "bfloat16", source=tmp_path / "first.gguf")

    def said(name):
        fields = gguf.GGUFReader(tmp_path / name).fields
        return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}

    first, second = said("first.gguf"), said("second.gguf")
    assert {key for key in first if first[key] != second.get(key)} <= {"general.file_type", "tokenizer.chat_template"}
    assert first.keys() == second.keys()


@pytest.mark.parametrize(("architecture", "options", "said"), [
    ("gemma2", {}, "a gemma2 model is not written; llama, qwen2, qwen3 are"),
    ("llama", {"intermediate_size": 48}, "has rows of 48 values, and blocks have 32"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "of type 'linear'"),
])  # fmt: skip
def test_what_a_file_cannot_say_is_refused(architecture, options, said, tokenizer, tmp_path):
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 64, "eos_token_id": 0, "bos_token_id": None} | options
    with pytest.raises(ValueError, match=said):
        write_gguf(random_model(architecture, **sizes), tokenizer, tmp_path / "model.gguf", "bfloat16")


def test_a_tokenizer_without_a_name_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="no name that we know for how this tokenizer splits text"):
        write_gguf(load_model(tiny_model), load_tokenizer(tiny_model), tmp_path / "model.gguf", "bfloat16")
