"""A model whose parameters are spread over the ranks by FSDP2: each layer is whole only while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from longgrpo.model.load import backbone

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def shard_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Turns the parameters of `model`, the same on every rank, into DTensors over the one-dimensional `mesh`, in place.

    Units are the layers, the rest of the backbone, and the head: in one unit with that rest if it shares a weight with
    the embedding. Gradients are the mean over the ranks, reduced in float32. Each forward and backward is a collective:
    all ranks run as many, with tokens of their own.

    Source: torch.distributed.fsdp.fully_shard (FSDP2). Raises ValueError for a model whose layers cannot be told, and
    for one that has other shared weights than those of embedding and head: a unit of its own would untie them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    trunk, head, embedding = backbone(model), model.get_output_embeddings(), model.get_input_embeddings()
    kinds = set(model._no_split_modules or ())
    layers = [module for module in trunk.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"{type(model).__name__} does not name its layers (_no_split_modules): it cannot be sharded")
    tied = head.weight is embedding.weight
    _check_shared(model, {id(head.weight)} if tied else set())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if tied:  # apart, each would get a weight of its own
        inside = {id(module) for layer in layers for module in layer.modules()}
        rest = [
            m for m in trunk.modules() if id(m) not in inside and next(m.parameters(recurse=False), None) is not None
        ]
        fully_shard([*rest, head], mesh=mesh, mp_policy=policy)
    else:
        fully_shard(head, mesh=mesh, mp_policy=policy)
    fully_shard(trunk, mesh=mesh, mp_policy=policy)


def _check_shared(model: nn.Module, allowed: set[int]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name and id(parameter) not in allowed:
            raise ValueError(
                f"{name} and {first} are one weight: only embedding and head may be when a model is sharded"
            )
