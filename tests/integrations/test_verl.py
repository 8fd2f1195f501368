"""verl's functions, called as it calls them, with our patch in and without. `make bench-integrations` runs this: verl
brings ray, which is too large for the default tests."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

verl = pytest.importorskip("verl")

from transformers import AutoModelForCausalLM  # noqa: E402
from verl.models.transformers.dense_common import forward_with_torch_backend  # noqa: E402
from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

from longgrpo.integrations.verl import patch_verl, register_policy_loss  # noqa: E402
from testing import ROOT  # noqa: E402

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def head_inputs(dtype=torch.float32, shape=(3, 7)):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(101, 16, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 101, shape, generator=g)


def results(hidden, weight, ids, backend="torch"):
    logp, entropy = FusedLinearForPPO(impl_backend=backend)(hidden, weight, ids, temperature=0.8)
    g = torch.Generator().manual_seed(1)
    total = (logp * torch.randn(logp.shape, generator=g)).sum() + (
        entropy.float() * torch.rand(logp.shape, generator=g)
    ).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("shape", [(3, 7), (21,)], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head(dtype, shape):
    theirs = results(*head_inputs(dtype, shape))
    with patch_verl():
        ours = results(*head_inputs(dtype, shape))
    exact = results(*(x if x.dtype == torch.int64 else x.detach().double().requires_grad_()
                      for x in head_inputs(dtype, shape)))  # fmt: skip
    bound = 1e-5 if dtype == torch.float32 else 2 * 2**-8
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        error, their_error = ((x.double() - truth.double()).norm() / truth.double().norm() for x in (a, b))
        assert error <= max(bound, their_error)


def test_a_model_as_verl_calls_it(model_directory):
    """dense_common's forward in the place of the model's own, as verl's monkey patch puts it."""
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(2))
    forward = types.MethodType(forward_with_torch_backend, model)

    def step():
        model.zero_grad()
        out = forward(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True, temperature=0.7)
        (out.log_probs.sum() - 0.1 * out.entropy.sum()).backward()
        return out.log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    their_logp, their_gradients = step()
    with patch_verl():
        logp, gradients = step()
    torch.testing.assert_close(logp, their_logp, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - their_gradients[name]).norm() <= 1e-4 * their_gradients[name].norm(), name


def test_undone_cleanly_and_other_versions_refused(monkeypatch):
    before = FusedLinearForPPO.forward
    patch = patch_verl()
    assert FusedLinearForPPO.forward is not before
    patch.undo()
    assert FusedLinearForPPO.forward is before
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(RuntimeError, match=r"tested with verl 0\.9\.1 and not with 0\.10\.0"):
        patch_verl()


def loss_inputs():
    g = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(4, 9, generator=g)
    logp = (old + 0.8 * torch.randn(4, 9, generator=g)).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 1])[:, None]
    return {"old_log_prob": old, "log_prob": logp, "advantages": torch.randn(4, 1, generator=g).expand(4, 9) * mask,
            "response_mask": mask,
            "rollout_is_weights": (torch.rand(4, 1, generator=g) + 0.5).expand(4, 9)}  # fmt: skip


# verl's "gspo" knows no dual clip.
LOSSES = {"vanilla": {}, "gspo": {"importance_level": "sequence", "delta": None}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8}], ids=["1", "2"])
@pytest.mark.parametrize("theirs", LOSSES)
def test_the_policy_loss(theirs, info, mode):
    register_policy_loss("longgrpo-test", **LOSSES[theirs])
    config = ActorConfig(
        strategy="fsdp", clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
    )  # fmt: skip
    config.global_batch_info.update(info)
    got = {}
    for name in (theirs, "longgrpo-test"):
        inputs = loss_inputs()
        loss, metrics = get_policy_loss_fn(name)(loss_agg_mode=mode, config=config, **inputs)
        got[name] = loss.detach(), torch.autograd.grad(loss, inputs["log_prob"])[0], metrics
    (their_loss, their_gradient, their_metrics), (loss, gradient, metrics) = got.values()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)
    for name, value in metrics.items():
        assert value == pytest.approx(their_metrics[name], abs=1e-6), name


def test_the_example_learns(model_directory):
    """In a process of its own: importing it patches verl."""
    folder = ROOT / "examples" / "integrations"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import verl_worker; "
        "curve = verl_worker.train(sys.argv[2], steps=5, learning_rate=1e-3); assert curve[-1] > curve[0] + 0.05, curve"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(model_directory)], check=True, timeout=200)
