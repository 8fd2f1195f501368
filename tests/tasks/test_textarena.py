"""Games of textarena, which seed and draw from the global generator, as environments."""

from __future__ import annotations

import random

import pytest

from longgrpo.tasks.own_random import Generators, redirected, using
from testing import ROOT, load

pytest.importorskip("textarena", reason="no textarena: pip install textarena")


@pytest.fixture(scope="module")
def example():
    return load(ROOT / "examples/guess_the_number.py")


def play(example, games):
    """The hints of several games whose turns interleave, each with its score at the end. Guesses halve what is left."""
    said = [[] for _ in games]
    playing = {}
    for i, game in enumerate(games):
        generators = Generators(game)
        with using(generators):
            playing[i] = generators, example.Game(seed=game, game=game)
    between = {i: (1, example.MOST) for i in playing}
    while playing:
        for i, (generators, game) in list(playing.items()):
            low, high = between[i]
            guess = (low + high) // 2
            with using(generators):
                said[i].append(game.reply(f"[{guess}]", {}))
            if said[i][-1] is None:
                said[i].append(game.score)
                del playing[i]
            else:
                between[i] = (guess + 1, high) if "higher" in said[i][-1] else (low, guess - 1)
    return said


def hidden(example, game):
    with using(Generators(game)):
        return example.Game(seed=game, game=game).env.state.game_state["game_number"]


def test_games_are_the_same_side_by_side_and_alone(example):
    with redirected():
        before = random.getstate()
        together = play(example, range(12))
        alone = [play(example, [game])[0] for game in range(12)]
        assert random.getstate() == before
    assert together == alone
    assert len({tuple(map(str, hints)) for hints in together}) > 3  # different numbers
    assert all(hints[-1] == 1.0 for hints in together)


def test_a_game_that_is_not_won_ends_after_the_guesses_that_the_prompt_names(example):
    with redirected(), using(Generators(0)):
        game = example.Game(seed=0, game=next(g for g in range(99) if hidden(example, g) > example.GUESSES))
        hints = [game.reply(f"[{guess}]", {}) for guess in range(1, example.GUESSES + 1)]
    assert hints[:-1] == ["The target number is higher."] * (example.GUESSES - 1)
    assert hints[-1] is None
    assert 0 < game.score < 1


def test_rows_that_are_held_out_are_other_games(example):
    train, held_out = ({row["prompt"][-1]["content"] for row in example.rows(split)} for split in ("train", "held out"))
    assert not train & held_out
