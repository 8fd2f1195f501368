"""The tiled MLP against the whole one."""

import pytest
import torch
from torch import nn

from longgrpo.model.tiled_mlp import tile_mlp, tile_norms, untile_mlp
from testing.models import random_model
from testing.offload import PoisonedEngine

HIDDEN = 16
SIZES = {"vocab_size": 64, "intermediate_size": 64, "initializer_range": 0.02}


class Mlp(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, 40, bias=False), nn.Linear(HIDDEN, 40)
        self.down = nn.Linear(40, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mlp = Mlp(**options)

    def forward(self, x):
        return x + self.mlp(x)


def run(layer, x, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    y.square().sum().backward()
    out = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    layer.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize("rows", [1, 3, 7, 30, 1000, None])
@pytest.mark.parametrize("shape", [(21, HIDDEN), (2, 15, HIDDEN), (1, HIDDEN)])
def test_gradients_are_exact(rows, shape):
    torch.manual_seed(0)
    layer, x = Layer().double(), torch.randn(shape, dtype=torch.float64)
    want = run(layer, x)
    for ours, theirs in zip(run(tile_mlp(layer, rows), x), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    untile_mlp(layer)
    assert all(torch.equal(a, b) for a, b in zip(run(layer, x), want, strict=True))


def test_bf16_weight_gradients_are_summed_in_fp32():
    """Against float64: within 2x the error of the whole MLP in bf16."""
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2000, HIDDEN)
    x = x.bfloat16().float()
    layer.load_state_dict({name: value.bfloat16().float() for name, value in layer.state_dict().items()})
    exact = run(layer.double(), x.double())
    layer = layer.bfloat16()
    whole, tiled = run(layer, x.bfloat16()), run(tile_mlp(layer, 8), x.bfloat16())
    for e, w, t in zip(exact, whole, tiled, strict=True):
        assert t.dtype == torch.bfloat16
        assert (t.double() - e).norm() <= 2 * (w.double() - e).norm()


def test_autocast_is_that_of_the_forward():
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(40, HIDDEN)
    want, ours = run(layer, x, torch.bfloat16), run(tile_mlp(layer, 8), x, torch.bfloat16)
    for a, b in zip(ours, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_frozen_weights_and_inputs_without_gradient():
    layer, x = Layer(), torch.randn(20, HIDDEN)
    layer.mlp.gate.weight.requires_grad_(False)
    want = run(layer, x)
    for a, b in zip(run(tile_mlp(layer, 6), x), want, strict=True):
        torch.testing.assert_close(a, b)
    layer(x).sum().backward()
    assert layer.mlp.up.weight.grad is not None
    assert layer.mlp.gate.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want[0])


def peak_intermediate(layer, x):
    seen = []
    handle = layer.mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    run(layer, x)
    handle.remove()
    return max(seen), len(seen)


def test_intermediates_are_of_one_tile():
    layer, x = Layer(), torch.randn(64, HIDDEN)
    assert peak_intermediate(layer, x) == (64 * 40, 1)
    assert peak_intermediate(tile_mlp(layer, 16), x) == (16 * 40, 2 * 4)


def llama():
    return random_model("llama", num_hidden_layers=3, **SIZES).double().train()


def step(model):
    ids = torch.arange(50)[None] % 64
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients


def test_in_a_checkpointed_model_the_mlp_runs_twice_and_not_three_times():
    model = llama()
    want = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tile_mlp(model, 10)
    runs = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))
    for ours, theirs in zip(step(model), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert len(runs) == 3 * 5 * 2  # layers, tiles, forward and recompute


def test_tiled_norms_are_those_of_the_whole():
    model = random_model("qwen3", **SIZES).train()
    want = step(model)
    tile_norms(model, 10)
    norm = model.model.layers[0].self_attn.q_norm
    assert norm.forward.rows == 40  # of 8 elements: as many as 10 of 32
    for ours, theirs in zip(step(model), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    untile_mlp(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model), want, strict=True))


def test_with_offload_bit_for_bit():
    model = tile_mlp(llama(), 10)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    want = step(model)
    engine = PoisonedEngine("lazy", host_bytes=1 << 24)
    engine.install(model, selective=True)
    assert all(torch.equal(a, b) for a, b in zip(step(model), want, strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match="rows must be >= 1, not 0"):
        tile_mlp(Layer(), 0)
    with pytest.raises(ValueError, match=r"mlp has dropout 0\.1"):
        tile_mlp(Layer(dropout=0.1))
    with pytest.raises(ValueError, match="Linear has no module called 'mlp'"):
        tile_mlp(nn.Linear(2, 2))
    mixture = Layer()
    mixture.mlp.experts = nn.ModuleList()
    with pytest.warns(UserWarning, match="mixture-of-experts"), pytest.raises(ValueError, match="no module called"):
        tile_mlp(mixture)


def test_an_mlp_that_mixes_tokens_or_changes_shape_is_refused():
    layer = Layer()
    layer.mlp.down = nn.Linear(40, HIDDEN + 1)
    with pytest.raises(TypeError, match="cannot be tiled"):
        tile_mlp(layer, 4).mlp(torch.randn(10, HIDDEN))
