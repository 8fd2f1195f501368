"""The tiles of a run's head: chosen before step 1, kept in its directory, reused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from longgrpo._ops.tiles import HeadShape, Tile, Tiles, choose_tiles
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.loss.tuner import Trial, Tuning
from longgrpo.run import tuning
from longgrpo.run.trainer import Trainer
from longgrpo.train.ranks import Ranks

TRIALS = (Trial("whole_rows", 64, 0, 2e-3), Trial("whole_rows", 32, 0, 1e-3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGGRPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def chosen(monkeypatch):
    """What tune_run makes of the head: the tiles of each choice."""
    seen = []

    def choose(head, tiles, device):
        seen.append(tiles)
        choose_tiles(head, tiles, device)

    monkeypatch.setattr(tuning, "choose_tiles", choose)
    yield seen
    choose_tiles(HeadShape(32, 64, torch.float32, torch.float32), Tiles(), torch.device("cpu"))


@pytest.fixture
def measured(monkeypatch):
    """A measurement on the card `measured.card`, which chooses tiles of 32 rows."""
    now = SimpleNamespace(card="A100", calls=[], error=None)
    monkeypatch.setattr(tuning, "card_of", lambda device: now.card)

    def autotune(**options):
        now.calls.append(options)
        if now.error:
            raise RuntimeError(now.error)
        facts = {"card": now.card, "hidden_size": 32, "vocab_size": 64, "dtype": "float32"}
        return Tuning(Tiles(whole_rows=Tile(32)), facts, TRIALS)

    monkeypatch.setattr(tuning, "autotune", autotune)
    return now


@pytest.fixture
def state(monkeypatch):
    weight = torch.zeros(64, 32, requires_grad=True)
    monkeypatch.setattr(tuning, "head_of", lambda model: SimpleNamespace(weight=weight))
    return SimpleNamespace(model=None)


def test_the_choice_is_kept_in_the_runs_directory(tmp_path, state, chosen, measured):
    said = []
    tuning.tune_run(tmp_path, state, True, said.append)
    tuning.tune_run(tmp_path, state, True, said.append)  # resumed
    assert len(measured.calls) == 1
    assert measured.calls[0]["trained"]
    assert chosen == [Tiles(whole_rows=Tile(32))] * 2
    assert said[1] == f"{said[0]}; chosen when the run began"


def test_another_card_is_measured_anew(tmp_path, state, chosen, measured):
    said = []
    tuning.tune_run(tmp_path, state, True, said.append)
    measured.card = "H200"
    tuning.tune_run(tmp_path, state, True, said.append)
    assert len(measured.calls) == 2
    assert "chosen on A100, and this is H200: measured anew" in said[1]
    assert Tuning.of((tmp_path / "tiles.json").read_text()).facts["card"] == "H200"


@pytest.mark.parametrize("wanted", [None, False])
def test_switched_off_it_is_the_rule(tmp_path, state, chosen, measured, wanted):
    """None: on a GPU only. A choice of an earlier run in this process does not stay."""
    choose_tiles(HeadShape(32, 64, torch.float32, torch.float32), Tiles(whole_rows=Tile(16)), torch.device("cpu"))
    tuning.tune_run(tmp_path, state, wanted, print)
    assert measured.calls == []
    assert chosen == [Tiles()]
    assert not (tmp_path / "tiles.json").exists()


def test_rank_0s_choice_is_every_ranks(tmp_path, state, chosen, measured):
    theirs = Tuning(Tiles(whole_rows=Tile(48)), {"card": "A100"}, ())

    class Rank(Ranks):
        def of_first(self, work, what="a value"):
            return theirs

    for rank in (1, 0):
        ranks = Rank()
        ranks.rank = rank
        tuning.tune_run(tmp_path, state, True, print, ranks)
        assert chosen[-1] == theirs.tiles
        assert (tmp_path / "tiles.json").exists() == (rank == 0)
    assert measured.calls == []
    assert Tuning.of((tmp_path / "tiles.json").read_text()) == theirs


def test_no_memory_to_measure_in(tmp_path, state, chosen, measured):
    said = []
    measured.error = "CUDA out of memory. Tried to allocate 2.00 GiB"
    tuning.tune_run(tmp_path, state, True, said.append)
    assert chosen[-1] == Tiles()
    assert "those of the rule" in said[0]
    assert "out of memory" in said[0]
    measured.error = "an illegal memory access"
    (tmp_path / "tiles.json").unlink()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.tune_run(tmp_path, state, True, said.append)


def test_a_run_measures_before_its_first_step_and_not_when_it_is_resumed(tree, tmp_path, capsys):
    tree["task"]["eval_n"] = tree["train"]["probe_prompts"] = 0
    tree["train"]["steps"] = tree["train"]["save_steps"] = 1
    tree["memory"] = {"autotune": True}
    Trainer(build_config(tree), tmp_path / "run").run()
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert any(line.startswith("tiles of the head (") for line in lines), lines
    kept = (tmp_path / "run" / "tiles.json").read_text()
    assert len(Tuning.of(kept).trials) > 1
    assert json.loads(kept)["facts"]["trained"] is False
    Trainer.resume(tmp_path / "run", ["--train.steps", "2"]).run()
    again = capsys.readouterr()
    assert "chosen when the run began" in again.out + again.err
    assert (tmp_path / "run" / "tiles.json").read_text() == kept


def test_a_damaged_choice_is_told_of_and_made_again(tmp_path, state, chosen, measured):
    (tmp_path / "tiles.json").write_text('{"tiles": [')
    said = []
    tuning.tune_run(tmp_path, state, True, said.append)
    assert "tiles.json: cannot be read (JSONDecodeError" in said[0]
    assert len(measured.calls) == 1
    assert Tuning.of((tmp_path / "tiles.json").read_text()).tiles == chosen[-1]


def test_tiles_of_another_in_the_runs_directory_are_refused(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tiles.json").write_text("another's")
    with pytest.raises(ConfigError, match=r"tiles\.json exists, this run has not made it"):
        Trainer(build_config(tree), tmp_path / "run")
    assert (tmp_path / "run" / "tiles.json").read_text() == "another's"
