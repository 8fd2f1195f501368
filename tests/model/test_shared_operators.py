"""Each shared operator gives a row the same bits whatever is computed beside it, and float64's values; so does a whole
model with them. Their backward is that of the formula."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from longgrpo._ops import fixed
from longgrpo.config.model import LoraConfig
from longgrpo.model.lora import add_lora
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from longgrpo.model.shared_operators import SharedOperators, add_lora_, packed_attention
from longgrpo.model.tiled_mlp import tile_mlp, tile_norms
from testing.models import random_model

BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not fixed.has_bf16(), reason="no AVX512-BF16"), id="bfloat16"
)
DTYPES = [pytest.param(torch.float32, id="float32"), BF16]
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # unit roundoff
SETTINGS = settings(deadline=None, max_examples=25)
int32 = {"dtype": torch.int32}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- linear


@pytest.mark.parametrize("dtype", DTYPES)
@SETTINGS
@given(
    inner=st.sampled_from([8, 16, 34, 64, 96, 130, 576]), outer=st.integers(1, 200), rows=st.integers(1, 300),
    bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_row_of_a_linear_has_the_same_bits_alone_in_any_batch_and_with_any_columns(
    dtype, inner, outer, rows, bias, data
):
    x, weight = randn(rows, inner, dtype=dtype), randn(outer, inner, dtype=dtype, seed=1)
    b = randn(outer, dtype=dtype, seed=2) if bias else None
    whole = fixed.linear_rows(x, weight, b)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=40))
    assert torch.equal(fixed.linear_rows(x[chosen], weight, b), whole[chosen])
    assert torch.equal(fixed.linear_rows(x[chosen[:1]], weight, b), whole[chosen[:1]])
    cut = data.draw(st.integers(0, outer))
    parts = [fixed.linear_rows(x, weight[a:z], None if b is None else b[a:z]) for a, z in ((0, cut), (cut, outer))]
    assert torch.equal(torch.cat(parts, 1), whole)
    exact = x.double() @ weight.double().T + (0 if b is None else b.double())
    # The sums in float32, the result rounded once.
    terms = x.double().abs() @ weight.double().abs().T + 1
    bound = 2**-24 * (inner + 2) * terms + EPSILON[dtype] * exact.abs()
    assert ((whole.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_linear_as_long_as_those_of_a_model(dtype, threads, set_threads):
    set_threads(threads)
    x, weight = randn(1500, 576, dtype=dtype), randn(1536, 576, dtype=dtype, seed=1)
    whole = fixed.linear_rows(x, weight)
    for count in (1, 2, 31, 33, 640):
        assert torch.equal(fixed.linear_rows(x[-count:], weight), whole[-count:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_linear_is_that_of_torchs(dtype):
    x, weight, bias = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((2, 5, 64), (48, 64), (48,))))
    dy = randn(2, 5, 48, dtype=dtype, seed=3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = torch.autograd.grad(fixed.linear(*leaves), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(torch.nn.functional.linear(*wide), wide, dy.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=8 * EPSILON[dtype], atol=64 * EPSILON[dtype])


# ---- gated activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fixed.ACTIVATIONS)
@SETTINGS
@given(rows=st.integers(1, 40), width=st.integers(1, 150), data=st.data())
def test_a_gated_number_has_the_same_bits_wherever_it_stands(dtype, kind, rows, width, data):
    gate, up = 4 * randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1)
    whole = fixed.gated(gate, up, kind)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    assert torch.equal(fixed.gated(gate[row:, column:], up[row:, column:], kind), whole[row:, column:])
    act = silu if kind == "silu" else lambda x: gelu(x, approximate="tanh")
    exact = act(gate.double()) * up.double()
    # The tanh of float32 cancels where GELU is small.
    small = 2**-20 * (gate.double() * up.double()).abs()
    assert ((whole.double() - exact).abs() <= (EPSILON[dtype] + 2**-20) * exact.abs() + small + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", fixed.ACTIVATIONS)
def test_the_gradient_of_a_gate_is_that_of_its_formula(dtype, kind):
    leaves = [(5 * randn(7, 100, dtype=dtype, seed=i)).requires_grad_() for i in range(2)]
    dy = randn(7, 100, dtype=dtype, seed=3)
    found = torch.autograd.grad(fixed.gated(*leaves, kind), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    act = silu if kind == "silu" else lambda x: gelu(x, approximate="tanh")
    exact = torch.autograd.grad(act(wide[0]) * wide[1], wide, dy.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2 * EPSILON[dtype] + 1e-5, atol=1e-5)


# ---- attention


def plain(query, key, value, window=0):
    """Of the last of the positions, by torch's attention in the dtype of its arguments; [N, heads, D] each."""
    places = torch.arange(len(key))
    at = places[len(key) - len(query) :, None]
    mask = (places <= at) & ((places > at - window) if window else True)
    rows = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def attend(queries, keys, values, window=0, pages=None, cache=()):
    starts = torch.tensor([0, *accumulate(map(len, queries))], **int32)
    length = torch.tensor([len(key) for key in keys], **int32)
    held = cache or (torch.cat(keys), torch.cat(values))
    scale = queries[0].shape[-1] ** -0.5
    out = fixed.attention(torch.cat(queries), *held, starts, length, scale=scale, pages=pages, window=window)
    return out.split([len(query) for query in queries])


