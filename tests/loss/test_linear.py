"""linear_logprob against float64 autograd, and against the accuracy of plain torch in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo import linear_logprob
from testing.cases import DTYPES, Head, heads, make_head, relative_error

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def gradients(head: Head, outputs: tuple[torch.Tensor, ...], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    total = sum((out.double() * w).sum() for out, w in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(total, head.leaves))


def check(head: Head, *, train_head: bool, entropy: bool, bound: float, cancels: bool = False) -> None:
    dtype = head.hidden.dtype
    mine, oracle = head.cast(dtype, train_head=train_head), head.cast(torch.float64, train_head=train_head)
    out = linear_logprob(mine.hidden, mine.weight, mine.target, entropy=entropy, **mine.options)
    expected = oracle.logprob()
    torch.testing.assert_close(out.logp.double(), expected[0], rtol=2e-5, atol=2e-5)
    outputs, targets = (out.logp,), expected[:1]
    if entropy:
        torch.testing.assert_close(out.entropy.double(), expected[1], rtol=2e-5, atol=2e-5)
        outputs, targets = (*outputs, out.entropy), expected
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(head.target.shape, generator=g, dtype=torch.float64) for _ in outputs]
    wanted = gradients(oracle, targets, weights)
    sizes = terms(oracle, weights) if cancels else wanted
    for actual, right, size in zip(gradients(mine, outputs, weights), wanted, sizes, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - right).norm() <= bound * size.norm()


def terms(oracle: Head, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a gradient's terms add up to without their signs: |dlogits| |W|, |dlogits|^T |hidden|, sum of |dlogits|."""
    logits = torch.zeros(len(oracle.hidden), len(oracle.weight), dtype=torch.float64, requires_grad=True)  # [N, V]
    shifted = replace(oracle, bias=logits if oracle.bias is None else oracle.bias + logits)
    total = sum((out * w).sum() for out, w in zip(shifted.logprob(), weights, strict=False))
    (dlogits,) = torch.autograd.grad(total, logits)
    d = dlogits.abs()
    sums = [d @ oracle.weight.abs(), d.T @ oracle.hidden.abs(), d.sum(0)]
    return [x.detach() for x in sums[: len(oracle.leaves)]]


