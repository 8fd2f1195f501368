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


class GradientShards:
    """Adds up each gradient at the rank that owns its parameter, while the backward goes on (ZeRO-2,
    arXiv:1910.02054): on no rank are there more of them than its own and those of a layer.

    A backward of each rank is a round, and a rank without one takes part in it all the same. In a round all go through
    the parameters in one order, the model's backwards, which is about that of a backward; what comes early waits.
    """

    def __init__(self, parameters: Mapping[str, Tensor], owners: Mapping[str, int], ranks: Ranks) -> None:
        self._parameters, self._owners, self._ranks = parameters, owners, ranks
        self._order = list(parameters)[::-1]
        self._clear()

    def _clear(self) -> None:
        self._left = 0  # rounds
        self._place = 0  # in the order
        self._waiting: dict[str, Tensor] = {}
        self._present: set[str] = set()  # parameters that had a gradient on this rank
        self._sums: dict[str, Tensor] = {}  # of this rank's parameters, float32

    def begin(self, own: int) -> None:
        """Of an update, with so many backwards on this rank."""
        self._clear()
        self._left = max(self._ranks.gather(own, "the micro-batches"))

    @torch.no_grad()
    def take(self, name: str, gradient: Tensor) -> None:
        """A gradient of the backward that runs."""
        self._waiting[name] = gradient
        self._present.add(name)
        while self._place < len(self._order) and self._order[self._place] in self._waiting:
            self._add_next()

    @torch.no_grad()
    def end_round(self) -> None:
        while self._place < len(self._order):  # the others, most of which have no gradient
            self._add_next()
        if self._waiting:
            raise RuntimeError(f"a second gradient in one backward: {', '.join(self._waiting)}")
        self._place, self._left = 0, self._left - 1

    def finish(self) -> dict[str, Tensor]:
        """The sums of this rank's parameters, of those that had a gradient on any rank."""
        while self._left > 0:
            self.end_round()
        present = set[str]().union(*self._ranks.gather(self._present, "the gradients"))
        sums = {name: total for name, total in self._sums.items() if name in present}
        self._clear()
        return sums

    def _add_next(self) -> None:
        name = self._order[self._place]
        self._place += 1
        gradient, owner = self._waiting.pop(name, None), self._owners[name]
        flat = _flat(gradient, self._parameters[name]).float()
        self._ranks.sum(flat, f"the gradient of {name}", to=owner)
        if owner == self._ranks.rank:
            own = flat.view(self._parameters[name].shape)
            self._sums[name] = self._sums[name].add_(own) if name in self._sums else own


@torch.no_grad()
def sum_gradients(
    masters: MasterWeights,
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, int],
    ranks: Ranks,
    shards: GradientShards | None = None,
) -> Tensor:
    """Adds up the gradients of `parameters` over the ranks, each for its owner; without owners, for all. `shards` has
    done so already. Returns the norm of the whole, a scalar."""
    holders = masters.holders
    if shards:
        for name, total in shards.finish().items():
            holders[name].grad = total
    elif ranks.world > 1:
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