def paged(keys, values, seed):
    """The sequences in pages of 32 in any order; what no token was written to is NaN."""
    counts = [math.ceil(len(key) / 32) for key in keys]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))
    table = torch.zeros(len(keys), max(counts), **int32)
    heads, size = keys[0].shape[1:]
    cache = torch.full((len(order), heads, 2, 32, size), math.nan, dtype=keys[0].dtype)
    taken = iter(order.tolist())
    for s, rows in enumerate(zip(keys, values, strict=True)):
        for page in range(counts[s]):
            table[s, page] = next(taken)
            for half, x in enumerate(rows):
                part = x[32 * page : 32 * page + 32]
                cache[table[s, page], :, half, : len(part)] = part.transpose(0, 1)
    return table, (cache[:, :, 0].transpose(1, 2), cache[:, :, 1].transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 4), (8, 1)]),
    size=st.sampled_from([16, 32, 48, 64, 80]), window=st.sampled_from([0, 0, 1, 33, 100]), seed=st.integers(0, 99),
    threads=st.sampled_from([1, 2]), data=st.data(),
)  # fmt: skip
def test_a_query_has_the_same_bits_alone_in_any_batch_chunking_and_block_table(
    dtype, lengths, heads, size, window, seed, threads, data
):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        queries = [randn(n, heads[0], size, dtype=dtype, seed=seed + i) for i, n in enumerate(lengths)]
        keys, values = (
            [randn(n, heads[1], size, dtype=dtype, seed=seed + k + i) for i, n in enumerate(lengths)] for k in (10, 20)
        )
        whole = attend(queries, keys, values, window)
        for out, *rows in zip(whole, queries, keys, values, strict=True):
            assert torch.equal(attend(*([x] for x in rows), window)[0], out), "alone"
            at = data.draw(st.integers(0, len(out) - 1))
            last = attend([rows[0][at:]], [rows[1]], [rows[2]], window)[0]
            assert torch.equal(last, out[at:]), "the last of a chunked prompt, or behind a cached prefix"
            one = attend([rows[0][at : at + 1]], *([x[: at + 1]] for x in rows[1:]), window)[0]
            assert torch.equal(one, out[at : at + 1]), "decoded"
            exact = plain(*(x.double() for x in rows), window)
            # Of the scores and of the sum over keys, and in bfloat16 the rounding of P, of which they are a mean.
            bound = 2e-6 if dtype == torch.float32 else 2 * EPSILON[dtype] * rows[2].abs().max().item()
            assert (out.double() - exact).abs().max() <= bound
        table, cache = paged(keys, values, seed)
        counts = [data.draw(st.integers(1, n)) for n in lengths]
        tails = [query[-n:] for query, n in zip(queries, counts, strict=True)]
        for out, tail in zip(attend(tails, keys, values, window, table, cache), whole, strict=True):
            assert torch.equal(out, tail[-len(out) :]), "from a paged cache"
    finally:
        torch.set_num_threads(before)


