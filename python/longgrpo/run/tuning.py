"""The tiles of a run's head: chosen before its first step, kept in its directory, the same to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from longgrpo._ops.tiles import HeadShape, Tiles, choose_tiles
from longgrpo.loss.tuner import Tuning, autotune, card_of, facts_of
from longgrpo.model.head import head_of
from longgrpo.run.files import write_file
from longgrpo.train.ranks import ALONE, Ranks
from longgrpo.train.state import TrainState

FILE = "tiles.json"


def tune_run(
    directory: Path,
    state: TrainState,
    wanted: bool | None,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> None:
    """Chooses the tiles of the trained model's head, unless the run in `directory` has chosen already, on such a card.
    wanted: memory.autotune. Rank 0 chooses for all."""
    weight = head_of(state.model).weight  # [V, H]; hidden states are of its dtype
    head = HeadShape(weight.shape[1], weight.shape[0], weight.dtype, weight.dtype)
    if not (weight.is_cuda if wanted is None else wanted):
        return choose_tiles(head, Tiles(), weight.device)  # another run of this process may have chosen
    tuning = ranks.of_first(lambda: _chosen(directory, weight, head, say), "the head's tiles")
    choose_tiles(head, tuning.tiles, weight.device)
    if ranks.is_first:
        write_file(directory / FILE, tuning.json())


def _chosen(directory: Path, weight: Tensor, head: HeadShape, say: Callable[[str], None]) -> Tuning:
    card = card_of(weight.device)
    if kept := _kept(directory / FILE, say):
        if kept.facts["card"] == card:
            say(f"{kept.text()}; chosen when the run began")
            return kept
        say(f"tiles of the head: chosen on {kept.facts['card']}, and this is {card}: measured anew")
    try:
        tuning = autotune(
            hidden_size=head.hidden_size, vocab_size=head.vocab_size, dtype=head.dtype, weight_dtype=head.weight_dtype,
            trained=weight.requires_grad, device=weight.device, weight=weight,
        )  # fmt: skip
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        say(f"tiles of the head: those of the rule, for there was no memory to measure others ({error})")
        return Tuning(Tiles(), facts_of(head, weight.device), ())
    say(tuning.text())
    return tuning


def _kept(path: Path, say: Callable[[str], None]) -> Tuning | None:
    """What an earlier process of the run has chosen, if it can be read."""
    if not path.is_file():
        return None
    try:
        return Tuning.of(path.read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        say(f"warning: {path}: cannot be read ({type(error).__name__}: {error}); the tiles are measured anew")
        return None
