"""Tiles of the head that were measured on the device at hand, in place of the rule's (csrc/cuda/plan.h)."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longgrpo._ops.library import ops
from longgrpo._ops.tiles import HeadShape, Tile, Tiles, candidate_tiles, choose_tiles
from longgrpo.cache import cache_directory
from longgrpo.loss.linear import DEFAULT_WORKSPACE

log = logging.getLogger(__name__)

MARGIN = 0.02  # what a candidate must gain on the rule's choice: less is noise
BUDGET = {"cuda": 3.0, "cpu": 20.0}  # seconds of measurement; after that the best so far is taken
MOST = {"chunks": 8, "weight": 6, "whole_rows": 6}  # candidates of each kind
NAMES = {"chunks": "chunks", "weight": "the weight's gradient", "whole_rows": "whole rows"}
SCORING = ("scoring in tiles", "scoring by its kernel")  # kinds that are timed, of calls that stand alone
_REPEATS = 3
_TOKENS = {"cuda": 8192, "cpu": 1024}

# kind, tiles -> seconds, or None if their results may not be used
Measure = Callable[[str, Tiles], float | None]


class Trial(NamedTuple):
    """One candidate. seconds is None if its bits differ from the rule's."""

    kind: str
    rows: int
    columns: int
    seconds: float | None


@dataclass(frozen=True)
class Tuning:
    """What was chosen, on what, and what was timed for it; the rule's own tiles come first in each kind."""

    tiles: Tiles
    facts: dict[str, Any]
    trials: tuple[Trial, ...]

    def gain(self, kind: str) -> float:
        """The time of the rule's tile of a kind over that of what is chosen."""
        times = {trial[:3]: trial.seconds for trial in self.trials if trial.seconds}
        first = next(time for (name, *_), time in times.items() if name == kind)
        return first / times.get((kind, *getattr(self.tiles, kind)), first)

    def scoring_gain(self) -> float:
        """The time of scoring in tiles over that of its kernel."""
        tiles, kernel = (next(t.seconds or 0.0 for t in self.trials if t.kind == kind) for kind in SCORING)
        return tiles / kernel

    def text(self) -> str:
        """A line of what was chosen, and by how much it is faster."""
        head = "{hidden_size} x {vocab_size} {dtype}, {card}".format(**self.facts)
        chosen = [
            f"{NAMES[kind]} {tile.rows} x {tile.columns or 'all'} ({self.gain(kind):.2f} times as fast as the rule's)"
            for kind in NAMES
            if (tile := getattr(self.tiles, kind)).rows
        ]
        also = ([], ["one pass"], ["two passes"])[self.tiles.passes]
        if self.tiles.score:
            also = [*also, f"{SCORING[1]} ({self.scoring_gain():.2f} times as fast as in tiles)"]
        return f"tiles of the head ({head}): {', '.join((chosen or ['those of the rule']) + also)}"

    def table(self) -> str:
        """A line for each candidate."""
        lines = [f"{'':22}{'rows':>7}{'columns':>9}{'ms':>10}"]
        for trial in self.trials:
            ms = "other bits" if trial.seconds is None else f"{1e3 * trial.seconds:.2f}"
            lines.append(f"{NAMES.get(trial.kind, trial.kind):22}{trial.rows:7}{trial.columns or 'all':>9}{ms:>10}")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(asdict(self) | {"tiles": self.tiles, "trials": self.trials}, indent=1) + "\n"

    @classmethod
    def of(cls, text: str) -> Tuning:
        """The inverse of json(). Raises ValueError, TypeError or KeyError for another text."""
        tree = json.loads(text)
        whole_rows, chunks, weight, passes, score = tree["tiles"]
        return cls(
            Tiles(Tile(*whole_rows), Tile(*chunks), Tile(*weight), int(passes), bool(score)),
            dict(tree["facts"]),
            tuple(Trial(*trial) for trial in tree["trials"]),
        )


