"""The loss beside its peers on the same inputs: time, memory and gradient error. `make bench` runs it.

Programs take turns in rounds within one process, so that noise of the machine meets all of them; a figure is the
median of the ratios within a round, with its quartiles, and a target is met only if the quartile on the wrong side
meets it. The floor is the bare GEMMs on the rows that matter: forward on the tokens of the mask, backward on those
with an advantage. Memory is measured in a fresh process for each figure, beyond the inputs and with the gradients. The
error is that of dL/dhidden (of logp when scoring) on a few rows against float64. A peer that is absent or fails is a
row that says so. Shapes that nobody chose come after the listed ones: drawn with a seed, ours beside the floor, and the
worst at the end.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch
from programs import (
    ALL,
    DTYPES,
    FUSED,
    GROWTH,
    Case,
    Inputs,
    bare_gemms,
    log_softmax,
    loss_of,
    make_inputs,
    padded,
    peers,
    programs,
    run,
)
from torch import Tensor

import memory

SHAPES = ((4, 128, 576, 32768), (8, 512, 576, 49152), (4, 1024, 2048, 128256), (2, 2048, 1536, 151936))  # B, T, H, V
QUICK_SHAPE = (2, 16, 64, 512)
PADDING = 0.375
LARGE_VOCABULARY, FEW_TOKENS = 100_000, 256  # heads that get few tokens unless --full
TOO_SLOW = 12  # times the floor (of 0.1 s at least): such a program would take most of the time of a run
MODES = ("frozen", "trainable", "scoring")


# ---- measuring ----


@dataclass
class Spread:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(low, median(values), high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, the GPU's work included where there is one in use."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def time_in_rounds(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; at least 3 rounds, then until `seconds` are spent."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.monotonic() + seconds
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(1e3 * _seconds(calls[name]))
        if i >= 2 and time.monotonic() > end:
            break
    return times


def exact_rows(x: Inputs, count: int = 8) -> tuple[Tensor, Tensor]:
    """Some rows (indices into the flat tokens) and their result in float64: dL/dhidden, or logp when scoring."""
    moving = x.mask & (x.advantages != 0)[:, None]
    rows = moving.view(-1).nonzero()[:, 0]
    rows = rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]
    hidden = x.hidden.detach().flatten(0, 1)[rows].double().requires_grad_()
    logp = log_softmax(hidden, x.weight.detach().double(), x.ids.view(-1)[rows])
    if x.case.mode == "scoring":
        return rows, logp.detach()
    full = logp.new_zeros(x.mask.numel()).index_put((rows,), logp)
    (gradient,) = torch.autograd.grad(loss_of(x, full.view(x.mask.shape)), hidden)
    return rows, gradient


def relative_error(x: Inputs, result: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    rows, expected = exact
    got = (padded(x, result) if x.case.mode == "scoring" else result).flatten(0, 1)[rows].double()
    return float((got - expected).norm() / expected.norm())


def measure(
    case: Case, rounds: int, seconds: float, with_memory: bool, among: Callable[[Case], dict] = programs
) -> Iterator[dict]:
    """One record a program: the floors first."""
    x, calls, broken, errors = make_inputs(case), {}, {}, {}
    exact = exact_rows(x)
    floors = {f"GEMMs {name}": bare_gemms(x, dtype) for name, dtype in DTYPES.items()}
    for gemms in floors.values():
        gemms()
    floor = _seconds(floors[f"GEMMs {case.dtype}"])
    for name, program in among(case).items():
        try:
            errors[name] = relative_error(x, run(program, x)[0], exact)  # and warm-up
            call = functools.partial(run, program, x)
            if (seconds_once := _seconds(call)) > TOO_SLOW * max(floor, 0.1):
                broken[name] = f"{seconds_once / floor:.0f} times its GEMMs in one call, not timed further"
                continue
            calls[name] = call
        except Exception as error:  # whatever a peer dies of is a row, not the end
            broken[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times = time_in_rounds({**floors, **calls}, rounds, seconds)
    own, faster = f"GEMMs {case.dtype}", min(floors, key=lambda f: median(times[f]))
    del x, calls, floors, exact
    for name in [*times, *broken]:
        record = {"case": asdict(case), "program": name, "failed": broken.get(name)}
        if name not in broken:
            ratio = {key: [t / f for t, f in zip(times[name], times[key], strict=True)] for key in (own, faster)}
            record |= {"ms": times[name], "over_own": ratio[own], "over_faster": ratio[faster], "faster": faster}
            record |= {"error": errors.get(name), "extra_bytes": None}
            if with_memory and name in errors:
                record["extra_bytes"] = fresh_memory_of(case, name)
        yield record


def memory_of(case: Case, name: str) -> int:
    small = make_inputs(Case((2, 8, 64, 256), case.dtype, case.mode, device=case.device))
    run(ALL[name], small)  # imports, thread pools
    x = make_inputs(case)
    return memory.peak_extra(lambda: run(ALL[name], x))


def fresh_memory_of(case: Case, name: str) -> int:
    return int(memory.in_fresh_process(__file__, "--memory-of", json.dumps(asdict(case)), name))


# ---- targets of the loss's issue ----


@dataclass
class Target:
    what: str
    value: Spread
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value.high <= self.limit if self.at_most else self.value.low >= self.limit

    def __str__(self) -> str:
        verdict, sign = "met   " if self.met else "MISSED", "<=" if self.at_most else ">="
        return f"{verdict} {self.what} {sign} {self.limit}: {self.value}"


# (mode, padded, half_zero): (multiple of the floor, times faster than, which peer or the fastest)
TARGETS = {
    ("frozen", True, False): (1.10, 1.5, "fastest"),
    ("frozen", True, True): (1.15, 2.0, "fastest"),
    ("trainable", False, False): (1.10, 1.3, "TRL"),
    ("scoring", False, False): (1.05, None, None),
}


def target_key(case: Case) -> tuple[str, bool, bool]:
    return case.mode, bool(case.padding), case.half_zero


def check_targets(case: Case, records: list[dict]) -> Iterator[Target]:
    if target_key(case) not in TARGETS:
        return
    multiple, speedup, rival = TARGETS[target_key(case)]
    by_name = {r["program"]: r for r in records if not r["failed"]}
    ours = by_name.get("linear_logprob" if case.mode == "scoring" else "linear_grpo_loss")
    if ours is None:
        return
    floors = {ours["faster"]: ours["over_faster"], f"GEMMs {case.dtype}": ours["over_own"]}  # fp32 cannot reach bf16's
    for floor, ratios in floors.items():
        yield Target(f"time / {floor}", Spread.of(ratios), multiple, at_most=True)
    rivals = [name for name in peers(case) if name in by_name]
    if rival == "fastest" and rivals:
        rival = min(rivals, key=lambda name: median(by_name[name]["ms"]))
    if speedup and rival in by_name:
        ratios = [theirs / mine for theirs, mine in zip(by_name[rival]["ms"], ours["ms"], strict=True)]
        yield Target(f"times faster than {rival}", Spread.of(ratios), speedup, at_most=False)


# ---- shapes that nobody chose ----

DRAWN = {"frozen": 1.10, "trainable": 1.2}  # the limit of each, in floors
MOST = 1 << 29  # elements of the head, or of the logits; the products are bounded so that a round takes seconds
MOST_PRODUCTS = 1 << 36


def draw_shape(random: Random) -> tuple[int, int, int, int]:
    """B, T, H, V: each size evenly on a logarithmic scale, H and V of any remainder."""

    def size(low: int, high: int) -> int:
        return round(math.exp(random.uniform(math.log(low), math.log(high))))

    while True:
        batch, rows, hidden, vocabulary = size(1, 16), size(16, 8192), size(256, 4096), size(5000, 262_144)
        length = max(rows // batch, 1)
        products = batch * length * hidden * vocabulary
        if max(hidden, batch * length) * vocabulary <= MOST and products <= MOST_PRODUCTS:
            return batch, length, hidden, vocabulary


def drawn_cases(count: int, args: argparse.Namespace) -> Iterator[Case]:
    random = Random(0)
    for _ in range(count):
        shape, padding, half_zero = draw_shape(random), random.uniform(0, 0.7), random.random() < 0.25
        for mode, dtype in itertools.product(DRAWN, DTYPES):
            if args.dtype in (None, dtype) and args.mode in (None, mode):
                yield Case(shape, dtype, mode, padding, half_zero and shape[0] > 1, args.device)


def measure_drawn(count: int, args: argparse.Namespace) -> Iterator[tuple[Case, list[float]]]:
    """Times of linear_grpo_loss in floors of the case's own dtype."""
    for case in drawn_cases(count, args):
        records = {r["program"]: r for r in measure(case, args.rounds, args.seconds, False, lambda _: FUSED)}
        (name,) = FUSED
        if records[name]["failed"]:
            raise RuntimeError(f"{case}: {records[name]['failed']}")
        yield case, records[name]["over_own"]


