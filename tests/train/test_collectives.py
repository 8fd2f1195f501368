"""The ranks' collectives, and what is decided from what all of them have."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longgrpo.cli import main
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.memory.ranks import Layout
from longgrpo.model.masters import MasterWeights, balanced
from longgrpo.rollout import Completion
from longgrpo.run.launch import without_ranks
from longgrpo.run.shards import Shards
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.metrics import over_ranks
from longgrpo.train.ranks import ALONE, RankError, Ranks, join, leave, merged
from longgrpo.train.shards import owners_of, share_parameters, sum_gradients
from longgrpo.train.update import batches_of
from testing.commands import write_config
from testing.ranks import run_ranks

CPU = torch.device("cpu")


class Rank(Ranks):
    """One of several, for what needs no collective."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world


def test_one_rank_is_given_what_it_gives():
    tensor = torch.ones(3)
    assert ALONE.gather(tensor) == [tensor]
    assert ALONE.broadcast(tensor) is tensor
    assert ALONE.of_first(lambda: tensor) is tensor
    ALONE.sum(tensor)
    assert tensor.tolist() == [1, 1, 1]
    assert ALONE.mine([1, 2]) == [1, 2]
    assert not torch.distributed.is_initialized()


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert join(1.0) is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(1.0) is ALONE
    leave()
    assert not torch.distributed.is_initialized()


@given(st.lists(st.integers()), st.integers(1, 9))
def test_the_parts_of_all_ranks_make_the_whole(everything, world):
    assert merged([Rank(rank, world).mine(everything) for rank in range(world)]) == everything


@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 9))
def test_no_part_is_heavier_than_its_share_and_the_largest_size(sizes, parts):
    """Greedy: the last size that a part takes comes when it has the least."""
    found = balanced(sizes, parts)
    loads = [sum(size for size, part in zip(sizes, found, strict=True) if part == one) for one in range(parts)]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / parts + max(sizes, default=0)


@pytest.fixture(params=[4096, 1])
def config(request, tree):
    return build_config(tree | {"train": tree["train"] | {"token_budget": request.param}})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), world=st.integers(1, 5), data=st.data())
def test_each_sample_is_trained_by_one_rank(config, lengths, world, data):
    """With a budget that many samples fit, and with one that none does."""
    samples = [
        Sample(group, [1], Completion([0] * length, [0.0] * length, "stop"), "")
        for group, length in enumerate(lengths)
        for _ in range(3)
    ]
    rollout = Rollout.of([], samples, torch.zeros(0, 1, len(samples)))
    active = sorted(data.draw(st.sets(st.sampled_from(range(len(samples))))))
    one_rank = batches_of(config, rollout, active, CPU)
    shares = [batches_of(config, rollout, active, CPU, Rank(rank, world)) for rank in range(world)]
    places = {id(sample): i for i, sample in enumerate(samples)}
    found = [[places[id(sample)] for sample in batch.samples] for share in shares for batch in share]
    assert sorted(i for part in found for i in part) == active
    if len(one_rank) >= world:
        assert sorted(found) == [[places[id(sample)] for sample in batch.samples] for batch in one_rank]
        assert all(shares)


def test_a_phase_lasts_as_long_as_on_the_slowest_rank():
    found = over_ranks(
        [{"seconds/a": 1.0, "offload/bytes_in": 2}, {"seconds/a": 3.0, "offload/bytes_in": 5}], [0.5, 2.0]
    )
    assert found == {
        "seconds/a": 3.0, "offload/bytes_in": 7, "seconds/collectives": 0.5, "seconds/rank_skew": 1.5,
    }  # fmt: skip
    assert over_ranks([{"seconds/a": 1.0}], [0.0]) == {"seconds/a": 1.0}


@pytest.mark.parametrize("text", ["0", "2x0", "x", "2x", "-1", "8x8x8", "two"])
def test_a_layout_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--ranks"):
        Layout.of(text)


def test_layouts():
    assert (Layout.of("8"), Layout.of("2x8").ranks) == (Layout(1, 8), 16)


# ---- on three ranks


def collectives():
    ranks = join(20.0)
    rank = ranks.rank
    assert ranks.world == 3
    assert ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ranks.broadcast(f"of {rank}") == "of 0"
    tensor = torch.full((2, 2), float(rank + 1))
    ranks.sum(tensor)
    assert tensor.tolist() == [[6, 6], [6, 6]]
    shared = torch.full((2,), rank)
    ranks.share(shared, 2)
    assert shared.tolist() == [2, 2]
    sent = torch.full((2,), rank)
    ranks.send(sent, 2, 0)
    assert sent.tolist() == ([2, 2] if rank == 0 else [rank, rank])
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ranks.gather(lambda: None)  # on all of them, before they meet
    assert ranks.gather(rank) == [0, 1, 2]
    # An error of one reaches the others wherever they are, once; then all go on.
    if rank == 1:
        error = ValueError("mine")
        ranks.agree(error)
        ranks.agree(error)
    else:
        with pytest.raises(RankError, match="rank 1: ValueError: mine"):
            ranks.sum(tensor) if rank == 0 else ranks.gather(0)
    # Ranks at different places do not exchange garbage.
    with pytest.raises(RankError, match="come apart"):
        ranks.gather(rank, "one" if rank else "another")
    assert ranks.gather(rank) == [0, 1, 2]
    leave()