@settings(max_examples=150, deadline=None)
@given(head=heads(), train_head=st.booleans(), entropy=st.booleans())
def test_any_head(head, train_head, entropy):
    # Two roundings to the dtype, of each term and of their sum, and fp32 arithmetic inside. Of few tokens and columns
    # the terms may cancel.
    check(head, train_head=train_head, entropy=entropy, bound=2 * EPS[head.hidden.dtype] + 5e-6, cancels=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_smollm2_head(dtype, train_head, tokens):
    check(make_head(1, tokens, 576, 49_152, dtype, ignored=0.3), train_head=train_head, entropy=True,
          bound=2 * EPS[dtype] + 5e-6)  # fmt: skip


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_hidden_and_weight_may_differ_in_dtype(hidden_dtype, weight_dtype):
    head = make_head(10, 40, 70, 5000)
    hidden = head.hidden.to(hidden_dtype).requires_grad_()
    weight = head.weight.to(weight_dtype).requires_grad_()
    logp = linear_logprob(hidden, weight, head.target).logp
    truth = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.log_softmax(truth[0] @ truth[1].T, -1).gather(-1, head.target[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, w, dtype in zip(torch.autograd.grad(logp.sum(), (hidden, weight)), torch.autograd.grad(wanted.sum(), truth),
                           (hidden_dtype, weight_dtype), strict=True):  # fmt: skip
        assert relative_error(a, w) <= 2 * EPS[dtype] + (2 * EPS[torch.bfloat16] if hidden_dtype == weight_dtype
                                                         == torch.bfloat16 else 5e-6)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_plain_torch(dtype):
    head = make_head(2, 128, 256, 4096, dtype, spread=4.0)
    mine, plain, oracle = (head.cast(d, train_head=True) for d in (dtype, dtype, torch.float64))
    ours = linear_logprob(mine.hidden, mine.weight, mine.target).logp
    # Plain torch's own best: logits in the dtype, softmax in fp32.
    rows = torch.log_softmax((plain.hidden @ plain.weight.T).float(), -1)
    theirs = rows.gather(-1, plain.target[:, None])[:, 0]
    truth = oracle.logprob()[0]
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)
    for a, b, c in zip(*(torch.autograd.grad(x.sum(), h.leaves) for x, h in
                         ((ours, mine), (theirs, plain), (truth, oracle))), strict=True):  # fmt: skip
        assert relative_error(a, c) <= 2 * relative_error(b, c)


def test_confident_tokens_keep_their_gradient():
    """At a margin of 17 plain fp32 log-softmax gives logp = 0 and a zero gradient."""
    hidden = torch.eye(1, 8).requires_grad_()
    weight = torch.zeros(64, 8)
    weight[5, 0] = 17.0 + torch.log(torch.tensor(63.0))
    logp = linear_logprob(hidden, weight, torch.tensor([5])).logp
    oracle = hidden.detach().double().requires_grad_()
    truth = torch.log_softmax(oracle @ weight.double().T, -1)[:, 5]
    assert logp.item() == pytest.approx(truth.item(), rel=1e-5)
    (actual,), (wanted,) = torch.autograd.grad(logp.sum(), hidden), torch.autograd.grad(truth.sum(), oracle)
    assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("workspace_rows", [16, 17, 64])
def test_tiles_change_nothing(workspace_rows):
    """The same bits whatever the tile, padding rows and neighbours: on policy the ratio is exactly 1."""
    head = make_head(3, 50, 32, 500)
    whole = linear_logprob(head.hidden, head.weight, head.target, entropy=True)
    tiled = linear_logprob(head.hidden, head.weight, head.target, entropy=True,
                           workspace=128 + workspace_rows * 4 * (528 + 32))  # fmt: skip
    one = torch.cat([linear_logprob(head.hidden[i : i + 1], head.weight, head.target[i : i + 1]).logp
                     for i in range(50)])  # fmt: skip
    assert torch.equal(whole.logp, tiled.logp)
    assert torch.equal(whole.entropy, tiled.entropy)
    assert torch.equal(whole.logp, one)


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [(1, 100, 500), (40, 100, 3001), (333, 100, 70), (20, 1500, 300), (20, 2500, 300)],
)
def test_any_number_of_threads(threads, tokens, hidden, vocabulary, set_threads):
    """Each has a rectangle of the logits and of the gradients: tall ones, wide and deep ones, fewer than threads."""
    set_threads(threads)
    head = make_head(6, tokens, hidden, vocabulary, torch.bfloat16, bias=True)
    check(head, train_head=True, entropy=False, bound=2 * EPS[torch.bfloat16] + 5e-6)


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(40, 100, 3001), (333, 70, 500), (20, 2500, 300)])
def test_bf16_bits_are_the_same_on_any_number_of_threads(tokens, hidden, vocabulary, set_threads):
    """Also a row's logp alone: the processor's tiles of 14 or 32 rows, their last rows and last k change nothing."""
    head = make_head(6, tokens, hidden, vocabulary, torch.bfloat16).cast(torch.bfloat16, train_head=True)
    results = []
    for threads in (1, 3, 7):
        set_threads(threads)
        logp = linear_logprob(head.hidden, head.weight, head.target).logp
        results.append((logp, *torch.autograd.grad(logp.sum(), head.leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    rows = range(0, tokens, 7)
    one = [linear_logprob(head.hidden[i : i + 1], head.weight, head.target[i : i + 1]).logp for i in rows]
    assert torch.equal(results[0][0][::7], torch.cat(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 10.0}, {"temperature": 0.7}])
def test_scoring_and_training_give_the_same_bits(options, dtype):
    head = make_head(4, 60, 32, 700, dtype, **options)
    with torch.no_grad():
        scored = linear_logprob(head.hidden, head.weight, head.target, **head.options)
    for train_head in (False, True):
        for entropy in (False, True):
            h = head.cast(dtype, train_head=train_head)
            trained = linear_logprob(h.hidden, h.weight, h.target, entropy=entropy, **h.options)
            assert torch.equal(scored.logp, trained.logp)


def test_padded_equals_flat():
    head = make_head(5, 60, 16, 100)
    flat = linear_logprob(head.hidden, head.weight, head.target).logp
    padded = linear_logprob(head.hidden.view(4, 15, 16), head.weight, head.target.view(4, 15)).logp
    assert padded.shape == (4, 15)
    assert torch.equal(flat, padded.reshape(-1))


def test_ignored_rows_may_hold_anything():
    head = make_head(6, 40, 16, 100, ignored=0.5)
    clean = head.cast(torch.float32, train_head=True)
    poisoned = head.cast(torch.float32, train_head=True)
    with torch.no_grad():
        poisoned.hidden[head.target < 0] = float("nan")
    outs = [linear_logprob(h.hidden, h.weight, h.target, entropy=True) for h in (clean, poisoned)]
    assert torch.equal(outs[0].logp, outs[1].logp)
    assert bool((outs[1].logp[head.target < 0] == 0).all())
    grads = [torch.autograd.grad(o.logp.sum() + o.entropy.sum(), h.leaves)
             for o, h in zip(outs, (clean, poisoned), strict=True)]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert bool((grads[1][0][head.target < 0] == 0).all())


@pytest.mark.parametrize("value", [float("-inf"), 1e30, -1e30])
def test_extreme_logits(value):
    """A masked-out column (-inf) and huge logits are as in float64, where that is finite."""
    bias = torch.zeros(50)
    bias[7] = value
    head = make_head(7, 12, 8, 50)
    head.target[head.target == 7] = 8
    if value == 1e30:
        head.target[:] = 7  # every other token would have logp -1e30
    head.bias = bias
    out = linear_logprob(head.hidden, head.weight, head.target, bias=bias, entropy=True)
    expected = torch.log_softmax(head.hidden.double() @ head.weight.double().T + bias.double(), -1)
    wanted = expected.gather(-1, head.target[:, None])[:, 0]
    torch.testing.assert_close(out.logp.double(), wanted, rtol=1e-5, atol=1e-5)
    assert bool(out.entropy.isfinite().all())


def test_nan_is_not_swallowed():
    head = make_head(8, 4, 8, 50)
    head.hidden[2, 3] = float("nan")
    logp = linear_logprob(head.hidden, head.weight, head.target).logp
    assert logp.isnan().tolist() == [False, False, True, False]


def test_retained_graph_and_accumulation():
    h = make_head(9, 30, 16, 100).cast(torch.float32, train_head=False)
    logp = linear_logprob(h.hidden, h.weight, h.target).logp
    first = torch.autograd.grad(logp.sum(), h.hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad((2 * logp).sum(), h.hidden, retain_graph=True)[0]
    third = torch.autograd.grad(logp.sum(), h.hidden)[0]
    torch.testing.assert_close(second, 2 * first)
    assert torch.equal(third, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logp.sum(), h.hidden)
