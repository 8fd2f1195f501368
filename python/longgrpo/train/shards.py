"""What the ranks add up and hand on: gradients before an update, weights after it.

Of an adapter every rank steps all, alike. In full fine-tuning each parameter belongs to one rank: only that rank has
its master and its moments, steps it, and hands it on. An optimizer that steps each parameter by itself, as AdamW does,
so gives the bits that one rank would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from longgrpo.model.masters import BUCKET, MasterWeights, balanced
from longgrpo.train.ranks import Ranks


def owners_of(parameters: Mapping[str, Tensor], world: int) -> dict[str, int]:
    """By name the rank that owns a parameter, so that all have about as many elements."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    return dict(zip(parameters, balanced(sizes, world), strict=True))


@torch.no_grad()
def sum_gradients(
    masters: MasterWeights, parameters: Mapping[str, Tensor], owners: Mapping[str, int], ranks: Ranks
) -> Tensor:
    """Adds up the gradients of `parameters` over the ranks, each for its owner; without owners, for all. Returns the
    norm of the whole, a scalar."""
    holders = masters.holders
    if ranks.world > 1:
        present = ranks.gather([name for name, holder in holders.items() if holder.grad is not None], "the gradient")
        names = {name for own in present for name in own}
        for owner, bucket in _buckets([name for name in parameters if name in names], parameters, owners, 4):
            flat = torch.cat([_flat(holders[name].grad, parameters[name]) for name in bucket])
            ranks.sum(flat, "the gradient", to=owner)
            summed = flat.split([parameters[name].numel() for name in bucket])
            for name, own in zip(bucket, summed, strict=True):
                mine = owner is None or owner == ranks.rank
                holders[name].grad = own.view(parameters[name].shape) if mine else None
    own = {name: p.grad for name, p in masters.parameters.items() if p.grad is not None}
    if not owners:
        return get_total_norm(own.values())
    norms = torch.stack(torch._foreach_norm(list(own.values()))).tolist() if own else []  # one read of the device
    every = ranks.gather(dict(zip(own, norms, strict=True)), "the gradient's norm")
    by_name = {name: norm for norms in every for name, norm in norms.items()}
    norm: Tensor = torch.linalg.vector_norm(torch.tensor([by_name[name] for name in parameters if name in by_name]))
    return norm


@torch.no_grad()
def share_parameters(parameters: Mapping[str, Tensor], owners: Mapping[str, int], ranks: Ranks) -> None:
    """Copies each parameter from the rank that owns it, in place."""
    for owner, bucket in _buckets([name for name in parameters if name in owners], parameters, owners):
        assert owner is not None
        flat = torch.cat([parameters[name].flatten() for name in bucket])
        ranks.share(flat, owner, "the weights")
        if owner != ranks.rank:
            for name, own in zip(bucket, flat.split([parameters[name].numel() for name in bucket]), strict=True):
                parameters[name].copy_(own.view(parameters[name].shape))


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.flatten()


def _buckets(
    names: Iterable[str], parameters: Mapping[str, Tensor], owners: Mapping[str, int], element: int | None = None
) -> Iterator[tuple[int | None, Sequence[str]]]:
    """Parameters of one owner and type, some BUCKET bytes of them. element: bytes of one, if not the parameter's."""
    kinds: dict[tuple[int | None, torch.dtype], list[str]] = {}
    for name in names:
        kinds.setdefault((owners.get(name), parameters[name].dtype), []).append(name)
    for (owner, _), of_kind in sorted(kinds.items(), key=lambda item: (item[0][0] or 0, str(item[0][1]))):
        bucket: list[str] = []
        size = 0
        for name in of_kind:
            bytes_of = parameters[name].numel() * (element or parameters[name].element_size())
            if bucket and size + bytes_of > BUCKET:
                yield owner, bucket
                bucket, size = [], 0
            bucket.append(name)
            size += bytes_of
        yield owner, bucket
