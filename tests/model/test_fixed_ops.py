"""The operators with a fixed order of sums as torch sees them: schemas, fake kernels, meta tensors, torch.compile."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo._ops import fixed

ops = torch.ops.longgrpo
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not fixed.has_bf16(), reason="no AVX512-BF16"), id="bfloat16"
)
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), BF16])
SETTINGS = settings(deadline=None, max_examples=8)
int32 = {"dtype": torch.int32}


def opcheck(name, *arguments):
    """The schema, and a fake kernel that agrees with the real one in shapes, strides and dtypes, with dynamic shapes
    too. Their autograd is that of the functions around them."""
    torch.library.opcheck(getattr(ops, name).default, arguments)
    real, meta = (getattr(ops, name)(*moved) for moved in (arguments, on_meta(arguments)))
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, meta)), strict=True):
        assert other.is_meta
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def on_meta(arguments):
    return [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]


@DTYPES
@SETTINGS
@given(
    rows=st.integers(0, 70), inner=st.integers(1, 40), outer=st.integers(1, 70), bias=st.booleans(), wide=st.booleans()
)
def test_linear(dtype, rows, inner, outer, bias, wide):
    x = torch.randn(rows, 2 * inner + 8 * wide).to(dtype)[:, : 2 * inner]  # of a wider tensor: rows with a gap
    weight, b = torch.randn(outer, 2 * inner).to(dtype), torch.randn(outer).to(dtype)
    opcheck("fixed_linear", x, weight, b if bias else None)


@DTYPES
@SETTINGS
@given(rows=st.integers(0, 40), width=st.integers(1, 70), kind=st.integers(0, 1), fused=st.booleans())
def test_gate(dtype, rows, width, kind, fused):
    gate, up, grad = torch.randn(3, rows, width).to(dtype)
    if fused:  # the halves of one tensor, as the engine and Phi-3 have them
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
    opcheck("fixed_gate", gate, up, kind)
    opcheck("fixed_gate_backward", gate, up, grad, kind)


@DTYPES
@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), heads=st.sampled_from([(1, 1), (6, 2), (4, 1)]),
    size=st.sampled_from([16, 32, 80]), window=st.sampled_from([0, 1, 33]), paged=st.booleans(),
    transposed=st.booleans(),
)  # fmt: skip
def test_attention(dtype, lengths, heads, size, window, paged, transposed):
    count, pages = sum(lengths), None
    query = torch.randn(count, heads[0], size).to(dtype)
    if transposed:  # as the trainer has it: [heads, N, D]
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    rows = (count,)
    if paged:
        most = max(math.ceil(n / 32) for n in lengths)
        pages = torch.arange(len(lengths) * most, **int32).view(len(lengths), most)
        rows = (pages.numel(), 32)
    key, value = torch.randn(2, *rows, heads[1], size).to(dtype)
    starts = torch.tensor([0, *accumulate(lengths)], **int32)
    opcheck("fixed_attention", query, key, value, pages, starts, torch.tensor(lengths, **int32), 0.3, window)


@DTYPES
def test_compiled_they_give_the_same_numbers_and_gradients(dtype):
    """Traced as one graph by their fake kernels, in forward and backward."""

    def mlp(x, gate, up, down):
        return fixed.linear(fixed.gated(fixed.linear(x, gate), fixed.linear(x, up), "silu"), down)

    sizes = ((2, 5, 32), (48, 32), (48, 32), (32, 48))
    leaves = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for rows in (5, 7):
        leaves[0] = torch.randn(2, rows, 32).to(dtype).requires_grad_()
        expected, found = mlp(*leaves), compiled(*leaves)
        assert torch.equal(found, expected)
        dy = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
        ):
            assert torch.equal(one, other)
