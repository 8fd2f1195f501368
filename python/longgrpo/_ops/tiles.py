"""The tiles of a head: what a measurement may choose among, and its choice (csrc/head/tile_choice.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from longgrpo._ops.library import ops

TILINGS = ("whole_rows", "chunks", "weight")  # the order of Tiling in csrc/cuda/plan.h


class Tile(NamedTuple):
    """Tokens and vocabulary columns of a tile. 0: as the device's own rule has it; whole rows have no columns."""

    rows: int = 0
    columns: int = 0


class Tiles(NamedTuple):
    """TileChoice: a tile of each kind, the passes of a trained head (0: as the rule has it), and whether scoring that
    stands alone is csrc/cuda/score.cu's."""

    whole_rows: Tile = Tile()
    chunks: Tile = Tile()
    weight: Tile = Tile()
    passes: int = 0
    score: bool = False

    def but(self, kind: str, tile: Tile) -> Tiles:
        """The same with another tile of one kind."""
        field: dict[str, Any] = {kind: tile}
        return self._replace(**field)


class HeadShape(NamedTuple):
    """A head's sizes and dtypes."""

    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    weight_dtype: torch.dtype


def candidate_tiles(
    head: HeadShape, kind: str, *, tokens: int, trained: bool, most: int, workspace: int, multiprocessors: int
) -> list[Tile]:
    """At most so many tiles of a kind, that of the device's own rule first. multiprocessors: of the GPU; 0: the CPU."""
    numbers = ops.candidate_tiles(
        tokens, *head, trained, TILINGS.index(kind), most, workspace, multiprocessors
    )  # fmt: skip
    return [Tile(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def choose_tiles(head: HeadShape, tiles: Tiles, device: torch.device) -> None:
    """The tiles of this head on this kind of device from now on, in this process. Where they do not fit into a call's
    workspace, the rule's serve."""
    numbers = [*tiles.whole_rows, *tiles.chunks, *tiles.weight, tiles.passes, int(tiles.score)]
    ops.choose_tiles(torch.empty(0, device=device), *head, numbers)
