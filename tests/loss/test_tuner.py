"""The choice of the head's tiles: on the CPU by its clock, for a GPU on a clock of the test's own."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo import autotune, linear_logprob
from longgrpo._ops.tiles import HeadShape, Tile, Tiles, choose_tiles
from longgrpo.loss import tuner
from longgrpo.memory.internal import CPU, head_workspace
from testing.cases import make_head

H100 = 132
HEAD = HeadShape(4096, 151_936, torch.bfloat16, torch.bfloat16)
SMALL = {"hidden_size": 64, "vocab_size": 512, "dtype": torch.float32, "tokens": 256, "device": "cpu"}
WORKSPACE = 256 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGGRPO_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "tiles.json"
    for dtype in (torch.float32, torch.bfloat16):
        choose_tiles(HeadShape(64, 512, dtype, dtype), Tiles(), torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch):
    """clock({rows: seconds}): what a tile of so many rows takes on the CPU; 10 ms if nothing is said."""
    measured = []

    def set_to(seconds):
        def measure(bench, kind, tiles):
            measured.append(tiles.whole_rows.rows)
            return seconds.get(tiles.whole_rows.rows, 1e-2)

        monkeypatch.setattr(tuner._Bench, "measure_same", measure)
        return measured

    return set_to


def for_gpu(trained, **options):
    return tuner.candidates(
        HEAD, trained=trained, tokens=8192, workspace=options.get("workspace", WORKSPACE), multiprocessors=H100
    )


# ---- the choice ----


@pytest.mark.parametrize("trained", [True, False])
def test_candidates_of_a_gpu(trained):
    tried = for_gpu(trained)
    assert set(tried) == ({"chunks", "weight", "whole_rows"} if trained else {"chunks"})
    for kind, tiles in tried.items():
        assert 1 < len(tiles) <= tuner.MOST[kind]
        assert len({tile.rows for tile in tiles}) == len(tiles)
        assert all(4 * tile.rows * (tile.columns or 151_936) <= WORKSPACE for tile in tiles)


def test_a_workspace_too_small_for_whole_rows():
    assert set(for_gpu(True, workspace=9 << 20)) == {"chunks", "weight"}
    with pytest.raises(ValueError, match="workspace of 262144 bytes is too small"):
        for_gpu(True, workspace=1 << 18)


def test_the_fastest_of_each_kind():
    tried = for_gpu(True)
    best = {kind: tiles[-1] for kind, tiles in tried.items()}
    tiles, trials = tuner.choose(tried, lambda kind, tiles: 0.01 if getattr(tiles, kind) == best[kind] else 0.02)
    assert (tiles.chunks, tiles.weight, tiles.whole_rows) == (best["chunks"], best["weight"], best["whole_rows"])
    assert tiles.passes == 1  # 10 ms, where the two passes take 20
    assert [trial.kind for trial in trials] == [kind for kind, tiles in tried.items() for _ in tiles]


@pytest.mark.parametrize(("whole_rows", "passes"), [(0.0405, 0), (0.0395, 0), (0.05, 2), (0.03, 1)])
def test_passes_of_a_trained_head(whole_rows, passes):
    """Chunks and the weight's gradient take 20 ms each."""
    tiles, _ = tuner.choose(for_gpu(True), lambda kind, _: whole_rows if kind == "whole_rows" else 0.02)
    assert tiles == Tiles(passes=passes)


@pytest.mark.parametrize(("by_kernel", "taken"), [(0.018, True), (0.0199, False), (0.03, False)])
def test_the_scoring_kernel_is_one_more_candidate(by_kernel, taken):
    """Scoring in tiles takes 20 ms."""
    tried = for_gpu(False)
    best = tried["chunks"][-1]

    def measure(kind, tiles):
        if kind in tuner.SCORING:
            assert tiles.chunks == best
            return by_kernel if tiles.score else 0.02
        return 0.01 if tiles.chunks == best else 0.02

    tiles, trials = tuner.choose(tried, measure, kernel=True)
    assert tiles == Tiles(chunks=best, score=taken)
    tuning = tuner.Tuning(tiles, tuner.facts_of(HEAD, torch.device("cpu")), tuple(trials))
    assert ("scoring by its kernel (1.11 times as fast as in tiles)" in tuning.text()) == taken
    assert "scoring in tiles" in tuning.table()
    assert tuner.Tuning.of(tuning.json()) == tuning


