"""One training step on long sequences, on a CPU: memory and seconds, ours beside TRL's. `make bench-long` runs it.

Models have random weights and LoRA of rank 32. A step is loss, backward and optimizer step on sequences that are there
already, one of them in a micro-batch in both programs; TRL takes its own `_compute_loss` with gradient checkpointing.
Each row is a process of its own, in which a step of 64 tokens comes first. The peak is the kernel's count of resident
memory. On a CPU the host is the same memory: the part that the offload holds there is told apart, and is not in
"device". The plan's figure is the trainer's, so it is compared with the peak beyond Python and its libraries. Rows that
the file has already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from curves import panels_of, save, splice
from peers import environment
from synthetic import random_state, run_config

import memory

GIB = 1 << 30
PAGE = Path(__file__).parents[1] / "docs/long-context.md"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "max_position_embeddings": 1 << 17, "rope_theta": 1e5, "bos_token_id": 0, "eos_token_id": 0, "head_dim": 64,
}  # fmt: skip
SHAPES = {
    "smollm2": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "llama": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
NAMES = {"smollm2": "SmolLM2's shape", "llama": "4 layers, H 2048, V 128,256"}
OURS: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpoint": True},
    "and offload": {"offload": True},
    "everything": {"offload": True, "tiled_mlp": True, "tile_rows": 1024},
}
TRL = "TRL"
BUDGETS = (8, 12, 20)  # GiB, for which the longest sequence is read off the rows
KEY = ("model", "dtype", "sequences", "tokens", "program")
LENGTHS = (2048, 4096, 8192, 16384, 20480)
WARMUP = 64  # tokens


# ---- a row, in its own process


def row(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        run = trl_steps if case["program"] == TRL else our_steps
        steps = run(case, Path(directory))
        started = next(steps)  # what Python and its libraries take
        next(steps)
        memory.reset_peak()
        start = time.perf_counter()
        facts = next(steps)
        seconds = time.perf_counter() - start
    peak = memory.status("VmHWM")
    device = peak - facts.get("host_bytes", 0)
    return case | facts | {"peak_bytes": peak, "device_bytes": device, "base_bytes": started, "seconds": seconds}


def our_steps(case: dict[str, Any], directory: Path) -> Iterator[Any]:
    import peft  # noqa: F401  (what a run imports)

    from longgrpo.checks.counted import NOT_TRAINERS, longest_rollout, rows_of
    from longgrpo.memory.internal import CPU
    from longgrpo.memory.plan import plan_memory
    from longgrpo.memory.shape import model_shape
    from longgrpo.train.loop import loss_and_backward, optimizer_step
    from longgrpo.train.losses import PolicyLoss
    from longgrpo.train.update import plan_updates

    model = {"dtype": case["dtype"]}
    config = run_config(directory, SHAPES[case["model"]], case["tokens"], OURS[case["program"]], model)
    rollout = longest_rollout(config, case["tokens"])
    phase = plan_memory(config, model_shape(config.model.path), rows_of(config, rollout), CPU).training
    yield memory.status("VmRSS")
    device = torch.device("cpu")
    state, loss = random_state(config, device), PolicyLoss(config)
    short = run_config(directory, SHAPES[case["model"]], WARMUP, OURS[case["program"]], model)
    (warm,) = plan_updates(short, longest_rollout(short, WARMUP), device, parts=1)
    optimizer_step(config, state, 1, warm, loss_and_backward(loss, state, warm)[0])
    yield None
    (once,) = plan_updates(config, rollout, device, parts=1)
    update = replace(once, batches=once.batches * case["sequences"])
    optimizer_step(config, state, 2, update, loss_and_backward(loss, state, update)[0])
    held = state.offload.stats()["host_committed"] if state.offload else 0
    planned = phase.device_bytes - sum(phase.terms.get(term, 0) for term in NOT_TRAINERS)
    yield {"host_bytes": int(held), "planned_bytes": planned}


def trl_steps(case: dict[str, Any], directory: Path) -> Iterator[Any]:
    import datasets
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from longgrpo.model.load import load_tokenizer, resolve_model

    (directory / "config.json").write_text(json.dumps(SHAPES[case["model"]]))
    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    yield memory.status("VmRSS")
    config = AutoConfig.from_pretrained(directory)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case["dtype"])),
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
        train_dataset=datasets.Dataset.from_list([{"prompt": "none"}]),
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=GRPOConfig(
            output_dir=str(directory), per_device_train_batch_size=1, gradient_accumulation_steps=2, num_generations=2,
            gradient_checkpointing=True, bf16=False, use_cpu=True, report_to="none",
        ),
    )  # fmt: skip
    model = trainer.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = case["sequences"]

    def step(tokens: int, sequences: int) -> None:
        ids = torch.randint(1, SHAPES[case["model"]]["vocab_size"], (1, tokens))
        prompt, completion = ids.split([tokens // 10, tokens - tokens // 10], dim=1)  # [1, P], [1, C]
        inputs = {
            "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": completion,
            "completion_mask": torch.ones_like(completion), "advantages": torch.ones(1),
            "num_items_in_batch": torch.tensor(sequences * completion.shape[1]),
        }  # fmt: skip
        for _ in range(sequences):
            trainer.accelerator.backward(trainer._compute_loss(model, inputs))
        optimizer.step()
        optimizer.zero_grad()

    step(WARMUP, 1)
    yield None
    step(case["tokens"], case["sequences"])
    yield {}


# ---- the rows, and the page


def cases(*lists: Iterable[Any]) -> list[dict[str, Any]]:
    """Models, dtypes, sequences, tokens, programs; the shortest first."""
    found = [dict(zip(KEY, values, strict=True)) for values in itertools.product(*lists)]
    return sorted(found, key=lambda case: case["sequences"] * case["tokens"])


def full_list() -> list[dict[str, Any]]:
    each = (SHAPES, ("float32", "bfloat16"))
    programs = [*OURS, TRL]
    return cases(*each, [1], LENGTHS, programs) + cases(*each, [8], LENGTHS, ["everything", TRL])


def measure(cases: Iterable[dict[str, Any]], file: Path) -> None:
    known = {key_of(one) for one in rows_in(file)}
    for case in cases:
        if key_of(case) in known:
            continue
        try:
            result = json.loads(memory.in_fresh_process(__file__, "--row", json.dumps(case)))
        except RuntimeError as error:
            result = case | {"failed": str(error)}
        with file.open("a") as out:
            out.write(json.dumps(result) + "\n")
        print(text_of(result), flush=True)


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def key_of(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in KEY)


def text_of(result: dict[str, Any]) -> str:
    where = f"{result['model']} {result['dtype']} {result['sequences']} x {result['tokens']}: {result['program']}"
    if "failed" in result:
        return f"{where}: {result['failed']}"
    return f"{where}: {', '.join(f'{name} {value}' for name, value in cells(result).items() if value)}"


def cells(result: dict[str, Any]) -> dict[str, str]:
    """Of a row of the table; the plan beside the peak that it is for."""
    own, planned = result["device_bytes"] - result["base_bytes"], result.get("planned_bytes")
    return {
        "device, GiB": f"{result['device_bytes'] / GIB:.2f}",
        "host, GiB": f"{result['host_bytes'] / GIB:.2f}" if result.get("host_bytes") else "",
        "beyond Python": f"{own / GIB:.2f}",
        "planned": f"{planned / GIB:.2f} ({planned / own - 1:+.1%})" if planned else "",
        "seconds": f"{result['seconds']:.0f}",
    }


def longest(points: list[tuple[int, int]], budget: int) -> str:
    """The longest sequence whose peak, on the line between two measured ones, is within the budget."""
    points = sorted(points)
    if points[-1][1] <= budget:
        return f"over {points[-1][0]:,}"
    for (low, less), (high, more) in itertools.pairwise(points):
        if less <= budget < more:
            return f"{int(low + (high - low) * (budget - less) / (more - less)):,}"
    return "none"


def write_page(results: list[dict[str, Any]]) -> None:
    done = [one for one in results if "failed" not in one]
    lines = ["| model | dtype | sequences | | " + " | ".join(cells(done[0])) + " |", "|---" * 9 + "|"]
    lines += [
        f"| {NAMES[one['model']]} | {one['dtype']} | {one['sequences']} x {one['tokens']:,} | {one['program']} | "
        f"{' | '.join(cells(one).values())} |"
        for one in sorted(done, key=order)
    ]
    lines += [
        "",
        "The longest sequence within so much memory of the device, on the lines between the rows with one:",
        "",
    ]
    lines += ["| model | dtype | | " + " | ".join(f"{size} GiB" for size in BUDGETS) + " |", "|---" * 6 + "|"]
    curves = curves_of(done)
    for (model, dtype, program), points in curves.items():
        within = " | ".join(longest(points, size * GIB) for size in BUDGETS)
        lines.append(f"| {NAMES[model]} | {dtype} | {program} | {within} |")
    image = PAGE.with_name("long-context.svg")
    draw(curves, image)
    splice(PAGE, [*lines, "", f"![peak memory by sequence length]({image.name})"])


def order(result: dict[str, Any]) -> tuple[Any, ...]:
    programs = [*OURS, TRL]
    return (*key_of(result)[:4], programs.index(result["program"]))


def curves_of(done: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[tuple[int, int]]]:
    curves: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for one in sorted(done, key=order):
        if one["sequences"] == 1:
            point = one["tokens"], one["device_bytes"]
            curves.setdefault((one["model"], one["dtype"], one["program"]), []).append(point)
    return curves


def draw(curves: dict[tuple[str, str, str], list[tuple[int, int]]], path: Path) -> None:
    panels = sorted({key[:2] for key in curves})
    figure, axes = panels_of(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        for (model, dtype, program), points in curves.items():
            if (model, dtype) == panel:
                axis.plot(
                    *zip(*((n, size / GIB) for n, size in sorted(points)), strict=True), marker="o", label=program
                )
        axis.set(title=f"{NAMES[panel[0]]}, {panel[1]}", xlabel="tokens of a sequence", ylim=(0, None))
    axes[0].set(ylabel="GiB on the device")
    axes[0].legend(fontsize=7)
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["smollm2"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(LENGTHS[:3]))
    parser.add_argument("--sequences", nargs="+", type=int, default=[1])
    parser.add_argument("--program", nargs="+", choices=[*OURS, TRL], default=["everything", TRL])
    parser.add_argument("--json", type=Path, default=Path("build/bench-long.jsonl"), help="default: %(default)s")
    parser.add_argument("--page", action="store_true", help="write the file's rows to docs/long-context.md")
    parser.add_argument("--full", action="store_true", help="both models, both dtypes, 1 and 8 sequences, all lengths")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(row(json.loads(args.row))))
        return 0
    about = environment("cpu")
    print(f"{about['cpu']}, {about['threads']} threads, {about['versions']}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = cases(args.model, args.dtype, args.sequences, args.tokens, args.program)
    measure(full_list() if args.full else chosen, args.json)
    if args.page:
        write_page(rows_in(args.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
