"""A sharded model on two gloo ranks against the whole one on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longgrpo import GRPOLossConfig, linear_grpo_loss
from longgrpo.model.head import head_of
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from longgrpo.model.sharded import shard_model
from testing.models import random_model
from testing.ranks import run_ranks

WORLD, VOCABULARY, ROWS = 2, 67, [9, 4, 6]  # micro-batches of one sequence each: rank 0 has two, rank 1 one


def tiny(tied):
    model = random_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2, tie_word_embeddings=tied)
    use_packed_attention(model)
    return model


def loss_of(model, part, normalizer):
    """Of micro-batch `part`; None: an empty one, which runs the model on one token and counts nothing."""
    length = 1 if part is None else ROWS[part]
    drawn = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCABULARY, (length,), generator=drawn)
    hidden = packed_hidden(model, pack_sequences(ids, torch.arange(length), [0, length]))
    head = head_of(model)
    target = ids.roll(-1) if part is not None else torch.tensor([-1])
    advantages = torch.tensor([0.0 if part is None else (-1.0) ** part])
    bounds = torch.tensor([0, length], dtype=torch.int32)
    return linear_grpo_loss(
        hidden, head.weight, target, advantages, cu_seqlens=bounds, normalizer=normalizer,
        config=GRPOLossConfig(loss_type="dapo"),
    ).loss  # fmt: skip


def descend(model, parts, normalizer):
    """Three updates by plain gradient descent; the losses, and the gradients of the first."""
    losses, first = [], {}
    for _ in range(3):
        total = torch.zeros(())
        for part in parts:
            loss = loss_of(model, part, normalizer)
            loss.backward()
            total += loss.detach()
        losses.append(total)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                first.setdefault(name, parameter.grad.clone())
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    return losses, first


def on_ranks(tied: bool, directory: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    model = tiny(tied)
    shard_model(model, init_device_mesh("cpu", (WORLD,)))
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    parts = [0, 2] if dist.get_rank() == 0 else [1, None]
    losses, first = descend(model, parts, sum(ROWS) / WORLD)  # the gradient's mean over the ranks is then their sum
    for loss in losses:
        dist.all_reduce(loss)
    state = {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}
    whole = {name: gradient.full_tensor() for name, gradient in first.items()}
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.save(
        {"losses": [loss / WORLD for loss in losses], "first": whole, "state": state, "own": own, "tied": same},
        directory / f"{dist.get_rank()}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_ranks_with_half_a_model_each_are_one_rank(tied, tmp_path):
    ended = run_ranks(WORLD, tmp_path / "logs", on_ranks, tied, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
    whole = tiny(tied)
    losses, first = descend(whole, [0, 1, 2], sum(ROWS))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    size = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(rank["own"] for rank in found) == size
    for rank in found:
        assert rank["own"] <= 0.6 * size
        assert rank["tied"] == tied
        torch.testing.assert_close(rank["losses"], losses, rtol=0, atol=1e-6)
        assert rank["first"].keys() == first.keys()
        for name, gradient in first.items():
            assert (rank["first"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(rank["state"][name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_other_shared_weights_are_refused():
    model = tiny(tied=False)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight and model\.layers\.0\.mlp\.up_proj\.weight"):
        shard_model(model, None)


def test_a_model_without_named_layers_is_refused():
    model = tiny(tied=False)
    model._no_split_modules = None
    with pytest.raises(ValueError, match="_no_split_modules"):
        shard_model(model, None)