def gradients(dtype):
    """Sums for owners, and for all, against the sum of what each rank has; a parameter that no rank, and one that not
    every rank has a gradient of."""
    ranks = join(20.0)
    torch.manual_seed(0)
    shapes = {"a": (7, 3), "b": (50,), "c": (2, 2), "unused": (4,), "d": (11, 5)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    given = [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(ranks.world)]
    for owners in ({}, owners_of(parameters, ranks.world)):
        owned = {name for name in shapes if owners.get(name, ranks.rank) == ranks.rank} if owners else None
        fresh = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        masters = MasterWeights(fresh, owned)
        names = [name for name in shapes if name != "unused" and not (name == "c" and ranks.rank)]
        sum((fresh[name] * given[ranks.rank][name]).sum().float() for name in names).backward()
        norm = sum_gradients(masters, fresh, owners, ranks)
        expected = {name: sum(own[name].float() for own in given) for name in ("a", "b", "d")}
        expected["c"] = given[0]["c"].float()
        for name, holder in masters.holders.items():
            if name == "unused" or (owned is not None and name not in owned):
                assert holder.grad is None
            else:
                torch.testing.assert_close(holder.grad, expected[name], rtol=1e-6, atol=1e-6)
        whole = torch.stack([g.norm() for g in expected.values()]).norm()
        torch.testing.assert_close(norm, whole, rtol=1e-6, atol=0)
        with torch.no_grad():
            for name in masters.parameters:
                masters.parameters[name].fill_(ranks.rank)
        masters.publish()
        share_parameters(fresh, owners, ranks)
        if owners:
            assert {name: p.unique().tolist() for name, p in fresh.items()} == {n: [r] for n, r in owners.items()}
    leave()


def another_weight():
    ranks = join(20.0)
    shards, weight = Shards(ranks), torch.ones(5, dtype=torch.bfloat16)
    shards.check_alike({"w": weight})
    if ranks.rank == 2:
        weight[3] = 1.0078125  # the next bfloat16
    with pytest.raises(Exception, match=r"rank 2 has other weights than rank 0 .* first w"):
        shards.check_alike({"v": torch.zeros(2), "w": weight})
    leave()


def in_turn(folder):
    ranks = join(20.0)
    file = folder / "made"

    def work():
        if not file.exists():
            file.write_text(str(os.environ["RANK"]))
        return file.read_text()

    assert ranks.in_turn(work) == "0"
    leave()


@pytest.mark.parametrize(
    ("target", "arguments"),
    [(collectives, []), (gradients, [torch.float32]), (gradients, [torch.bfloat16]), (another_weight, [])],
)
def test_on_three_ranks(target, arguments, tmp_path):
    ended = run_ranks(3, tmp_path, target, *arguments)
    assert [one.status for one in ended] == [0, 0, 0], "\n".join(one.said for one in ended)


def test_the_first_of_a_machine_works_first(tmp_path):
    ended = run_ranks(3, tmp_path, in_turn, tmp_path)
    assert [one.status for one in ended] == [0, 0, 0], "\n".join(one.said for one in ended)


def test_a_group_of_somebody_else_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="has a process group already"):
        join(1.0)


def test_a_process_that_is_said_to_be_a_rank_has_to_be_told_where_the_others_are(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="cannot meet the others"):
        join(1.0)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--ranks", "0"], {}, "--ranks 0: must be at least 1"),
        (["--ranks", "2"], {"RANK": "0"}, "this process is a rank of one already"),
        (["--ranks", "2", "--train.stepz", "3"], {}, "steps"),  # before anything is started
    ],
)
def test_a_command_that_cannot_start_ranks(arguments, environment, message, tree, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.run.run", lambda _: pytest.fail("started"))
    assert main(["train", str(write_config(tree, tmp_path / "config.yaml")), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_rank_has_the_command_line_of_the_whole():
    assert without_ranks(["train", "a.yaml", "--ranks", "2", "--train.steps", "5"]) == [
        "train",
        "a.yaml",
        "--train.steps",
        "5",
    ]
    assert without_ranks(["train", "--ranks=2", "a.yaml"]) == ["train", "a.yaml"]
