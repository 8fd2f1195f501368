"""NF4 layers against the format's definition, bitsandbytes' own layers and checkpoints, and dense layers."""

import importlib.util
import json

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from longgrpo.config.model import LoraConfig
from longgrpo.model import nf4
from longgrpo.model.head import head_of
from longgrpo.model.lean_lora import use_lean_lora
from longgrpo.model.load import load_model, resolve_model
from longgrpo.model.lora import add_lora
from testing.models import random_model, trainable_parameters

bitsandbytes = pytest.importorskip("bitsandbytes")
TOKENS = torch.tensor([[1, 5, 9, 30, 77, 12, 4, 60]])
SIZES = dict(hidden_size=128, intermediate_size=192, head_dim=32)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def code_book():
    """QLoRA's sixteen values: quantiles of the normal distribution, 0 among them, scaled to [-1, 1]."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (values / values.max()).float()


@pytest.fixture
def written(tmp_path):
    """A model on disk with quantization_config as given, and the model."""

    def write(quantization_config=None, **options):
        model = random_model("llama", **SIZES | options)
        model.save_pretrained(tmp_path)
        if quantization_config:
            config = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
        return tmp_path, model

    return write


def dense(model):
    """The same model on the weights that the packed ones stand for."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, nf4.NF4Linear)}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".absmax")}
    state |= {f"{n}.weight": nf4.unpack(module.weight, module.absmax, torch.float32) for n, module in packed.items()}
    result = type(model)(model.config)
    result.load_state_dict(state)
    return result.eval()


def test_packing_takes_the_nearest_code_of_a_block():
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, absmax = nf4.pack(weight)
    assert (codes.shape, codes.dtype) == ((96, 64), torch.uint8)
    assert (absmax.shape, absmax.dtype) == ((96, 2), torch.float32)
    blocks = weight.view(96, 2, 64)
    assert torch.equal(absmax, blocks.abs().amax(-1))
    book = code_book()
    nearest = book[(blocks[..., None] / absmax[..., None, None] - book).abs().argmin(-1)]
    expected = (nearest * absmax[..., None]).view(96, 128)
    torch.testing.assert_close(nf4.unpack(codes, absmax, torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_packing_in_parts_is_packing(monkeypatch):
    weight = torch.randn(96, 128)
    whole = nf4.pack(weight)
    monkeypatch.setattr(nf4, "CHUNK", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, nf4.pack(weight), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_is_the_dense_one_forward_and_backward(dtype):
    codes, absmax = nf4.pack(torch.randn(96, 128))
    bias = torch.randn(96).to(dtype)
    x, y = (torch.randn(5, 128).to(dtype).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    weight = nf4.unpack(codes, absmax, dtype)
    ours, theirs = nf4.linear(x, codes, absmax, bias), linear(y, weight, bias)
    assert torch.equal(ours, theirs)
    ours.backward(torch.ones_like(ours))
    theirs.backward(torch.ones_like(theirs))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 128), (1, 5, 128), (2, 3, 128)])
def test_an_adapter_is_added_in_place_to_a_packed_linear(shape, with_bias):
    """Also to one with a bias, such as Qwen2's; the oracle is the sum out of place."""
    layer = nf4.NF4Linear(128, 96, bias=with_bias, dtype=torch.float32)
    layer.weight.data, layer.absmax.data = nf4.pack(torch.randn(96, 128))
    base = nn.Sequential(layer)
    model = use_lean_lora(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"])))
    a, b = (p for p in model.parameters() if p.requires_grad)
    nn.init.normal_(b)
    x = torch.randn(shape, requires_grad=True)
    y = linear(x, nf4.unpack(layer.weight, layer.absmax, torch.float32), layer.bias) + 8 / 4 * linear(linear(x, a), b)
    wanted = torch.autograd.grad(y.square().sum(), [x, a, b])
    ours = model(x)
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), [x, a, b]), wanted, rtol=1e-4, atol=1e-3)


def test_rows_of_a_packed_matrix_are_a_slice_of_it():
    codes, absmax = nf4.pack(torch.randn(96, 128))
    x = torch.randn(5, 128)
    parts = [nf4.linear(x, c, a) for c, a in zip(codes.split([64, 32]), absmax.split([64, 32]), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), nf4.linear(x, codes, absmax))


