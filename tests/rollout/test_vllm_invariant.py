"""rollout.bitwise on a GPU, without one: vLLM's batch-invariant kernels are stood in for by references on the CPU, and
the names that they have in vLLM are read from its sources."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from longgrpo.checks.parity import parity
from longgrpo.config.model import LoraConfig
from longgrpo.errors import ConfigError
from longgrpo.model.lora import add_lora
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from longgrpo.model.shared_operators import SharedOperators
from longgrpo.rollout import vllm_invariant, vllm_private, vllm_shared
from testing.models import random_model

pytest.importorskip("vllm")

VLLM = Path(find_spec("vllm").origin).parent


def reference_flash(
    *, q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size, block_table,
    num_splits, fa_version,
):  # fmt: skip
    """FlashAttention over a paged cache [pages, PAGE, heads, D], a query at a time, as its documentation has it."""
    assert causal
    assert num_splits == 1
    assert fa_version == 3
    bounds = cu_seqlens_q.tolist()
    assert max_seqlen_q == max(end - start for start, end in pairwise(bounds))
    assert max_seqlen_k >= max(seqused_k)
    out = torch.empty_like(q)
    for s, (start, end) in enumerate(pairwise(bounds)):
        length = int(seqused_k[s])
        keys, values = (torch.cat([x[page] for page in block_table[s].tolist()])[:length] for x in (k, v))
        for i in range(start, end):
            last = length - (end - i) + 1
            first = max(0, last - 1 - window_size[0]) if window_size[0] >= 0 else 0
            rows = (x[first:last].transpose(0, 1)[None] for x in (keys, values))
            one = scaled_dot_product_attention(q[None, i, :, None], *rows, scale=softmax_scale, enable_gqa=True)
            out[i] = one[0, :, 0]
    return out


@pytest.fixture
def kernels(monkeypatch):
    """References in the place of vLLM's kernels."""
    from vllm.model_executor.determinism import batch_invariant
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(batch_invariant, "linear_batch_invariant", linear)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", reference_flash, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **options: 3)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), heads=st.sampled_from([(1, 1), (6, 2), (4, 1)]),
    window=st.sampled_from([0, 1, 7]), data=st.data(),
)  # fmt: skip
def test_attention_lays_keys_out_in_pages(kernels, lengths, heads, window, data):
    own = [data.draw(st.integers(1, n)) for n in lengths]
    query = randn(sum(own), heads[0], 16)
    key, value = randn(sum(lengths), heads[1], 16, seed=1), randn(sum(lengths), heads[1], 16, seed=2)
    starts, length = (torch.tensor(x, dtype=torch.int32) for x in ([0, *accumulate(own)], lengths))
    out = vllm_invariant.attention(query, key, value, starts, length, scale=0.3, window=window)
    parts = zip(*(x.split(n) for x, n in ((query, own), (key, lengths), (value, lengths), (out, own))), strict=True)
    for q, k, v, found in parts:
        places = torch.arange(len(k))
        at = places[len(k) - len(q) :, None]
        mask = (places <= at) & ((places > at - window) if window else True)
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        exact = scaled_dot_product_attention(*rows, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
def test_states_and_gradients_are_those_of_the_model_as_it_was(kernels, architecture, lora):
    """The trainer's side as a whole, with autograd around the kernels."""

    def run(shares):
        model = random_model(architecture, head_dim=16, pad_token_id=0)
        if lora:
            model = add_lora(model, LoraConfig(rank=4, alpha=8), seed=0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = randn(*parameter.shape, seed=len(name)) / 4
        else:
            model.requires_grad_(True)
        use_packed_attention(model)
        if shares:
            shared = SharedOperators(model, 64, vllm_invariant)
            assert not shared.exact
            shared.use_in(model)
        bounds, positions = [0, 20, 27, 40], torch.cat([torch.arange(20), torch.arange(20, 27), torch.arange(20, 33)])
        hidden = packed_hidden(model, pack_sequences(torch.arange(40), positions, bounds, [-1, 0, 0]))
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    hidden, gradients = run(True)
    expected, others = run(False)
    torch.testing.assert_close(hidden, expected, rtol=2e-5, atol=2e-5)
    assert gradients.keys() == others.keys()
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-4 * others[name].abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_linear_is_each_of_its_parts(kernels, bias):
    layer, x = torch.nn.Linear(8, 12, bias=bias), randn(5, 8)
    calls = []
    whole = SimpleNamespace(apply=None, process_weights_after_loading=calls.append)
    parts = vllm_invariant.Parts(whole, [6, 4, 2])
    torch.testing.assert_close(parts.apply(layer, x, layer.bias), layer(x))
    parts.process_weights_after_loading(layer)
    assert calls == [layer]
    fused = torch.nn.Module()
    fused.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}
    fused.qkv_proj, fused.gate_up_proj, fused.o_proj = (torch.nn.Linear(8, 12) for _ in range(3))
    for layer in (fused.qkv_proj, fused.gate_up_proj):
        layer.quant_method, layer.output_sizes = whole, [6, 4, 2]
    vllm_shared._share_parts(fused)
    assert isinstance(fused.qkv_proj.quant_method, vllm_invariant.Parts)
    assert fused.gate_up_proj.quant_method is whole, "a fused one of the checkpoint is the trainer's too"


def test_the_gate_rounds_as_torch_does():
    gate, up = randn(3, 8).bfloat16().requires_grad_(), randn(3, 8, seed=1).bfloat16().requires_grad_()
    assert torch.equal(vllm_invariant.gated(gate, up, "silu"), silu(gate) * up)
    vllm_invariant.gated(gate, up, "gelu_tanh").sum().backward()
    assert gate.grad is not None


def test_what_it_does_not_take_is_refused_by_name(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"rollout\.bitwise on a GPU: model\.dtype = float32"):
        vllm_invariant.check_card("float32")
    vllm_invariant.check_card("bfloat16")
    impl = type("TritonAttentionImpl", (), {"batch_invariant_enabled": True})()
    with pytest.raises(NotImplementedError, match=r"the engine's layer is a TritonAttentionImpl; the trainer shares"):
        vllm_shared._check_invariant("layer", impl)
    impl = type("FlashAttentionImpl", (), {"batch_invariant_enabled": False})()
    with pytest.raises(NotImplementedError, match=r"FLASH_ATTN in its batch-invariant mode"):
        vllm_shared._check_invariant("layer", impl)


def test_the_mode_is_set_before_vllm_is_imported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(vllm_private.INVARIANT, raising=False)
    assert "vllm" in sys.modules
    with pytest.raises(NotImplementedError, match=r"vLLM was imported without VLLM_BATCH_INVARIANT=1"):
        vllm_private.import_vllm(invariant=True)
    vllm_private.import_vllm()
    assert vllm_private.INVARIANT not in os.environ
    monkeypatch.setenv(vllm_private.INVARIANT, "1")
    vllm_private.import_vllm(invariant=True)


def test_on_a_cpu_the_mode_is_not_set(monkeypatch):
    monkeypatch.delenv(vllm_private.INVARIANT, raising=False)
    vllm_private.import_vllm(invariant=True)
    assert vllm_private.INVARIANT not in os.environ


def test_parity_on_a_gpu_needs_it(monkeypatch):
    monkeypatch.setattr(vllm_private, "is_cpu", lambda: False)
    loop = SimpleNamespace(
        collector=SimpleNamespace(engine=SimpleNamespace(name="vllm")),
        config=SimpleNamespace(rollout=SimpleNamespace(bitwise=False)),
    )
    with pytest.raises(ConfigError, match=r"compiled graphs: set rollout\.bitwise: true"):
        parity(loop)


# ---- the names in vLLM, read and not run


def function(file, name):
    """The definition called `name` in a file of vLLM."""
    tree = ast.parse((VLLM / file).read_text())
    return next(node for node in ast.walk(tree) if getattr(node, "name", None) == name)


def test_the_kernels_take_what_they_are_given():
    from vllm.model_executor.determinism import batch_invariant
    from vllm.v1.attention.backends import fa_utils

    assert list(inspect.signature(batch_invariant.linear_batch_invariant).parameters) == ["input", "weight", "bias"]
    flash = {
        argument.arg
        for argument in function("vllm_flash_attn/flash_attn_interface.py", "flash_attn_varlen_func").args.args
    }
    assert flash >= set(inspect.signature(reference_flash).parameters)
    version = inspect.signature(fa_utils.get_flash_attn_version).parameters
    assert {"head_size", "kv_cache_block_size"} <= set(version)


def test_the_engine_in_the_mode_computes_by_them():
    """Each linear by linear_batch_invariant, attention without a split of the keys, a mean row by row."""
    for file, owner in (
        ("layers/linear.py", "UnquantizedLinearMethod"),
        ("layers/vocab_parallel_embedding.py", "UnquantizedEmbeddingMethod"),
    ):
        method = ast.unparse(function(f"model_executor/{file}", owner))
        assert "return linear_batch_invariant(x, layer.weight, bias)" in method
    flash = (VLLM / "v1/attention/backends/flash_attn.py").read_text()
    assert "self.batch_invariant_enabled = envs.VLLM_BATCH_INVARIANT" in flash
    assert "max_num_splits = 1" in flash
    mode = ast.unparse(function("model_executor/determinism/batch_invariant.py", "enable_batch_invariant_mode"))
    assert "impl('aten::mean.dim', mean_batch_invariant, key)" in mode
    lora = function("lora/punica_wrapper/punica_gpu.py", "add_lora_linear")
    assert [a.arg for a in lora.args.args] == [
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "lora_b_stacked",
        "scale",
        "output_slices",
    ]
