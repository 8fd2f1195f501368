"""The KL term's estimators against each other, in training: `make experiment`, which goes on where it was stopped.

Each run is `longgrpo train examples/diseased.yaml` with one estimator, one beta and one seed. What is kept of
it (curves, held-out accuracy) goes to docs/experiments/kl.json; a run that stands there is not made again. Then the
distance of each estimator's expected gradient from the divergence's own is worked out, over the whole vocabulary, on
what a trained policy samples, and the tables and curves of docs/experiments/kl.md are drawn anew.

    python bench/kl_experiment.py [--seeds 0 1 2] [--betas 0.04 1.0] [--steps 20] [--jobs 2] [--only-draw]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any

import torch
from curves import Curves, curves_of, draw, solved_in, splice
from torch import Tensor

from longgrpo.loss.reference import kl_estimate, log_softmax_rows
from longgrpo.model.head import head_of
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.evaluation import paired_interval
from longgrpo.tasks.sample import Rollout
from longgrpo.train.losses import hidden_states
from longgrpo.train.update import batches_of

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "diseased.yaml"
PAGE = ROOT / "docs" / "experiments" / "kl.md"
REFERENCE = "k3 (reference)"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"kl": "k3"},
    "k3, no detach": {"kl": "k3", "detach": False},
    "article_reverse": {"kl": "article_reverse"},
    "article_forward": {"kl": "article_forward"},
    "k2": {"kl": "k2"},
    "forward_unbiased": {"kl": "forward_unbiased"},
}
CURVES = {
    "reward/mean": "reward",
    "reverse_kl": "reverse KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
}
EXPECTED = ("k1", "k2", "k3", "article_reverse", "forward", "article_forward", "forward_unbiased")
UNTRAINED = "eval_before.json"  # of every run the same
LAST = 5  # steps of a curve whose mean stands in the table


# ---- training
def train_all(wanted: Sequence[tuple[int, float, str]], jobs: int, runs: Path, steps: int) -> Iterator[dict[str, Any]]:
    """What is kept of each (seed, beta, variant), as it ends: `jobs` at once, each on cores of its own."""
    cores: SimpleQueue[list[int]] = SimpleQueue()
    here = sorted(os.sched_getaffinity(0))
    for i in range(min(jobs, len(here))):
        cores.put(here[i::jobs])

    def run(seed: int, beta: float, variant: str) -> dict[str, Any]:
        mine = cores.get()
        try:
            return train(directory_of(runs, variant, beta, seed, steps), variant, beta, seed, steps, mine)
        finally:
            cores.put(mine)

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, *one) for one in wanted]):
            yield future.result()


def directory_of(runs: Path, variant: str, beta: float, seed: int, steps: int) -> Path:
    slug = "".join(c for c in variant.replace(" ", "-") if c not in "(),")
    return runs / f"{slug}-{beta:g}-{seed}-{steps}"


def train(directory: Path, variant: str, beta: float, seed: int, steps: int, cores: Sequence[int]) -> dict[str, Any]:
    """One run, from its last checkpoint where there is one; returns what is kept of it."""
    if not (directory / "summary.json").exists():
        options = {f"loss.{name}": value for name, value in VARIANTS[variant].items()}
        options |= {
            "loss.beta": beta, "train.seed": seed, "train.steps": steps, "train.save_steps": 10,
            "train.token_budget": 2048, "train.probe_prompts": 0, "task.eval_prefill": "null", "output_dir": directory,
        }  # fmt: skip
        command = ["train", EXAMPLE, *(f"--{name}={value}" for name, value in options.items())]
        if (directory / "config.yaml").exists():
            command = ["train", "--resume", directory]
        elif not directory.exists() and (known := next(directory.parent.glob(f"*/{UNTRAINED}"), None)):
            directory.mkdir()
            shutil.copy(known, directory)  # a run takes it from there
        pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", "longgrpo.cli"]
        subprocess.run([*pinned, *map(str, command)], check=True)
    return {"variant": variant, "beta": beta, "seed": seed, "steps": steps, **kept(directory)}


def reference_run(runs: Path, beta: float, seeds: Sequence[int], steps: int) -> Path:
    """The directory of a trained k3 run: records outlive it, so that one may have to be trained anew."""
    directories = [directory_of(runs, REFERENCE, beta, seed, steps) for seed in seeds]
    for directory in directories:
        if (directory / "summary.json").exists():
            return directory
    train(directories[0], REFERENCE, beta, seeds[0], steps, sorted(os.sched_getaffinity(0)))
    return directories[0]


def kept(directory: Path) -> dict[str, Any]:
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "versions": summary["versions"],
        "seconds": round(summary["seconds"]),
        "solved": {when: solved_in(directory, when) for when in ("before", "after")},
        "curves": curves_of(directory, list(CURVES)),
    }


# ---- the expected gradient
@torch.no_grad()
def logprobs(model: Any, batch: Any, temperature: float) -> Tensor:
    """[M, V] f64: of every token at every position of the loss."""
    hidden, head = hidden_states(model, batch), head_of(model)
    return log_softmax_rows(hidden.double(), head.weight.double(), temperature=temperature, **head.options)


def expected_gradient(slope: Tensor, logp: Tensor) -> Tensor:
    """[M, V]: the policy-gradient estimate sum_x p(x) slope(x) d logp(x) / d logits, summed over all x."""
    weighted = logp.exp() * slope
    return weighted - logp.exp() * weighted.sum(-1, keepdim=True)


def divergence_gradients(logp: Tensor, ref: Tensor) -> list[Tensor]:
    """[M, V] each: of KL(policy || ref) and of KL(ref || policy) by the policy's logits, by autograd."""
    x = logp.clone().requires_grad_()
    p = x.log_softmax(-1)
    divergences = [(p.exp() * (p - ref)).sum(), (ref.exp() * (ref - p)).sum()]
    return [torch.autograd.grad(value, x, retain_graph=True)[0] for value in divergences]