def autotune(
    *,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    trained: bool = False,
    tokens: int | None = None,
    workspace: int = DEFAULT_WORKSPACE,
    device: torch.device | str | None = None,
    weight: Tensor | None = None,
    any_bits: bool = False,
    cached: bool = True,
) -> Tuning:
    """Times the head's tiles on this device, in a few seconds, and uses the fastest in this process from now on.

    Scoring and the gradient share one choice, so that the ratio of a policy to itself stays 1. The choice is kept in
    `tiles.json` of the cache (LONGGRPO_CACHE, default ~/.cache/longgrpo) by card, driver, shape, dtypes and versions.
    Call it before the first step, never inside one.

    Args:
        hidden_size, vocab_size: H and V of the head.
        dtype, weight_dtype: of the hidden states and of the head (default: the same).
        trained: whether the head's weight gets a gradient.
        tokens: of the calls that are timed; default 8192 on a GPU and 1024 on the CPU.
        workspace: bytes that the logits may use, as linear_logprob's.
        device: default the current GPU, or the CPU if there is none.
        weight: [V, H], a head to measure with in place of a random one.
        any_bits: on the CPU, whether a candidate may compete whose results differ from the rule's in the last bits.
            On a GPU every candidate competes.
        cached: whether a choice that was kept is taken, and this one is kept.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    head = HeadShape(hidden_size, vocab_size, dtype, weight_dtype or dtype)
    length = tokens or _TOKENS.get(where.type, _TOKENS["cpu"])
    facts = facts_of(head, where, trained=trained, tokens=length, workspace=workspace, any_bits=any_bits)
    tuning = _kept().get(_key(facts)) if cached else None
    if tuning is None:
        bench = _Bench(head, where, trained=trained, tokens=length, workspace=workspace, weight=weight)
        processors = torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 0
        tried = candidates(head, trained=trained, tokens=length, workspace=workspace, multiprocessors=processors)
        try:
            measure = bench.measure if where.type == "cuda" or any_bits else bench.measure_same
            tiles, trials = choose(tried, measure, BUDGET.get(where.type, BUDGET["cpu"]), _has_kernel(head, where))
        finally:
            choose_tiles(head, Tiles(), where)
        tuning = Tuning(tiles, facts, tuple(trials))
        if cached:
            _keep(tuning)
    choose_tiles(head, tuning.tiles, where)
    return tuning


def facts_of(head: HeadShape, device: torch.device, **options: Any) -> dict[str, Any]:
    """What a choice depends on."""
    from longgrpo import __version__

    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "") if device.type == "cuda" else str
    return {
        "card": card_of(device),
        "driver": driver(),
        "hidden_size": head.hidden_size,
        "vocab_size": head.vocab_size,
        "dtype": str(head.dtype).removeprefix("torch."),
        "weight_dtype": str(head.weight_dtype).removeprefix("torch."),
        **options,
        "versions": f"longgrpo {__version__}, torch {torch.__version__}",
    }


def card_of(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


# ---- the choice ----


def candidates(
    head: HeadShape, *, trained: bool, tokens: int, workspace: int, multiprocessors: int
) -> dict[str, list[Tile]]:
    """What may be chosen, by kind, the rule's own first. On the CPU there are whole rows only."""
    on_gpu = ["chunks", "weight", "whole_rows"] if trained else ["chunks"]
    kinds = on_gpu if multiprocessors > 0 else ["whole_rows"]
    found = {}
    for kind in kinds:
        try:
            found[kind] = candidate_tiles(
                head, kind, tokens=tokens, trained=trained, most=MOST[kind], workspace=workspace,
                multiprocessors=multiprocessors,
            )  # fmt: skip
        except ValueError:  # the workspace is too small for whole rows
            if kind != "whole_rows" or multiprocessors == 0:
                raise
    return found


