"""Games of textarena, which seed and draw from the global generator, as environments."""

from __future__ import annotations

import random

import pytest

from longgrpo.tasks.own_random import Generators, redirected, using
from testing import ROOT, load

pytest.importorskip("textarena", reason="no textarena: pip install textarena")
GUESSES = ["[3]", "[1]", "[8]", "[5]", "[2]", "[7]", "[4]", "[6]"]


@pytest.fixture(scope="module")
def example():
    return load(ROOT / "examples/guess_the_number.py")


def play(example, games):
    """The hints of several games whose turns interleave."""
    said = [[] for _ in games]
    playing = {}
    for i, game in enumerate(games):
        generators = Generators(game)
        with using(generators):
            playing[i] = generators, example.Game(seed=game, game=game, most=8)
    for guess in GUESSES:
        for i, (generators, game) in list(playing.items()):
            with using(generators):
                said[i].append(game.reply(guess, {}))
            if said[i][-1] is None:
                said[i].append(game.score)
                del playing[i]
    assert not playing
    return said


def test_games_are_the_same_side_by_side_and_alone(example):
    with redirected():
        before = random.getstate()
        together = play(example, range(12))
        alone = [play(example, [game])[0] for game in range(12)]
        assert random.getstate() == before
    assert together == alone
    assert len({tuple(map(str, hints)) for hints in together}) > 3  # different numbers
    assert all(hints[-1] == 1.0 for hints in together)


def test_rows_that_are_held_out_are_other_games(example):
    train, held_out = (
        {row["prompt"][0]["content"] for row in example.rows(split, 20)} for split in ("train", "held out")
    )
    assert not train & held_out
