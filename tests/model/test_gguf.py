"""GGUF files against the models that they were made of, transformers' loading and the gguf package's decoding."""

import os
import subprocess
import sys
import time

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from longgrpo.model.gguf import shards
from longgrpo.model.load import end_token_ids, load_model, load_tokenizer, resolve_model
from testing import ROOT
from testing.gguf_files import DECODABLE, decoded, random_blocks, write_gguf
from testing.models import random_model

TOKENS = torch.tensor([[1, 5, 9, 30, 77, 12, 4, 60]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGGRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama():
    """Rows of 256 values, which every type's blocks divide."""
    return random_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=4)


def mixed(model):
    """Every type that the gguf package decodes, one a tensor."""
    rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "ffn_gate": 256, "ffn_up": 256, "ffn_down": 256}
    shapes = {f"blk.{i}.{part}.weight": (n, 256) for i in range(4) for part, n in rows.items()}
    shapes |= {"token_embd.weight": (97, 256), "output.weight": (97, 256)}
    assert len(shapes) == len(DECODABLE)
    return {name: random_blocks(DECODABLE[i], *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_an_architecture_comes_back_as_it_was(architecture, tmp_path):
    model = random_model(architecture, tie_word_embeddings=architecture != "qwen2")
    path = write_gguf(tmp_path / "model.gguf", model)
    directory = resolve_model(str(path))
    loaded = load_model(directory)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    assert end_token_ids(directory) == [2]
    assert load_tokenizer(directory)("ab")["input_ids"]


def test_every_type_decodes_as_the_gguf_package_decodes_it(llama, tmp_path):
    raw = mixed(llama)
    path = write_gguf(tmp_path / "mixed.gguf", llama, raw=raw)
    weights = load_model(resolve_model(str(path))).state_dict()
    for i in range(4):
        for part in ("gate", "up", "down"):
            assert torch.equal(
                weights[f"model.layers.{i}.mlp.{part}_proj.weight"], decoded(*raw[f"blk.{i}.ffn_{part}.weight"])
            )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert set(weights) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(weights[name], tensor), name


def test_halves_are_kept_as_halves(llama, tmp_path):
    from safetensors.torch import load_file

    raw = {
        f"blk.0.ffn_{part}.weight": random_blocks(kind, 256, 256, 0)
        for part, kind in (("gate", gguf.GGMLQuantizationType.BF16), ("up", gguf.GGMLQuantizationType.F16))
    }
    directory = resolve_model(str(write_gguf(tmp_path / "halves.gguf", llama, raw=raw)))
    saved = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    assert saved["model.layers.0.mlp.gate_proj.weight"].dtype == torch.bfloat16
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    assert torch.equal(saved["model.layers.0.mlp.up_proj.weight"].float(), decoded(*raw["blk.0.ffn_up.weight"]))


def test_shards_are_one_model(llama, tmp_path):
    raw = mixed(llama)
    whole = load_model(resolve_model(str(write_gguf(tmp_path / "whole.gguf", llama, raw=raw)))).state_dict()
    write_gguf(tmp_path / "split.gguf", llama, raw=raw, split_max_tensors=16)
    files = sorted(tmp_path.glob("split-*.gguf"))
    assert len(files) == 3
    assert shards(files[0]) == files
    merged = load_model(resolve_model(str(files[0]))).state_dict()
    assert set(merged) == set(whole)
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match=r"later shard: set model\.path to the first, split-00001-of-00003\.gguf"):
        resolve_model(str(files[1]))
    alone = files[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"alone\.gguf says it is shard 1 of 3, its name 1 of 1"):
        resolve_model(str(alone))
    alone.rename(files[0])
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"missing beside it: split-00003-of-00003\.gguf"):
        resolve_model(str(files[0]))


def test_a_changed_file_is_converted_anew_and_an_unchanged_one_is_not(tmp_path, cache):
    model = random_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model)
    first = resolve_model(str(path))
    made = first.stat().st_mtime_ns
    assert resolve_model(str(path)) == first
    assert first.stat().st_mtime_ns == made
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    second = resolve_model(str(write_gguf(path, model)))
    assert torch.equal(load_model(second).model.norm.weight, model.model.norm.weight)
    assert not [path for path in cache.iterdir() if path.name.endswith(".partial")]


