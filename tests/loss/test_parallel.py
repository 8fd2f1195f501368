"""The head over two ranks (gloo): the numbers of one rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longgrpo import GRPOLossConfig, linear_grpo_loss, linear_logprob
from testing.cases import make_batch, make_head, relative_error

ROWS = (0, 37, 100)  # the vocabulary's shards, of unequal size


def whole_and_shard(seed: int, dtype: torch.dtype, **options):
    """The same head on one rank and on this one: (whole, shard, its slice of the vocabulary)."""
    head = make_head(seed, 20, 16, ROWS[-1], ignored=0.2, **options)
    rows = slice(*ROWS[dist.get_rank() : dist.get_rank() + 2])
    whole, shard = (head.cast(dtype, train_head=True) for _ in range(2))
    shard.weight = shard.weight.detach()[rows].clone().requires_grad_()
    if shard.bias is not None:
        shard.bias = shard.bias.detach()[rows].clone().requires_grad_()
    return whole, shard, rows


def same(whole, shard, rows, wanted: torch.Tensor, actual: torch.Tensor, bound: float) -> None:
    weights = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(9))
    expected = torch.autograd.grad((wanted * weights).sum(), whole.leaves)
    gradients = torch.autograd.grad((actual * weights).sum(), shard.leaves)
    assert (error := relative_error(gradients[0], expected[0])) <= bound, error
    for got, want in zip(gradients[1:], expected[1:], strict=True):
        assert (error := relative_error(got, want[rows])) <= bound, (error, got.shape)


def vocabulary_parallel_logprob() -> None:
    hard = {"temperature": None, "softcap": 5.0, "logit_scale": 0.25, "bias": True}
    for seed, (dtype, options, bound) in enumerate((
        (torch.float32, {}, 2e-6), (torch.float32, hard, 2e-6), (torch.bfloat16, hard, 4 * 2**-8),
        (torch.float32, {"spread": 30.0}, 2e-6),  # confident tokens: logp near 0 keeps its digits
    )):  # fmt: skip
        for entropy in (False, True):
            whole, shard, rows = whole_and_shard(seed, dtype, **options)
            wanted = linear_logprob(whole.hidden, whole.weight, whole.target, entropy=entropy, **whole.options)
            actual = linear_logprob(
                shard.hidden, shard.weight, shard.target, entropy=entropy, group=dist.group.WORLD, **shard.options
            )
            torch.testing.assert_close(actual.logp, wanted.logp, rtol=1e-5, atol=2e-6)
            if entropy:
                torch.testing.assert_close(actual.entropy, wanted.entropy, rtol=1e-5, atol=1e-5)
            mix = [out.logp + (0.5 * out.entropy if entropy else 0) for out in (wanted, actual)]
            same(whole, shard, rows, *mix, bound)
            everyone = [torch.empty_like(actual.logp) for _ in range(2)]
            dist.all_gather(everyone, actual.logp.detach())
            assert torch.equal(*everyone)  # the same bits on every rank


def vocabulary_parallel_loss() -> None:
    config = GRPOLossConfig(loss_type="grpo", beta=0.1, entropy_coef=0.01, importance_level="sequence")
    whole, shard, rows = whole_and_shard(5, torch.float32)
    batch = make_batch(5, [8, 12], logp=linear_logprob(whole.hidden, whole.weight, whole.target).logp.detach())
    wanted = linear_grpo_loss(
        whole.hidden, whole.weight, whole.target, batch.advantages, config=config, **batch.arguments(config)
    )
    actual = linear_grpo_loss(
        shard.hidden, shard.weight, shard.target, batch.advantages, config=config, group=dist.group.WORLD,
        **batch.arguments(config),
    )  # fmt: skip
    torch.testing.assert_close(actual.loss, wanted.loss)
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-4, atol=1e-5, msg=name)
    same(whole, shard, rows, wanted.loss, actual.loss, 5e-6)


def vocabulary_parallel_errors() -> None:
    _, shard, _ = whole_and_shard(6, torch.float32)
    shard.target[3] = ROWS[-1]
    with pytest.raises(ValueError, match="target 100 is outside the vocabulary of 100"):
        linear_logprob(shard.hidden, shard.weight, shard.target, group=dist.group.WORLD)


class Model(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        self.lm_head = torch.nn.Linear(16, len(weight), bias=False)
        self.lm_head.weight = torch.nn.Parameter(weight)

    def forward(self, x, target):
        return -linear_logprob(self.body(x), self.lm_head.weight, target).logp.mean()


def fully_shard_head() -> None:
    """A head of its own FSDP unit is a DTensor in the forward; its gradient is that of the mean over the ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    heads = [make_head(7 + rank, 20, 16, 101) for rank in range(2)]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(heads[0].weight.clone()))
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = models
    fully_shard(sharded.lm_head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    torch.stack([whole(head.hidden, head.target) for head in heads]).mean().backward()
    mine = heads[dist.get_rank()]
    sharded(mine.hidden, mine.target).backward()
    for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, msg=name)


def run_here() -> None:
    torch.set_num_threads(1)
    store = f"file://{os.environ['STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=int(os.environ["RANK"]), world_size=2)
    try:
        vocabulary_parallel_logprob()
        vocabulary_parallel_loss()
        vocabulary_parallel_errors()
        fully_shard_head()
    finally:
        dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one(tmp_path):
    """Two processes, which meet in a file: no port to collide with."""
    code = "import test_parallel as t; t.run_here()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STORE": str(tmp_path / "store")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