def print_worst(measured: list[tuple[Case, list[float]]]) -> None:
    for mode, dtype in itertools.product(DRAWN, DTYPES):
        those = [(Spread.of(ratios), case) for case, ratios in measured if (case.mode, case.dtype) == (mode, dtype)]
        if not those:
            continue
        value, case = max(those, key=lambda one: one[0].median)
        within = sum(spread.median <= DRAWN[mode] for spread, _ in those)
        middle = median(spread.median for spread, _ in those)
        print(
            f"{mode} {dtype}: {within} of {len(those)} within {DRAWN[mode]}, median {middle:.2f}, worst {value} {case}"
        )


# ---- command line ----


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every combination on the first shape and those with a target on the rest; with --full every one on all."""
    for shape, dtype in itertools.product([QUICK_SHAPE] if args.quick else SHAPES, DTYPES):
        if args.shape not in (None, shape) or args.dtype not in (None, dtype):
            continue
        short = (4, FEW_TOKENS // 4, *shape[2:])
        used = short if shape[3] > LARGE_VOCABULARY and args.device == "cpu" and not args.full else shape
        for mode, padding, half_zero in itertools.product(MODES, (False, True), (False, True)):
            case = Case(used, dtype, mode, PADDING * padding, half_zero, args.device)
            known = mode == "scoring" and half_zero  # scoring knows no advantage
            wanted = target_key(case) in TARGETS or (not args.targets and (args.full or shape == SHAPES[0]))
            if args.mode in (None, mode) and wanted and not known:
                yield case


def environment(device: str) -> dict:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    versions = {}
    for name in ("torch", "longgrpo", "trl", "liger-kernel", "unsloth_zoo", "verl", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    root = Path(__file__).parent.parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "machine": platform.platform(), "cpu": cpu, "gpu": gpu, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions,
        "commit": git.stdout.strip() or None,
        "command": sys.argv, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def print_records(case: Case, records: list[dict]) -> None:
    print(f"\n{case}")
    print(f"{'program':28}{'ms':>9}  {'x own GEMMs':>19}  {'x faster GEMMs':>19}{'extra MiB':>11}{'error':>10}")
    for r in records:
        if r["failed"]:
            print(f"{r['program']:28}{r['failed']}"[:120])
            continue
        own, faster = Spread.of(r["over_own"]), Spread.of(r["over_faster"])
        extra = "" if r.get("extra_bytes") is None else f"{r['extra_bytes'] / 2**20:.0f}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        print(f"{r['program']:28}{median(r['ms']):9.1f}  {own!s:>19}  {faster!s:>19}{extra:>11}{error:>10}")


def memory_growth(lengths: list[int], device: str) -> Iterator[dict]:
    """Peak of linear_grpo_loss less the gradient that it returns: flat in the number of tokens."""
    (name,) = GROWTH
    for tokens in lengths:
        case = Case((1, tokens, 64, 4096), "fp32", "frozen", device=device)
        extra = fresh_memory_of(case, name)
        yield {"tokens": tokens, "extra_bytes": extra, "less_dhidden": extra - 4 * tokens * case.shape[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny shape, 2 rounds: does it run")
    parser.add_argument("--full", action="store_true", help="every case on every shape, with all its tokens")
    parser.add_argument("--targets", action="store_true", help="only the cases with a target")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape", type=lambda s: tuple(map(int, s.split(","))), choices=SHAPES, metavar="B,T,H,V",
        help=f"one of {SHAPES}; the large vocabularies are cut to 4 x 64 tokens, --full is without",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--drawn", type=int, default=40, help="so many drawn shapes after the listed ones")
    parser.add_argument("--only-drawn", action="store_true", help="none of the listed shapes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="a case starts no round after this, beyond 3 rounds")
    parser.add_argument("--no-memory", action="store_true", help="skip the fresh processes")
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "PROGRAM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        case = Case(**json.loads(args.memory_of[0]))
        return print(memory_of(case, args.memory_of[1]))

    def save(kind: str, record: dict) -> None:
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"kind": kind, **record}) + "\n")

    about = environment(args.device)
    save("run", about)
    where = (f"{k} {about[k]}" for k in ("gpu", "cpu", "threads", "machine", "commit") if about[k])
    print(", ".join(where), about["versions"], sep="\n")
    verdicts = []
    for case in () if args.only_drawn else cases(args):
        with_memory = not args.no_memory and target_key(case) in TARGETS
        records = list(measure(case, 2 if args.quick else args.rounds, args.seconds, with_memory))
        print_records(case, records)
        for target in check_targets(case, records):
            verdicts.append(f"{target}   {case}")
            save("target", {"case": asdict(case), **asdict(target), "met": target.met})
            print(target)
        for record in records:
            save("result", record)
    if not (args.no_memory or args.only_drawn):
        lengths = [1 << 10, 1 << 12] if args.quick else [1 << 10, 1 << 13, 1 << 16, 1 << 18]
        print("\nlinear_grpo_loss, H = 64, V = 4096, workspace 16 MiB: MiB beyond the inputs and dhidden")
        for record in memory_growth(lengths, args.device):
            print(f"{record['tokens']:8} tokens {record['less_dhidden'] / 2**20:8.1f}")
            save("memory", record)
    print("\nTargets", *verdicts, sep="\n")
    drawn = []
    for case, ratios in measure_drawn(1 if args.quick else args.drawn, args):
        drawn.append((case, ratios))
        save("drawn", {"case": asdict(case), "over_own": ratios})
        print(f"{Spread.of(ratios)!s:>19}  {case}", flush=True)
    print_worst(drawn)


if __name__ == "__main__":
    main()
