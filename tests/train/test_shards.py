"""Gradients that go to their owners during the backward."""

from __future__ import annotations

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.model.masters import MasterWeights
from longgrpo.train.ranks import Ranks
from longgrpo.train.shards import GradientShards, owners_of
from testing.models import random_model

LAYER = 9  # parameters: seven projections and two norms


class Halves(Ranks):
    """The first of two ranks, of which the other always has what this one has."""

    world = 2

    def __init__(self, other=()):
        self.waiting, self.shards, self.other = [], None, list(other)

    def sum(self, tensor, what="a tensor", *, to=None):
        self.waiting.append(len(self.shards._waiting))
        tensor.mul_(2)

    def gather(self, value, what="values"):
        return [value, self.other.pop(0) if self.other else value]


def sharded(model, ranks):
    """The model's gradients go to the shards, and what is stepped here."""
    parameters = dict(model.named_parameters())
    owners = owners_of(parameters, 2)
    ranks.shards = GradientShards(parameters, owners, ranks)
    MasterWeights(parameters, {name for name in owners if owners[name] == 0}, ranks.shards.take)
    return ranks.shards, owners


def loss_of(model, seed):
    ids = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_no_more_than_a_layer_waits_and_the_owner_has_the_sum(dtype, tied):
    model = random_model("llama", num_hidden_layers=4, tie_word_embeddings=tied).to(dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(loss_of(model, seed), parameters) for seed in (1, 2)]  # which no hook sees
    wanted = {name: 2 * (a.float() + b.float()) for name, a, b in zip(names, *gradients, strict=True)}
    ranks = Halves()
    shards, owners = sharded(model, ranks)
    shards.begin(2)
    for seed in (1, 2):
        loss_of(model, seed).backward()
        shards.end_round()
        assert all(p.grad is None for p in parameters)
    found = shards.finish()
    assert max(ranks.waiting) <= LAYER
    assert found.keys() == {name for name in owners if owners[name] == 0}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-9)


def test_a_rank_without_a_backward_takes_part_and_a_parameter_without_a_gradient_has_none():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(3, 2)})
    ranks = Halves(other=[3])  # micro-batches
    shards, owners = sharded(model, ranks)
    shards.begin(1)
    model["used"](torch.ones(3)).sum().backward()
    shards.end_round()
    found = shards.finish()
    assert len(ranks.waiting) == 3 * len(owners)
    assert found.keys() == {name for name in owners if owners[name] == 0 and name.startswith("used")}
    assert found


def test_a_backward_that_failed_leaves_nothing_to_the_next():
    model = torch.nn.Linear(3, 2)
    shards, owners = sharded(model, Halves())
    shards.begin(1)
    shards.take(next(iter(owners)), torch.ones(2, 3))  # and then it fails
    shards.begin(1)
    model(torch.ones(3)).sum().backward()
    shards.end_round()
    for gradient in shards.finish().values():
        assert torch.equal(gradient, torch.full_like(gradient, 2.0))


def test_an_adapter_is_not_shared_out(tree):
    with pytest.raises(ConfigError, match="shard_gradients with lora"):
        build_config(tree | {"memory": {"shard_gradients": True}})