def test_what_is_not_clearly_faster_is_not_taken():
    tried = for_gpu(False)
    times = iter([1e-3, *(1e-3 * (1 - tuner.MARGIN / 2) for _ in range(20))])
    assert tuner.choose(tried, lambda *_: next(times))[0] == Tiles()


def test_a_slow_device_tries_less():
    trials = tuner.choose(for_gpu(True), lambda *_: 10.0)[1]
    assert [trial.kind for trial in trials] == ["chunks", "weight", "whole_rows"]  # the rule's of each


def test_other_bits_do_not_compete():
    tried = {"whole_rows": [Tile(256), Tile(128), Tile(64)]}
    seconds = {256: 1e-2, 128: None, 64: 5e-3}
    tiles, trials = tuner.choose(tried, lambda _, tiles: seconds[tiles.whole_rows.rows])
    assert tiles.whole_rows == Tile(64)
    assert trials[1].seconds is None


# ---- on the CPU ----


def test_the_choice_is_used(clock):
    """By the memory that the allocator gives a call: a quarter of the rule's tile."""
    clock({64: 1e-3})
    tuning = autotune(**SMALL)
    assert tuning.tiles.whole_rows == Tile(64)
    assert "64 x all (10.00 times as fast as the rule's)" in tuning.text()
    head = make_head(0, 256, 64, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_logprob(head.hidden, head.weight, head.target)
    largest = max(
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )  # fmt: skip
    whole = head_workspace(CPU, 256, 64, 512, torch.float32, hidden_gradient=False, weight_gradient=False,
                           workspace=WORKSPACE)  # fmt: skip
    assert whole / 5 < largest < whole / 3


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_their_bits(dtype, trained):
    """Whatever the real clock chooses, for the same input and another."""
    head = make_head(3, 256, 64, 512, dtype)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_(trained)

    def results():
        logp = linear_logprob(hidden, weight, head.target).logp
        leaves = [hidden, weight] if trained else [hidden]
        return [logp, *torch.autograd.grad(logp.square().sum(), leaves)]

    before = results()
    tuning = autotune(**{**SMALL, "dtype": dtype, "trained": trained})
    assert len(tuning.trials) > 1
    assert all(torch.equal(a, b) for a, b in zip(results(), before, strict=True))


def test_a_choice_is_kept(clock, cache):
    measured = clock({128: 5e-3})
    first = autotune(**SMALL)
    count = len(measured)
    assert autotune(**SMALL) == first
    assert len(measured) == count
    autotune(**{**SMALL, "tokens": 128})  # another case
    assert len(measured) > count
    assert len(json.loads(cache.read_text())) == 2
    count = len(measured)
    autotune(**SMALL, cached=False)
    assert len(measured) > count


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "b"}', '{"a": {"tiles": []}}'])
def test_a_broken_cache_is_measured_anew(clock, cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    measured = clock({})
    autotune(**SMALL)
    assert measured
    assert len(json.loads(cache.read_text())) == 1


def test_the_runs_generators_are_not_touched(clock):
    clock({})
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    autotune(**SMALL)
    assert torch.equal(torch.rand(3), want)


def test_a_failed_measurement_leaves_the_rule(monkeypatch):
    def fail(bench, kind, tiles):
        choose_tiles(bench.head, tiles._replace(whole_rows=Tile(16)), bench.device)
        raise RuntimeError("out of memory")

    chosen = []
    monkeypatch.setattr(tuner._Bench, "measure_same", fail)
    monkeypatch.setattr(tuner, "choose_tiles", lambda head, tiles, device: chosen.append(tiles))
    with pytest.raises(RuntimeError, match="out of memory"):
        autotune(**SMALL)
    assert chosen == [Tiles()]


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(whole_rows=Tile(3)), "at least 16 rows, got 3"),
        (Tiles(passes=3), "1 or 2 passes, got 3"),
    ],
)
def test_a_choice_that_is_none(tiles, message):
    with pytest.raises(ValueError, match=message):
        choose_tiles(HEAD, tiles, torch.device("cpu"))
