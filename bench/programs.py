"""Cases, inputs and programs of the benchmark: the peers, called as their own trainers call them, and ours.

Every program gets the padded batch and its mask. Unsloth's file is under the AGPL: it is run, and nothing of it is
here.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import longgrpo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, CLIP, BETA = 0.9, 0.2, 0.04


# ---- cases and inputs ----


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # B, T, H, V
    dtype: str
    mode: str  # "frozen", "trainable" or "scoring"
    padding: float = 0.0  # share of the batch: lengths rise evenly from T (1 - 2 padding) to T
    half_zero: bool = False  # half the sequences have advantage 0, and beta is 0
    device: str = "cpu"

    def __str__(self) -> str:
        padding, zero = f", {self.padding:.0%} padding" * bool(self.padding), ", half of A = 0" * self.half_zero
        return f"{self.mode} {self.dtype} {tuple(self.shape)}{padding}{zero}"

    @property
    def beta(self) -> float:
        return 0.0 if self.half_zero else BETA


@dataclass
class Inputs:
    case: Case
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B]
    old: Tensor  # [B, T]
    ref: Tensor  # [B, T]
    host: tuple[Tensor, Tensor]  # mask and advantages on the CPU, where a trainer makes them

    @property
    def wrt(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def packed(self) -> tuple[Tensor, Tensor]:
        """hidden and ids of the mask's tokens, as a host that removes padding hands them on."""
        return self.hidden[self.mask], self.ids[self.mask]