def test_a_layer_keeps_its_storage_and_its_gradient_in_eval_mode():
    """bitsandbytes' own layer packs itself anew where the CPU has AVX512-BF16; what comes after is wrong."""
    weight = torch.randn(128, 128)
    layer = nf4.NF4Linear(128, 128, bias=False, dtype=torch.float32)
    codes, absmax = nf4.pack(weight)
    layer.weight.data, layer.absmax.data = codes, absmax
    kept, pointer = codes.clone(), codes.data_ptr()

    def gradient(layer):
        x = torch.ones(3, 128, requires_grad=True)
        layer.train()(x).square().sum().backward()
        return x.grad

    before = gradient(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    assert torch.equal(gradient(layer), before)
    assert torch.equal(layer.weight, kept)
    assert layer.weight.data_ptr() == pointer


def test_every_linear_but_the_head_is_packed(written):
    directory, original = written()
    model = load_model(resolve_model(str(directory), "nf4"), quantization="nf4")
    packed = {name for name, module in model.named_modules() if isinstance(module, nf4.NF4Linear)}
    assert {name.rpartition(".")[2] for name in packed} == LINEARS
    assert len(packed) == 2 * len(LINEARS)
    for name, tensor in original.state_dict().items():
        module = name.rpartition(".")[0]
        if module in packed:
            codes, absmax = nf4.pack(tensor)
            assert torch.equal(model.get_submodule(module).weight, codes)
            assert torch.equal(model.get_submodule(module).absmax, absmax)
        else:
            assert torch.equal(model.state_dict()[name], tensor), name
    torch.testing.assert_close(model(TOKENS).logits, dense(model)(TOKENS).logits)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_modules_that_the_config_leaves_out_stay_whole(written):
    left_out = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    directory, original = written(stored | {"llm_int8_skip_modules": left_out})
    packed = nf4.packed_modules(directory)
    assert len(packed) == 2 * len(LINEARS) - 4
    assert not any(name.startswith(tuple(left_out)) for name in packed)
    model = load_model(resolve_model(str(directory), "nf4"), quantization="nf4")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    assert isinstance(model.model.layers[1].self_attn.k_proj, nf4.NF4Linear)


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_that_bitsandbytes_packed_is_read_as_it_is(nested, tmp_path):
    """Saved by transformers, over several files, some modules left out; against transformers' own forward."""
    random_model("llama", **SIZES).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed", max_shard_size="50KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False  # or it packs itself anew
    directory = resolve_model(str(tmp_path / "packed"), "nf4")
    ours = load_model(directory, quantization="nf4")
    assert type(ours.model.layers[0].mlp.down_proj) is type(ours.model.layers[1].self_attn.v_proj) is torch.nn.Linear
    assert sum(isinstance(module, nf4.NF4Linear) for module in ours.modules()) == 2 * len(LINEARS) - 2
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_lora_on_packed_weights_has_the_gradients_of_dense_ones(written):
    directory, _ = written()
    packed = load_model(resolve_model(str(directory), "nf4"), quantization="nf4")
    models = [add_lora(model, LoraConfig(rank=4), seed=0) for model in (dense(packed), packed)]
    for model in models:
        for parameter in trainable_parameters(model):
            parameter.data.add_(0.1)
        model(TOKENS).logits.square().sum().backward()
    gradients = [[p.grad for p in trainable_parameters(model)] for model in models]
    assert len(gradients[0]) == 2 * 2 * len(LINEARS)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


AWQ = {"quant_method": "awq", "bits": 4}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(("stored", "quantization", "message"), [
    (AWQ, None, "quantized already, by awq, which cannot be trained"),
    (AWQ, "nf4", "quantized already, by awq, which cannot be trained"),
    (BITSANDBYTES | {"bnb_4bit_quant_type": "fp4"}, "nf4", "by bitsandbytes fp4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "nf4", "by bitsandbytes int8"),
    ({"bits": 2}, None, "by an unnamed method"),
    (BITSANDBYTES | {"bnb_4bit_quant_type": "nf4"}, None, r"set model\.quantization: nf4"),
])  # fmt: skip
def test_other_quantizations_are_named(stored, quantization, message, written):
    directory, _ = written(stored)
    with pytest.raises(ValueError, match=message):
        resolve_model(str(directory), quantization)


def test_blocks_of_another_size_are_refused(written):
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    directory, _ = written(BITSANDBYTES | {"bnb_4bit_quant_type": "nf4"})
    weights, name = load_file(directory / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    weights[name], state = quantize_4bit(weights[name], blocksize=128, quant_type="nf4")
    weights |= {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj is packed in blocks of 128 over rows of 128: only blocks of 64"):
        load_model(resolve_model(str(directory), "nf4"), quantization="nf4")


def test_a_model_of_narrow_rows_is_refused(written):
    directory, _ = written(hidden_size=32, intermediate_size=48, head_dim=8)
    with pytest.raises(ValueError, match="none of its linear layers has rows of whole blocks of 64"):
        load_model(resolve_model(str(directory), "nf4"), quantization="nf4")


def test_without_bitsandbytes_the_remedy_is_named(written, monkeypatch):
    directory, _ = written()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        resolve_model(str(directory), "nf4")
    assert resolve_model(str(directory)) == directory


def test_a_head_that_the_checkpoint_packs_is_unpacked(written):
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    directory, _ = written(BITSANDBYTES | {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q_proj"]})
    weights, name = load_file(directory / "model.safetensors"), "lm_head.weight"
    expected = nf4.unpack(*nf4.pack(weights[name]), torch.float32)
    weights[name], state = quantize_4bit(weights[name], blocksize=64, quant_type="nf4")
    weights |= {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    save_file(weights, directory / "model.safetensors")
    model = load_model(resolve_model(str(directory), "nf4"), quantization="nf4")
    torch.testing.assert_close(head_of(model).weight, expected)