def _has_kernel(head: HeadShape, device: torch.device) -> bool:
    """Whether csrc/cuda/score.cu can score this head here."""
    half = head.dtype == head.weight_dtype and head.dtype != torch.float32
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def choose(
    tried: Mapping[str, list[Tile]], measure: Measure, budget: float = BUDGET["cuda"], kernel: bool = False
) -> tuple[Tiles, list[Trial]]:
    """The fastest tile of each kind, the passes of a trained head, and whether the scoring kernel, if there is one,
    serves calls that stand alone. The rule's own tiles stay (as 0) unless another gains MARGIN on them."""
    trials: list[Trial] = []
    tiles, fastest = Tiles(), {}
    spent = 0.0
    for kind, options in tried.items():
        best: float | None = None
        for tile in options:
            if best is not None and spent > budget:
                break
            seconds = measure(kind, tiles.but(kind, tile))
            trials.append(Trial(kind, *tile, seconds))
            if seconds is None:
                continue
            spent += (_REPEATS + 1) * seconds
            if best is None:
                best = fastest[kind] = seconds
            elif seconds < min((1 - MARGIN) * best, fastest[kind]):
                fastest[kind] = seconds
                tiles = tiles.but(kind, tile)
    if "weight" in fastest:
        two, one = fastest["chunks"] + fastest["weight"], fastest.get("whole_rows")
        if one is None or abs(one - two) >= MARGIN * two:
            tiles = tiles._replace(passes=2 if one is None or two < one else 1)
    if kernel:
        for score, kind in enumerate(SCORING):
            trials.append(Trial(kind, *tiles.chunks, measure(kind, tiles._replace(score=bool(score)))))
        in_tiles, by_kernel = (trial.seconds or 0.0 for trial in trials[-2:])
        tiles = tiles._replace(score=by_kernel < (1 - MARGIN) * in_tiles)
    return tiles, trials


class _Bench:
    """The head's ops on one input, timed."""

    def __init__(
        self,
        head: HeadShape,
        device: torch.device,
        *,
        trained: bool,
        tokens: int,
        workspace: int,
        weight: Tensor | None = None,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)  # the run's own generators are not touched
        options: dict[str, Any] = {"device": device, "generator": generator}
        h, v = head.hidden_size, head.vocab_size
        if weight is None:
            weight = (torch.randn(v, h, dtype=torch.float32, **options) * (3 / h**0.5)).to(head.weight_dtype)
        hidden = torch.randn(tokens, h, dtype=torch.float32, **options).to(head.dtype)
        target = torch.randint(v, (tokens,), **options)
        self.head, self.device, self.trained, self.workspace = head, device, trained, workspace
        self.arguments = (hidden, weight.detach(), target, None, None, 1.0, 0.0, 1.0)
        self.c = torch.full((tokens,), 1 / tokens, device=device)
        self.expected: list[Tensor] = []

    @torch.no_grad()
    def run(self, kind: str) -> tuple[Tensor, ...]:
        """The op whose time a kind of tile decides."""
        on_gpu = self.device.type == "cuda"
        if kind in SCORING:
            scored: tuple[Tensor, ...] = ops.linear_logprob(*self.arguments, False, False, self.workspace, False, True)
            return scored
        if kind == "chunks" or not (on_gpu or self.trained):
            made: tuple[Tensor, ...] = ops.linear_logprob(*self.arguments, False, True, self.workspace, False)
            return made
        by_itself = self._scored if kind == "weight" else (None, None)
        made = ops.linear_logprob_backward(
            *self.arguments, self.c, None, kind != "weight", True, False, self.workspace, *by_itself
        )  # fmt: skip
        return made

    @property
    def _scored(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_logp"):
            logp, _, _, normalizer = ops.linear_logprob(*self.arguments, False, False, self.workspace, True)
            self._logp = logp, normalizer
        return self._logp

    def measure(self, kind: str, tiles: Tiles) -> float:
        choose_tiles(self.head, tiles, self.device)
        self.run(kind)  # loads kernels, and fills the allocator's cache
        return statistics.median(self._seconds(kind) for _ in range(_REPEATS))

    def measure_same(self, kind: str, tiles: Tiles) -> float | None:
        """None if the results are not those of the first tiles, bit for bit."""
        choose_tiles(self.head, tiles, self.device)
        results = [result.clone() for result in self.run(kind)]
        self.expected = self.expected or results
        if not all(torch.equal(a, b) for a, b in zip(results, self.expected, strict=True)):
            return None
        return statistics.median(self._seconds(kind) for _ in range(_REPEATS))

    def _seconds(self, kind: str) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.run(kind)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.run(kind)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


# ---- kept ----


def _key(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)


def _kept() -> dict[str, Tuning]:
    """Every choice in the cache; a file that is not one of ours holds none."""
    try:
        texts = json.loads((cache_directory() / "tiles.json").read_text())
        return {key: Tuning.of(text) for key, text in texts.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _keep(tuning: Tuning) -> None:
    texts = {key: known.json() for key, known in (_kept() | {_key(tuning.facts): tuning}).items()}
    path = cache_directory() / "tiles.json"
    partial = path.with_name(f"tiles.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(texts, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        log.warning("the choice of tiles is not kept: %s", error)