def packed_arguments(dtype):
    """A prompt of 40 with two completions that go on from it, and a sequence by itself."""
    bounds, prefix = [0, 40, 47, 60, 95], [-1, 0, 0, -1]
    positions = torch.cat([torch.arange(40), torch.arange(40, 47), torch.arange(40, 53), torch.arange(35)])
    batch = pack_sequences(torch.arange(95), positions, bounds, prefix)
    heads = [randn(1, h, 95, 32, dtype=dtype, seed=i).requires_grad_() for i, h in enumerate((6, 2, 2))]
    return heads, (batch.cu_seqlens, batch.lengths, batch.own_lengths, batch.shared_rows, batch.own_rows, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention_and_its_gradient_are_those_of_each_sequence_with_its_prefix(dtype):
    heads, batch = packed_arguments(dtype)
    out = packed_attention(fixed, *heads, *batch)
    dy = randn(*out.shape, dtype=dtype, seed=9)
    found = torch.autograd.grad(out, heads, dy)
    wide = [x.detach().double().requires_grad_() for x in heads]
    q, k, v = (x[0].transpose(0, 1) for x in wide)
    rows = [range(40), [*range(47)], [*range(40), *range(47, 60)], range(60, 95)]
    own = [40, 7, 13, 35]
    parts = [plain(q[list(r)[-n:]], k[list(r)], v[list(r)]) for r, n in zip(rows, own, strict=True)]
    exact = torch.cat(parts)[None]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    for one, other in zip(found, torch.autograd.grad(exact, wide, dy.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 if dtype == torch.float32 else 6e-2)


# ---- the whole model


def rows_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def batch_of(rows, prefix=None):
    starts = [len(rows[p]) if prefix and p >= 0 else 0 for p in (prefix or [-1] * len(rows))]
    positions = torch.cat([torch.arange(s, s + len(row)) for s, row in zip(starts, rows, strict=True)])
    return pack_sequences(
        torch.tensor([token for row in rows for token in row]), positions, [0, *accumulate(map(len, rows))], prefix
    )


def shared_model(architecture, dtype, lora=True):
    model = random_model(architecture, head_dim=16, pad_token_id=0).to(dtype)
    adapted = add_lora(model, LoraConfig(rank=4, alpha=4), seed=0) if lora else model
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = randn(*parameter.shape, seed=len(name)) / 4
    use_packed_attention(adapted)
    return adapted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_packing_shared_prompts_tiles_and_checkpoints_keep_the_bits(architecture, dtype):
    model = shared_model(architecture, dtype)
    SharedOperators(model, 256).use_in(model)
    other, prompt, first, second = rows_of([50, 33, 9, 20])
    with torch.no_grad():
        alone = [packed_hidden(model, batch_of([prompt + rest])) for rest in (first, second)]
        together = packed_hidden(model, batch_of([other, prompt, first, second], [-1, -1, 1, 1]))
    assert torch.equal(together[50:92], alone[0])
    assert torch.equal(together[92:], alone[1][33:])
    tile_norms(tile_mlp(model, 16), 16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    hidden = packed_hidden(model, batch_of([prompt + first]))
    assert torch.equal(hidden, alone[0])
    hidden.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("lora", [True, False])
def test_states_and_gradients_are_those_of_the_model_as_it_was(architecture, lora):
    def run(shares):
        model = shared_model(architecture, torch.float32, lora)
        if not lora:
            model.requires_grad_(True)
        if shares:
            SharedOperators(model, 256).use_in(model)
        hidden = packed_hidden(model, batch_of(rows_of([40, 7, 13]), [-1, 0, 0]))
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    hidden, gradients = run(True)
    expected, others = run(False)
    torch.testing.assert_close(hidden, expected, rtol=2e-5, atol=2e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-4 * others[name].abs().max().item())


def test_lora_adds_into_the_columns_of_a_wider_tensor():
    x, a, b = randn(7, 64), randn(8, 64, seed=1), randn(24, 8, seed=2)
    wide, alone = randn(7, 40, seed=3), randn(7, 40, seed=3)[:, 5:29].contiguous()
    expected = alone.double() + x.double() @ a.double().T @ b.double().T
    add_lora_(fixed, wide[:, 5:29], x, a, b)
    add_lora_(fixed, alone, x, a, b)
    assert torch.equal(wide[:, 5:29], alone)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-4)


def test_what_is_not_shared_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"rollout\.bitwise: model\.dtype = float16"):
        SharedOperators(random_model("llama").half(), 64)
    with pytest.raises(NotImplementedError, match=r"rollout\.bitwise: model\.layers\.0\.mlp is a LlamaMLP with ReLU"):
        SharedOperators(random_model("llama", hidden_act="relu"), 64)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(NotImplementedError, match=r"rollout\.bitwise: rope_type = dynamic"):
        SharedOperators(random_model("llama", rope_parameters=rope), 64)
