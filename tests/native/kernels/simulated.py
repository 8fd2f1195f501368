"""The kernels on the simulator: built once, called with torch tensors, the ops' own signatures."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from longgrpo._ops.loss import METRICS
from testing import compiled
from testing.compiled import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "native" / "kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of Dtype in csrc/head/types.h
replaced = False  # whether the plugin has put this module's functions in the place of the CPU's ops
SCHEDULES = {"forward": 0, "reverse": 1, "shuffled": 2}


def build(into: Path = BUILD, root: Path = ROOT, sanitize: str = "") -> Path:
    """Compiles the kernels of the tree `root` for the simulator; returns the module's path."""
    return compiled.build(HERE, into, f"-DLONGGRPO_ROOT={root}", f"-DSANITIZE={sanitize}")


@functools.cache
def kernels():
    """The module; one that is built already where SIMULATED_BUILD names its folder."""
    ready = os.environ.get("SIMULATED_BUILD")
    return compiled.load(next(Path(ready).glob("longgrpo_kernels*.so")) if ready else build())


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Of the weight's gradient, as csrc/ops/loss_cuda.cpp says it."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32


def _head(hidden, weight, target, bias, token_temperature, temperature, softcap, logit_scale, workspace) -> dict:
    return {
        "tokens": hidden.shape[0], "hidden_size": hidden.shape[1], "vocabulary": weight.shape[0],
        "hidden": address(hidden), "weight": address(weight), "target": address(target), "bias": address(bias),
        "hidden_dtype": DTYPES.index(hidden.dtype), "weight_dtype": DTYPES.index(weight.dtype),
        "token_temperature": address(token_temperature), "temperature": temperature, "softcap": softcap,
        "logit_scale": logit_scale, "exact_kl": 0, "workspace": workspace,
        "dweight_dtype": DTYPES.index(gradient_dtype(weight)),
    }  # fmt: skip


def _addresses(**tensors: Tensor | None) -> dict:
    return {name: address(x) if x is not None and x.numel() else None for name, x in tensors.items()}


def linear_logprob(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = arguments[:8]
    entropy, direction, workspace, normalizer = (*arguments[8:], False)[:4]  # torch leaves defaults out
    hidden = head[0]
    n, h = hidden.shape
    out = (
        zeros(n),
        zeros(n if entropy else 0),
        zeros(n if direction else 0, h, dtype=hidden.dtype),
        zeros(n if normalizer else 0, 2),
    )
    outputs = _addresses(logp=out[0], entropy=out[1], direction=out[2], normalizer=out[3])
    kernels().linear_logprob(_head(*head, workspace) | outputs)
    return out


def linear_logprob_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    head = arguments[:8]
    c, e, need_hidden, need_weight, need_bias, workspace, logp, normalizer = (*arguments[8:], None, None)[:8]
    hidden, weight = head[:2]
    (n, h), v = hidden.shape, weight.shape[0]
    out = (
        zeros(n if need_hidden else 0, h, dtype=hidden.dtype),
        zeros(v if need_weight else 0, h, dtype=gradient_dtype(weight)),
        zeros(v if need_bias else 0),
    )
    outputs = _addresses(direction=out[0], dweight=out[1], dbias=out[2], c=c, e=e, logp=logp, normalizer=normalizer)
    kernels().linear_logprob_backward(_head(*head, workspace) | outputs)
    return out


def token_loss(
    logp, token_weight, advantages, old_logp, ref_logp, importance, sampling_logp, cu_seqlens, entropy, options,
    constants,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = zeros(1), zeros(len(METRICS)), zeros(logp.shape[0])
    tokens = {"tokens": logp.shape[0], "sequences": 0 if cu_seqlens is None else cu_seqlens.numel() - 1}
    tensors = _addresses(
        logp=logp, token_weight=token_weight, advantages=advantages, old_logp=old_logp, ref_logp=ref_logp,
        importance=importance, sampling_logp=sampling_logp, cu_seqlens=cu_seqlens, entropy=entropy, loss=out[0],
        metrics=out[1], logp_grad=out[2],
    )  # fmt: skip
    kernels().token_loss(tokens | tensors, options, constants)
    return out[0].view(()), out[1], out[2]


def linear_grpo_loss(*arguments) -> tuple[Tensor, ...]:
    head, rest = arguments[:8], arguments[8:]
    token_weight, advantages, old_logp, ref_logp, importance, sampling_logp, cu_seqlens = rest[:7]
    ref_hidden, ref_weight = rest[7:9]
    options, constants, need_hidden, need_weight, need_bias, metrics, workspace, active = rest[9:]
    hidden, weight = head[:2]
    (n, h), v = hidden.shape, weight.shape[0]
    loss, values, scale = zeros(1), zeros(len(METRICS)), zeros(n if need_hidden else 0)
    logp, entropy = zeros(n), zeros(n)
    direction = zeros(n if need_hidden else 0, h, dtype=hidden.dtype)
    dweight = zeros(v if need_weight else 0, h, dtype=gradient_dtype(weight))
    dbias = zeros(v if need_bias else 0)
    kernels().linear_grpo_loss(
        _head(*head, workspace)
        | {"sequences": 0 if cu_seqlens is None else cu_seqlens.numel() - 1}
        | _addresses(
            token_weight=token_weight, advantages=advantages, old_logp=old_logp, ref_logp=ref_logp,
            importance=importance, sampling_logp=sampling_logp, cu_seqlens=cu_seqlens, ref_hidden=ref_hidden,
            ref_weight=ref_weight, loss=loss, metrics=values, logp=logp, entropy=entropy, direction=direction,
            scale=scale, dweight=dweight, dbias=dbias,
        ),
        options, constants, active, metrics,
    )  # fmt: skip
    return loss.view(()), values, logp, entropy, direction, scale, dweight, dbias


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty_like(x)
    dtype = DTYPES.index(x.dtype)
    kernels().scale_rows(address(x), dtype, address(out), dtype, address(scale), *x.shape)
    return out
