"""A checkpoint on several ranks: rank 0 writes and reads the files, which are those of one rank, and has from each rank
what only that one holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longgrpo.errors import TrainingError
from longgrpo.train.ranks import ALONE, Ranks

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shards:
    """Of a checkpoint's tensors, which are named "KEY.PARAMETER", those of a parameter that has an owner are its."""

    ranks: Ranks = ALONE
    owners: Mapping[str, int] = field(default_factory=dict)

    def _owner(self, full: str) -> int | None:
        return self.owners.get(full.partition(".")[2])

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0 the tensors of all ranks, those of others in host memory; elsewhere this rank's own."""
        if not self.owners:
            return tensors
        ranks, whole = self.ranks, dict(tensors)
        own = {name: tensor for name, tensor in tensors.items() if self._owner(name) == ranks.rank}
        listed = ranks.gather({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}, "a checkpoint")
        for source in range(1, ranks.world):
            for name, (shape, dtype) in listed[source].items():
                if ranks.rank == source:
                    tensor = own[name].detach().to("cpu").contiguous()
                else:
                    tensor = torch.empty(shape if ranks.is_first else 0, dtype=dtype)
                ranks.send(tensor, source, 0, "a checkpoint's tensors")
                if ranks.is_first:
                    whole[name] = tensor
        return whole

    def merge(self, numbers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By parameter what the optimizer of its owner keeps besides tensors."""
        if not self.owners:
            return numbers
        return {name: own for part in self.ranks.gather(numbers, "a checkpoint") for name, own in part.items()}

    def distribute(
        self, read: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A state, and tensors, by `read()` on rank 0: a rank gets those that have no owner, and those that are its."""
        ranks = self.ranks
        if ranks.world == 1:
            return read()
        state, saved = read() if ranks.is_first else ({}, {})
        listed = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}
        state, listed = ranks.broadcast((state, listed), "a checkpoint")
        own: dict[str, Tensor] = {}
        for name, (shape, dtype) in listed.items():
            owner = self._owner(name)
            wanted = owner is None or owner == ranks.rank
            tensor = saved.pop(name) if ranks.is_first else torch.empty(shape if wanted else 0, dtype=dtype)
            if owner is None:
                ranks.share(tensor, 0, "a checkpoint's tensors")
            else:
                ranks.send(tensor, 0, owner, "a checkpoint's tensors")
            if wanted:
                own[name] = tensor
        return state, own

    def check_alike(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises TrainingError unless all ranks have the same bits. parameters: what the model computes with."""
        if self.ranks.world == 1:
            return
        sums = [_checksum(tensor) for tensor in parameters.values()]
        found = self.ranks.gather(torch.stack(sums).tolist() if sums else [], "the weights' checksums")
        for rank, other in enumerate(found):
            odd = [name for name, a, b in zip(parameters, found[0], other, strict=True) if a != b]
            if odd:
                raise TrainingError(
                    f"rank {rank} has other weights than rank 0 ({len(odd)} of {len(found[0])} parameters, first "
                    f"{odd[0]}): go back to the last checkpoint, and look for what changes weights on one rank only"
                )


WHOLE = Shards()


def _checksum(tensor: Tensor) -> Tensor:
    """[] int64: the sum of the bits, as integers."""
    bits = tensor.detach().contiguous().view(-1).view(_SAME_SIZE[tensor.element_size()])
    return bits.sum(dtype=torch.int64).cpu()