def test_llama_3s_rotary_factors_become_its_config(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", head_dim=64, rope_parameters=scaling)
    plain = random_model("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    raw = {"rope_freqs.weight": (factors.numpy(), gguf.GGMLQuantizationType.F32)}
    loaded = load_model(resolve_model(str(write_gguf(tmp_path / "llama3.gguf", model, raw=raw))))
    assert loaded.config.rope_parameters == scaling
    assert not torch.equal(loaded(TOKENS).logits, plain(TOKENS).logits)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    raw["rope_freqs.weight"][0][3] *= 1.5
    with pytest.raises(ValueError, match="rope_freqs"):
        resolve_model(str(write_gguf(tmp_path / "other.gguf", model, raw=raw)))


@pytest.mark.parametrize("cut", [0, 3, 20, 200, 3000])
def test_a_file_cut_in_its_header_is_refused(cut, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"model\.gguf \({cut:,} bytes\) is no whole GGUF file"):
        resolve_model(str(path))


def test_a_file_cut_in_its_tensors_is_refused(tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=rf"truncated: its tensor \S+ ends at byte [\d,]+, the file at {size - 1000:,}"
    ):
        resolve_model(str(path))
    assert not list(cache.glob("model*/*"))


def test_what_cannot_be_taken_is_named(llama, tmp_path):
    def refuse(pattern, **options):
        with pytest.raises(ValueError, match=pattern):
            resolve_model(str(write_gguf(tmp_path / "bad.gguf", llama, **options)))

    def zeros(rows, dtype, kind):
        return numpy.zeros((rows, 256), dtype), gguf.GGMLQuantizationType[kind]

    refuse(r"blk\.0\.ffn_up\.weight has type I32", raw={"blk.0.ffn_up.weight": zeros(256, numpy.int32, "I32")})
    refuse(r"no place for tensor blk\.0\.strange", raw={"blk.0.strange": zeros(1, numpy.float32, "F32")})
    refuse(
        r"mlp\.up_proj\.weight has shape \[8, 256\] in it, and \[256, 256\] by its metadata",
        raw={"blk.1.ffn_up.weight": zeros(8, numpy.float32, "F32")},
    )
    refuse("rope scaling 'yarn' is not supported", fields=[("llama.rope.scaling.type", "yarn")])
    for key, value in (("scale_linear", 4.0), ("scaling.factor", 8.0), ("freq_base_swa", 1e6), ("new_key", 1)):
        refuse(rf"not supported \(llama\.rope\.{key}\)", fields=[(f"llama.rope.{key}", value)])
    for key, value in (("add_sep_token", True), ("precompiled_charsmap", "x"), ("new_key", 1)):
        refuse(rf"not supported \(tokenizer\.ggml\.{key}\)", fields=[(f"tokenizer.ggml.{key}", value)])


def test_an_unsupported_architecture_is_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("phi3", pad_token_id=0), architecture="phi3")
    with pytest.raises(ValueError, match="architecture 'phi3' is not supported; supported are llama, qwen2"):
        resolve_model(str(path))


def test_a_type_that_the_library_does_not_know_is_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"))
    field = next(t.field for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    at = field.offset + sum(int(part.nbytes) for part in field.parts[:4])
    data = bytearray(path.read_bytes())
    data[at : at + 4] = (250).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight has type number 250, which gguf"):
        resolve_model(str(path))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, cache):
    import shutil

    path = write_gguf(tmp_path / "model.gguf", random_model("llama"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0\.0 GB free: make room, or set LONGGRPO_CACHE"):
        resolve_model(str(path))
    assert not list(cache.glob("model*/*"))


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """Ten tensors of 16 MiB: converting holds two of them, loading the model and one."""
    # Every large block is mapped and given back for itself: what the allocator keeps does not count.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "testing.gguf_memory", tmp_path]
    run = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("key", ["scale_linear", "scaling.factor", "scaling.attn_factor"])
def test_a_scale_of_one_is_none(llama, tmp_path, key):
    path = write_gguf(tmp_path / "one.gguf", llama, fields=[(f"llama.rope.{key}", 1.0)])
    torch.testing.assert_close(load_model(resolve_model(str(path)))(TOKENS).logits, llama(TOKENS).logits)


def test_what_a_file_says_of_its_tokens_is_read(llama, tmp_path):
    def written(name, **keys):
        fields = [(f"tokenizer.ggml.{key}", value) for key, value in keys.items()]
        directory = resolve_model(str(write_gguf(tmp_path / f"{name}.gguf", llama, fields=fields)))
        return load_tokenizer(directory)("a")["input_ids"], end_token_ids(directory)

    (letter,), ends = written("none", add_bos_token=False)
    assert ends == [2]
    assert written("bos", add_bos_token=True)[0] == [1, letter]
    assert written("both", add_bos_token=True, add_eos_token=True)[0] == [1, letter, 2]
    assert written("turn", eot_token_id=5)[1] == [2, 5]
    assert written("message", eot_token_id=2, eom_token_id=7)[1] == [2, 7]


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, random_model("llama", tie_word_embeddings=True)).read_bytes()


def value_of(content, key, width):
    """Where the value of a key stands, behind its type."""
    return content.index(key) + len(key) + 4, width


@pytest.mark.parametrize(
    ("key", "width", "value", "message"),
    [
        (b"llama.block_count", 4, 2**31, "block_count = 2147483648, and it holds tensors of 2 layers"),
        (b"llama.block_count", 4, 3, "block_count = 3, and it holds tensors of 2 layers"),
        (b"tokenizer.ggml.tokens", 12, 2**63 << 32 | 8, "an array of its header has 9,223,372,036,854,775,808 entries"),
        (b"tokenizer.ggml.merges", 12, 2**20 << 32 | 8, "a value of its header ends at byte"),
        (b"tokenizer.ggml.token_type", 12, 2**20 << 32 | 5, "is no whole GGUF file"),
    ],
)
def test_a_number_that_is_too_large_is_refused_before_work_is_done(whole_file, tmp_path, key, width, value, message):
    content = bytearray(whole_file)
    start, width = value_of(whole_file, key, width)
    content[start : start + width] = value.to_bytes(width, "little")
    (tmp_path / "bad.gguf").write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message):
        resolve_model(str(tmp_path / "bad.gguf"))
    assert time.monotonic() - begin < 10  # it was hours


def test_a_tokenizer_that_its_library_cannot_read_is_named(whole_file, tmp_path):
    content = whole_file.replace(b"a b", b"q\xff\xfe", 1)
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf"):
        resolve_model(str(tmp_path / "bad.gguf"))
