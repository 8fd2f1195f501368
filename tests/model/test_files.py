"""A model's files: what is missing or damaged is named, and nothing from a repository is run."""

from __future__ import annotations

import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.model.load import context_length, end_token_ids, load_model, load_tokenizer
from longgrpo.model.lora import with_adapter
from longgrpo.rollout.factory import make_engine
from longgrpo.tasks.reward_model import RewardModel


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def weights(directory):
    return directory / "model.safetensors"


def in_shards(directory, second="model-2.safetensors"):
    tensors = load_file(weights(directory))
    names = sorted(tensors)
    half = len(names) // 2
    save_file({n: tensors[n] for n in names[:half]}, directory / "model-1.safetensors", {"format": "pt"})
    save_file({n: tensors[n] for n in names[half:]}, directory / "model-2.safetensors", {"format": "pt"})
    weights(directory).unlink()
    weight_map = dict.fromkeys(names[:half], "model-1.safetensors") | dict.fromkeys(names[half:], second)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def pickled(directory):
    torch.save(load_file(weights(directory)), directory / "pytorch_model.bin")
    weights(directory).unlink()


def shard_gone(directory):
    in_shards(directory)
    (directory / "model-2.safetensors").unlink()


DAMAGES = {
    "cut off": (lambda d: cut(weights(d), 2000), r"model\.safetensors: cannot be read"),
    "cut off in its header": (lambda d: cut(weights(d), 100), r"model\.safetensors: cannot be read"),
    "empty": (lambda d: cut(weights(d), 0), r"model\.safetensors: cannot be read"),
    "foreign": (lambda d: weights(d).write_bytes(b"\xff" * 4000), r"model\.safetensors: cannot be read"),
    "none": (lambda d: weights(d).unlink(), "cannot be read, it has no safetensors"),
    "only pickle": (pickled, r"cannot be read, it has only pytorch_model\.bin: pickle, which is never loaded"),
    "a shard gone": (shard_gone, r"names model-2\.safetensors, which is not there"),
    "an index that names a pickle": (
        lambda d: in_shards(d, "pytorch_model.bin"), r"index\.json: names 'pytorch_model\.bin', and only safetensors"),
    "an index that names a file elsewhere": (
        lambda d: in_shards(d, "../model/model-2.safetensors"), "and only safetensors beside it are loaded"),
    "an index that is none": (
        lambda d: (in_shards(d), (d / "model.safetensors.index.json").write_text("[")), r"index\.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(model, damage):
    do, message = DAMAGES[damage]
    do(model)
    with pytest.raises(ValueError, match=message):
        load_model(model)


def test_shards_load(model):
    before = load_file(weights(model))
    in_shards(model)
    loaded = load_model(model).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 7}', '{"model_type": "no_such"}', '{"a": ' * 2000])
def test_a_config_that_is_none_is_named(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        context_length(model)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(model)


def test_a_generation_config_that_is_none_is_named(model):
    (model / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: cannot be read"):
        end_token_ids(model)


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "\x00"])
def test_a_tokenizer_that_is_none_is_named(model, text):
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(model, value):
    tensors = load_file(weights(model))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 3] = value
    save_file(tensors, weights(model), {"format": "pt"})
    with pytest.raises(ValueError, match=f"the weights of {name} are not finite"):
        make_engine(RolloutConfig(engine="transformers"), ModelConfig(str(model)))


def test_a_pickled_adapter_is_refused(tree, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(pickle.dumps({}))
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for key in ("path", "merged"):
        tree["lora"] = {key: str(tmp_path / "adapter")}
        with pytest.raises(ConfigError, match=r"has only adapter_model\.bin: pickle, which is never loaded"):
            with_adapter(build_config(tree))
    assert LoraConfig().path is None


# ---- code of a repository


def with_code(directory):
    """Code that says so when it runs, named in every place where transformers looks for it."""
    code = f"open({str(directory / 'ran')!r}, 'w').write('ran')\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (directory / name).write_text(code)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoModelForSequenceClassification": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", None],
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": config["auto_map"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


CALLS = {
    "context_length": "from longgrpo.model.load import context_length as call",
    "load_tokenizer": "from longgrpo.model.load import load_tokenizer as call",
    "load_model": "from longgrpo.model.load import load_model as call",
    "reward_model": "from longgrpo.tasks.reward_model import RewardModel; call = lambda path: RewardModel(str(path))",
    "meta": "from longgrpo.memory.dryrun import MetaEngine as M; import torch; call = lambda p: M(p, torch.float32)",
    "linear_names": "from longgrpo.model.lora import linear_names as call",
    "packed_modules": "from longgrpo.model.nf4 import packed_modules as call",
}


def on_a_terminal(code, stderr):
    """A Python process of this code with a terminal on which somebody says yes to everything, and our end of it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=stderr)
    os.close(theirs)
    os.write(ours, b"y\n" * 20)
    return process, ours


@pytest.mark.parametrize("call", CALLS)
def test_on_a_terminal_nobody_is_asked_to_run_code(model, call):
    """transformers asks on a terminal, and runs the code after a "y"."""
    with_code(model)
    code = f"from pathlib import Path; {CALLS[call]}\ncall(Path({str(model)!r}))"
    process, ours = on_a_terminal(code, stderr=subprocess.PIPE)
    error = process.communicate(timeout=400)[1].decode()
    os.close(ours)
    assert process.returncode == 1
    assert "asks for code from the model's own repository" in error
    assert not (model / "ran").exists()


def test_the_terminal_would_have_asked(model):
    """Without LOCAL the code runs: the test above can fail."""
    with_code(model)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(model)!r}, local_files_only=True)"
    process, ours = on_a_terminal(code, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    os.close(ours)
    assert (model / "ran").exists()


def test_a_reward_model_from_pickle_is_refused(model):
    pickled(model)
    with pytest.raises(ConfigError, match="cannot be loaded as a classifier"):
        RewardModel(str(model))