def squared_norms(*gradients: Tensor) -> Tensor:
    """[n]"""
    return torch.stack([gradient.square().sum() for gradient in gradients])


def distances(run: Path) -> dict[str, dict[str, float]]:
    """Of each estimator's expected gradient on policy to the gradient of either divergence: the norm of the difference
    over that of the divergence's gradient; and the norm itself over that of the divergence which it is named for. Over
    64 completions of the run's policy."""
    trainer = Trainer.resume(run)
    config, collector, state = trainer.config, trainer.loop.collector, trainer.loop.state
    assert state.reference
    problems = collector.sample_prompts(8)
    samples = collector.roll_out(problems, config.train.steps + 1)
    rollout = Rollout.of(problems, samples, torch.zeros(0, 8, config.rollout.num_generations))
    temperature = config.rollout.temperature
    squares = {kl: torch.zeros(3, dtype=torch.float64) for kl in EXPECTED}  # to reverse, to forward, its own
    true_squares = torch.zeros(2, dtype=torch.float64)  # reverse, forward
    for batch in batches_of(config, rollout, range(len(samples)), state.model.device):
        logp = logprobs(state.model, batch, temperature)
        with state.reference() as model:
            ref = logprobs(model, batch, temperature)
        truths = divergence_gradients(logp, ref)
        true_squares += squared_norms(*truths)
        for kl in EXPECTED:
            x = logp.clone().requires_grad_()
            (slope,) = torch.autograd.grad(kl_estimate(kl, x, ref).sum(), x)
            found = expected_gradient(slope, logp)
            squares[kl] += squared_norms(*(found - truth for truth in truths), found)
    trainer.close()
    reverse, forward = true_squares.sqrt().tolist()
    rows = {}
    for kl, total in squares.items():
        to_reverse, to_forward, own = total.sqrt().tolist()
        named = forward if "forward" in kl else reverse
        rows[kl] = {"reverse": to_reverse / reverse, "forward": to_forward / forward, "length": own / named}
    return rows


# ---- the page
def last(record: dict[str, Any], name: str) -> float:
    return fmean(record["curves"][name][-LAST:])


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(records: Sequence[dict[str, Any]], beta: float) -> list[str]:
    """A row a variant: means over the seeds, and what the seeds span."""
    lines = [
        "| estimator | seeds | accuracy after | gain, 95 % interval | reverse KL | entropy | reward |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        some = [r for r in records if r["variant"] == variant and r["beta"] == beta]
        if not some:
            continue
        before, after = ([x for r in some for x in r["solved"][when]] for when in ("before", "after"))
        low, high = paired_interval(before, after)
        cells = [spread([fmean(r["solved"]["after"]) for r in some]), f"[{low:+.3f}, {high:+.3f}]"]
        cells += [spread([last(r, name) for r in some]) for name in ("reverse_kl", "entropy", "reward/mean")]
        lines.append(f"| {variant} | {len(some)} | {' | '.join(cells)} |")
    return lines


def gradient_table(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| `kl` | from the reverse KL's | from the forward KL's | length |", "|---|---|---|---|"]
    for kl, row in found.items():
        lines.append(f"| `{kl}` | {row['reverse']:.3g} | {row['forward']:.3g} | {row['length']:.3g} |")
    return lines


def curves(records: Sequence[dict[str, Any]], beta: float) -> dict[str, dict[str, Curves]]:
    """Of each variant that was run: a curve a seed for each metric."""
    some = {v: [r["curves"] for r in records if r["variant"] == v and r["beta"] == beta] for v in VARIANTS}
    return {v: {name: [c[name] for c in seeds] for name in CURVES} for v, seeds in some.items() if seeds}


def write_page(results: dict[str, Any]) -> None:
    records = results["runs"]
    parts = []
    for beta in sorted({r["beta"] for r in records}):
        image = PAGE.with_name(f"kl-beta-{beta:g}.svg")
        draw(CURVES, curves(records, beta), image)
        parts += [
            f"### beta = {beta:g}",
            "",
            f"![curves at beta = {beta:g}]({image.name})",
            "",
            *table(records, beta),
            "",
        ]
    if found := results.get("distances"):
        parts += ["### The expected gradient", "", *gradient_table(found), ""]
    splice(PAGE, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.04, 1.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/kl"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of 5 GiB and a share of the cores each")
    parser.add_argument("--only-draw", action="store_true", help="from what docs/experiments/kl.json holds")
    args = parser.parse_args()
    data = PAGE.with_suffix(".json")
    results: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {"runs": []}

    def save() -> None:
        data.write_text(json.dumps(results) + "\n")

    done = {(r["seed"], r["beta"], r["variant"]) for r in results["runs"] if r["steps"] == args.steps}
    if not args.only_draw:
        wanted = [one for one in product(args.seeds, args.betas, VARIANTS) if one not in done]
        for record in train_all(wanted, args.jobs, args.runs, args.steps):
            results["runs"].append(record)
            save()
        if "distances" not in results:
            results["distances"] = distances(reference_run(args.runs, args.betas[0], args.seeds, args.steps))
            save()
    write_page(results)


if __name__ == "__main__":
    main()
