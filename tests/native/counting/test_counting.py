"""Launches, bytes and waves of the head on CUDA, counted over the real tile loops: a large pass without a GPU."""

from __future__ import annotations

import functools

import pytest
import torch

from longgrpo._ops.library import ops
from testing.compiled import ROOT, build, load

H, V = 4096, 151_936
MIB = 1 << 20
TOKENS = (8192, 163_840)
CHIPS = (132, 114, 108, 128)  # multiprocessors
SHAPES = ((1536, 151_936), (2048, 128_256), (4096, 128_256), (5120, 100_352), (3584, 262_144), (576, 49_152))
PASSES = {
    "scoring": {"hidden": False}, "frozen": {}, "trained": {"weight": True},
    "trained, sequences": {"weight": True, "sequence_level": True},
}  # fmt: skip


@functools.cache
def module():
    return load(build(ROOT / "tests/native/counting", ROOT / "build/native/counting"))


@pytest.fixture(autouse=True)
def chip():
    module().set_chip(132)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("name", "bytes_a_logit", "gemms"),
    [("scoring", 12, 1), ("frozen", 20, 2), ("trained", 45, 4), ("trained, sequences", 45, 4)],
)
def test_memory_traffic(tokens, name, bytes_a_logit, gemms):
    counted = module().loss(tokens, H, V, **PASSES[name])
    assert counted["bytes"] / (tokens * V) <= bytes_a_logit
    assert counted["multiply_adds"] == gemms * tokens * H * V


@pytest.mark.parametrize("tokens", TOKENS)
def test_launches_of_a_trained_head(tokens):
    assert module().loss(tokens, H, V, weight=True)["launches"] <= 400 * tokens / 8192


@pytest.mark.parametrize("multiprocessors", CHIPS)
@pytest.mark.parametrize(("hidden", "vocabulary"), SHAPES)
def test_part_filled_waves(hidden, vocabulary, multiprocessors):
    module().set_chip(multiprocessors)
    bound = 0.2 if hidden < 1024 else 0.1
    assert module().loss(8192, hidden, vocabulary)["part_filled"] <= bound


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("workspace", [32, 256, 1024])
def test_the_workspace_is_a_bound_and_what_the_planner_is_told(name, workspace):
    """Beside it: five numbers a token of the loss itself."""
    tokens, options = 8192, PASSES[name]
    hidden, weight = options.get("hidden", True), options.get("weight", False)
    counted = module().loss(tokens, H, V, workspace=workspace * MIB, **options)["workspace"]
    told = ops.head_workspace(
        tokens, H, V, torch.bfloat16, torch.bfloat16, hidden, weight, False, False, workspace * MIB, 132
    )  # fmt: skip
    assert told <= workspace * MIB
    assert counted <= told + 6 * 4 * tokens
    assert counted >= 0.4 * workspace * MIB


def test_a_large_workspace_takes_a_trained_head_in_one_pass():
    """3 GEMMs over whole rows, where they are faster than 4 in chunks; and whatever the loss, never more than 4."""
    counted = module().loss(1024, 1024, 8192, weight=True, workspace=1 << 30)
    assert counted["multiply_adds"] == 3 * 1024 * 1024 * 8192
    with_entropy = module().loss(8192, H, V, weight=True, entropy_coef=0.01)
    assert with_entropy["multiply_adds"] == 3 * 8192 * H * V


@pytest.fixture
def choose():
    """choose(whole_rows=, chunks=, weight=, passes=, score=): the tiles of the head [V, H]."""

    def to(whole_rows=(0, 0), chunks=(0, 0), weight=(0, 0), passes=0, score=0):
        module().choose(H, V, 1, [*whole_rows, *chunks, *weight, passes, score])

    yield to
    module().choose(H, V, 1, [])


@pytest.mark.parametrize("name", ["scoring", "frozen"])
@pytest.mark.parametrize("tokens", [8192, 5000, 300])
def test_chosen_chunks_serve_scoring_and_the_gradient_at_any_length(choose, name, tokens):
    """GEMMs: one or two for each tile of 1024 rows and 16,384 columns."""
    choose(chunks=(1024, 16_384))
    counted = module().loss(tokens, H, V, **PASSES[name])
    gemms = 1 if name == "scoring" else 2
    assert counted["gemms"] == gemms * -(-tokens // 1024) * -(-V // 16_384)
    assert counted["multiply_adds"] == gemms * tokens * H * V


@pytest.mark.parametrize(("passes", "gemms"), [(1, 3), (2, 4)])
def test_chosen_passes_of_a_trained_head(choose, passes, gemms):
    choose(passes=passes)
    counted = module().loss(8192, H, V, weight=True)
    assert counted["multiply_adds"] == gemms * 8192 * H * V
    counted = module().loss(8192, H, V, weight=True, sequence_level=True)  # c is not known in the row
    assert counted["multiply_adds"] == 4 * 8192 * H * V


def test_a_choice_that_does_not_fit_is_the_rules(choose):
    rule = module().loss(8192, H, V, workspace=64 * MIB)
    choose(chunks=(4096, 16_384))  # 256 MiB of logits
    assert module().loss(8192, H, V, workspace=64 * MIB) == rule
    assert module().loss(8192, H, V, workspace=512 * MIB) != module().loss(8192, H, V, workspace=64 * MIB)


@pytest.mark.parametrize("tokens", [1, 5000, 8192])
def test_the_scoring_kernel_serves_calls_that_stand_alone(choose, tokens):
    """No GEMM: hidden states and head are read, and no logit is written."""
    scoring = PASSES["scoring"]
    in_tiles = module().loss(tokens, H, V, **scoring)
    assert module().loss(tokens, H, V, **scoring, alone=True) == in_tiles
    choose(score=1)
    assert module().loss(tokens, H, V, **scoring) == in_tiles
    by_kernel = module().loss(tokens, H, V, **scoring, alone=True)
    assert by_kernel["gemms"] == 0
    assert by_kernel["bytes"] == by_kernel["launches"] * 2 * H * V + 2 * H * tokens
    assert by_kernel["workspace"] <= 256 * MIB
    with_gradient = module().loss(tokens, H, V, alone=True)
    assert with_gradient == module().loss(tokens, H, V)


@pytest.mark.parametrize(("dtype", "capability"), [(0, 90), (1, 75)])
def test_where_the_scoring_kernel_cannot_serve_it_does_not(choose, dtype, capability):
    """fp32, and a card before its instructions."""
    options = PASSES["scoring"] | {"dtype": dtype}
    module().set_chip(132, capability)
    module().choose(H, V, dtype, [0] * 7 + [1])
    assert module().loss(8192, H, V, **options, alone=True) == module().loss(8192, H, V, **options)
    module().choose(H, V, dtype, [])


def test_a_choice_is_one_heads_own(choose):
    other = module().loss(8192, 2048, V)
    mine = module().loss(8192, H, V)
    choose(chunks=(512, 8192))
    assert module().loss(8192, 2048, V) == other
    assert module().loss(8192, H, V) != mine
    choose()
    assert module().loss(8192, H, V) == mine