def make_inputs(case: Case) -> Inputs:
    batch, length, hidden, vocabulary = case.shape
    g, dtype = torch.Generator(case.device).manual_seed(0), DTYPES[case.dtype]
    randn = functools.partial(torch.randn, generator=g, device=case.device)
    h = randn(batch, length, hidden).to(dtype)
    w = torch.empty(vocabulary, hidden, dtype=dtype, device=case.device).normal_(0, 3 / hidden**0.5, generator=g)
    ids = torch.randint(vocabulary, (batch, length), generator=g, device=case.device)
    shortest, mean = max(1 - 2 * case.padding, 0.05), 1 - case.padding
    lengths = torch.linspace(shortest, 2 * mean - shortest, batch).clamp(max=1).mul(length).long()
    lengths = lengths.clamp(min=1).to(case.device)
    advantages = randn(batch)
    if case.half_zero:  # a long one and a short one, so that it is half the tokens too
        order = [i // 2 if i % 2 == 0 else batch - 1 - i // 2 for i in range(batch)]
        advantages[order[: batch // 2]] = 0
    few = zip(h.view(-1, hidden).split(64), ids.view(-1).split(64), strict=True)  # naive, but not all logits at once
    logp = torch.cat([log_softmax(rows, w, targets) for rows, targets in few]).view(batch, length)
    # Near enough that no row is clipped: its gradient would be 0, and skipping it would be luck.
    old, ref = (logp + 0.03 * randn(batch, length) for _ in range(2))
    mask = torch.arange(length, device=case.device) < lengths[:, None]
    if case.mode != "scoring":
        h.requires_grad_()
        w.requires_grad_(case.mode == "trainable")
    return Inputs(case, h, w, ids, mask, advantages, old, ref, (mask.cpu(), advantages.cpu()))


def log_softmax(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def padded(x: Inputs, logp: Tensor) -> Tensor:
    """[B, T], from that or from the packed tokens."""
    if logp.shape == x.mask.shape:
        return logp
    return torch.zeros(x.mask.shape, dtype=logp.dtype).masked_scatter(x.mask, logp)


def loss_of(x: Inputs, logp: Tensor) -> Tensor:
    """The loss from logp [B, T] in plain torch: what the hosts of the peers that return logp do."""
    counts = x.mask.sum(-1, keepdim=True)
    weight = x.mask / counts / len(counts)
    advantage, ratio = x.advantages[:, None], torch.exp(logp - x.old)
    per_token = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    if x.case.beta:
        d = x.ref - logp
        per_token = per_token + x.case.beta * (torch.expm1(d) - d)
    return (weight * per_token).sum()


# ---- programs: inputs -> logp ([B, T] or packed), or the scalar loss itself ----


def lone_file(package: str, path: str):
    """A module from one file of an installed package, without running the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"lone_{package}", file)
    module = importlib.util.module_from_spec(spec)
    # Nothing optional is found: verl's file looks for Liger's kernel, and Liger then dies where Triton is missing.
    liger_modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("liger_kernel")}
    with mock.patch.object(sys, "path", []):
        spec.loader.exec_module(module)
    sys.modules.update(liger_modules)
    return module


@functools.cache
def unsloth_module():
    return lone_file("unsloth_zoo", "fused_losses/fused_linear.py")


@functools.cache
def verl_module():
    return lone_file("verl", "utils/experimental/torch_functional.py")


def naive(x: Inputs) -> Tensor:
    return log_softmax(x.hidden, x.weight, x.ids)


def naive_packed(x: Inputs) -> Tensor:
    hidden, ids = x.packed()
    return log_softmax(hidden, x.weight, ids)


def trl(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, ids = x.packed()
    return ChunkedLogProbFunction.apply(hidden, x.weight, None, ids, TEMPERATURE, 32768, None, 1.0, ("entropy",))[0]


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=x.case.beta, compiled=False, use_ref_model=True, loss_type="grpo", temperature=TEMPERATURE
    )
    logps = {"ref_per_token_logps": x.ref, "old_per_token_logps": x.old}
    return loss(x.hidden, x.weight, x.ids, x.mask, x.advantages, **logps)[0]


def unsloth(x: Inputs) -> Tensor:
    return unsloth_module().fused_linear_logprobs(x.hidden, x.weight, x.ids, mask=x.mask, temperature=TEMPERATURE)


def verl(x: Inputs) -> Tensor:
    hidden, ids = x.packed()
    return verl_module().FusedLinearForPPOFunction.apply(hidden, x.weight, ids, TEMPERATURE, 512)[0]


def torch_linear_cross_entropy(x: Inputs) -> Tensor:
    hidden, ids = x.packed()
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden / TEMPERATURE, x.weight, ids, reduction="none", options=options)


def linear_logprob(x: Inputs) -> Tensor:
    target = x.ids.masked_fill(~x.mask, -1)
    return longgrpo.linear_logprob(x.hidden, x.weight, target, temperature=TEMPERATURE).logp


def config(x: Inputs) -> longgrpo.GRPOLossConfig:
    return longgrpo.GRPOLossConfig(loss_type="grpo", beta=x.case.beta, epsilon=CLIP)


def linear_logprob_grpo_loss(x: Inputs) -> Tensor:
    logp = linear_logprob(x)
    return longgrpo.grpo_loss(logp, x.advantages, mask=x.mask, old_logp=x.old, ref_logp=x.ref, config=config(x)).loss


def linear_grpo_loss(x: Inputs, **options) -> Tensor:
    mask, advantages = x.host
    return longgrpo.linear_grpo_loss(
        x.hidden, x.weight, x.ids, advantages, mask=mask, old_logp=x.old, ref_logp=x.ref, temperature=TEMPERATURE,
        config=config(x), **options,
    ).loss  # fmt: skip


# ---- peers that need a GPU; quack's linear cross entropy takes no weight of a token, so it cannot play ----


def cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    hidden, ids = x.packed()
    return -linear_cross_entropy(hidden / TEMPERATURE, x.weight, ids, reduction="none")


def liger_triton(x: Inputs) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = F.pad(x.hidden, (0, 0, 0, 1)) @ x.weight.T  # [B, T + 1, V]: the last position predicts nothing
    return triton_grpo_loss(
        logits, x.old, x.ref, x.ids, x.advantages, x.mask, temperature=TEMPERATURE, beta=x.case.beta, eps_low=CLIP,
        eps_high=CLIP, loss_type="grpo", reduce=True,
    )[0]  # fmt: skip


def verl_triton(x: Inputs) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden, ids = x.packed()
    return linear_cross_entropy(hidden, x.weight, ids, TEMPERATURE, "none", None)[0]


PEERS = {
    "naive": naive,
    "TRL": trl,
    "Liger": liger,
    "Unsloth": unsloth,
    "verl": verl,
    "torch": torch_linear_cross_entropy,
}
GPU_PEERS = {"Liger Triton": liger_triton, "verl Triton": verl_triton, "CCE": cut_cross_entropy}
NO_SCORING = (liger, liger_triton)  # these give the loss alone
# What a reader who packs by hand may want to know: no bound on memory, so no peer.
BASELINES = {"naive packed": naive_packed}
FUSED = {"linear_grpo_loss": linear_grpo_loss}
LOSS_OURS = {"linear_logprob + grpo_loss": linear_logprob_grpo_loss, **FUSED}
SCORING_OURS = {"linear_logprob": linear_logprob}
GROWTH = {"linear_grpo_loss, 16 MiB": functools.partial(linear_grpo_loss, workspace=16 << 20)}
ALL = PEERS | GPU_PEERS | BASELINES | LOSS_OURS | SCORING_OURS | GROWTH


def peers(case: Case) -> dict[str, Callable]:
    those = PEERS if case.device == "cpu" else PEERS | GPU_PEERS
    return {name: f for name, f in those.items() if case.mode != "scoring" or f not in NO_SCORING}


def programs(case: Case) -> dict[str, Callable]:
    return peers(case) | BASELINES | (SCORING_OURS if case.mode == "scoring" else LOSS_OURS)


def run(program: Callable, x: Inputs) -> tuple[Tensor, ...]:
    """Gradients of x.wrt, or logp when scoring."""
    if x.case.mode == "scoring":
        with torch.no_grad():
            return (program(x),)
    out = program(x)
    return torch.autograd.grad(out if out.dim() == 0 else loss_of(x, padded(x, out)), x.wrt)


def bare_gemms(x: Inputs, dtype: torch.dtype) -> Callable[[], None]:
    """The GEMMs that no program can do without, into memory that is there already."""
    moving = x.mask & (x.advantages != 0)[:, None] if x.case.half_zero else x.mask
    rows, active = int(x.mask.sum()), int(moving.sum())
    h, w = x.hidden.detach()[x.mask].to(dtype), x.weight.detach().to(dtype)
    logits = torch.empty(rows, len(w), dtype=dtype, device=w.device)
    dh, dw = torch.empty_like(h[:active]), torch.empty_like(w) if x.case.mode == "trainable" else None

    def gemms() -> None:
        torch.mm(h, w.T, out=logits)
        if x.case.mode != "scoring":
            torch.mm(logits[:active], w, out=dh)
        if dw is not None:
            torch.mm(logits[:active].T, h[:active], out=dw)

    return gemms
