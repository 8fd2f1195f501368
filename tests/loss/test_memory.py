"""Peak memory, in a fresh process each: the workspace, the gradients, and a word or two a token."""

import functools
from pathlib import Path

import pytest

from memory import in_fresh_process

MIB = 1 << 20
# Heap, the GEMM library's packing buffers and whatever its first call of this shape sets up.
SLACK = 12 * MIB
# logp, entropy, c, scale, the weight of the token, its advantage and mask: vectors [N] that are neither here nor there.
BYTES_A_TOKEN = 96

MEASURE = """
import sys
import torch
import longgrpo
from memory import peak_extra

op, dtype, mode, tokens, hidden, vocabulary, workspace = sys.argv[1:]
tokens, hidden, vocabulary, workspace = map(int, (tokens, hidden, vocabulary, workspace))
dtype = getattr(torch, dtype)


def forward_backward(tokens):
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden).div_(hidden**0.5).to(dtype).requires_grad_(mode == "trainable")
    target = torch.randint(vocabulary, (tokens,))
    advantages, c = torch.randn(tokens), torch.randn(tokens)
    leaves = [h, w] if w.requires_grad else [h]
    config = longgrpo.GRPOLossConfig(loss_type="dapo")

    def call():
        if op == "linear_grpo_loss":
            loss = longgrpo.linear_grpo_loss(h, w, target, advantages, config=config, workspace=workspace).loss
        else:
            loss = longgrpo.linear_logprob(h, w, target, workspace=workspace).logp @ c
        return torch.autograd.grad(loss, leaves)

    return call


forward_backward(tokens)()  # thread pools; the GEMM library's buffers, whose size is that of the processor
print(peak_extra(forward_backward(tokens)))
"""


@functools.cache
def peak(op: str, dtype: str, mode: str, tokens: int, hidden: int, vocabulary: int, workspace: int) -> int:
    """Bytes above the inputs at the peak of one forward and backward."""
    arguments = map(str, (op, dtype, mode, tokens, hidden, vocabulary, workspace))
    return int(in_fresh_process("-c", MEASURE, *arguments, path=Path(__file__).parents[2] / "bench"))


OPS = ("linear_grpo_loss", "linear_logprob")
BYTES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("op", OPS)
def test_frozen_head_needs_workspace_and_dhidden(op, dtype):
    tokens, hidden, vocabulary, workspace = 16384, 512, 2048, 32 * MIB
    dhidden = tokens * hidden * BYTES[dtype]  # 32 or 16 MiB; the logits would be 128
    extra = peak(op, dtype, "frozen", tokens, hidden, vocabulary, workspace)
    assert extra <= workspace + dhidden + SLACK


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("op", OPS)
def test_trainable_head_needs_dweight_in_fp32_too(op, dtype):
    tokens, hidden, vocabulary = 1024, 1024, 16384
    workspace = 32 * MIB  # too little to hide a second dweight in
    dhidden, dweight = tokens * hidden * BYTES[dtype], vocabulary * hidden * 4  # dweight 64 MiB
    extra = peak(op, dtype, "trainable", tokens, hidden, vocabulary, workspace)
    assert extra <= workspace + dhidden + dweight + SLACK


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
@pytest.mark.parametrize("op", OPS)
def test_flat_in_the_number_of_tokens(op, mode):
    hidden, vocabulary, workspace = 64, 4096, 8 * MIB
    few, many = 1 << 10, 1 << 16
    beyond = [peak(op, "float32", mode, n, hidden, vocabulary, workspace) - n * hidden * 4 for n in (few, many)]
    assert beyond[1] <= beyond[0] + (many - few) * BYTES_A_TOKEN + SLACK // 4
