"""Three steps of a small random model with vLLM in the process, CUDA graphs and a cache that is released: do engine and
trainer agree, and is the memory as planned? Part of `make gpu`:

    python bench/gpu_train.py [--json FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer

STEPS = 3
APART = 0.05  # most that engine and trainer may differ in a token's logprob, in nats, on average, in bf16
OFF = 0.05  # most that a phase's measured peak may differ from the planned one, as a share
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def sums(split: str) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(64)]


def digits(completions: list[Any], **columns: Any) -> list[float]:
    """The share of digits, and a little for length, so that groups have spread."""
    return [sum(c.isdigit() for c in str(reply)) / 10 + len(str(reply)) / 100 for reply in completions]


def config_of(model: Path, engine: str, dtype: str) -> dict[str, Any]:
    rollout = {
        "engine": engine,
        "num_generations": 8,
        "max_completion_length": 64,
        "release_kv_cache": engine == "vllm",
    }
    return {
        "model": {"path": str(model), "dtype": dtype},
        "lora": {"rank": 8, "alpha": 8},
        "task": {"name": f"{__file__}:sums", "eval_n": 0},
        "rewards": [{"function": f"{__file__}:digits"}],
        "rollout": rollout,
        "train": {"steps": STEPS, "prompts_per_step": 8, "learning_rate": 1e-4, "probe_prompts": 0},
        "log": {"to": []},
    }


def main() -> int:
    from testing.models import write_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="append a JSON line for each step to this file")
    parser.add_argument("--dry-run", action="store_true", help="transformers in place of vLLM, on the CPU: does it run")
    options = parser.parse_args()
    engine, dtype = ("transformers", "float32") if options.dry_run else ("vllm", "bfloat16")
    sizes = {} if options.dry_run else SIZES
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_llama(Path(directory) / "model", **sizes)
        run = Path(directory) / "run"
        Trainer(build_config(config_of(model, engine, dtype)), run).run()
        for line in (run / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            failed += complaints(metrics)
    print(*failed or [f"{STEPS} steps: engine and trainer agree, and the peaks are the planned ones"], sep="\n")
    return 1 if failed else 0


def complaints(metrics: dict[str, Any]) -> list[str]:
    found, apart = [], metrics.get("engine_trainer_logprob_diff_mean")
    if apart is not None and not apart <= APART:
        found.append(f"step {metrics['step']}: engine and trainer differ by {apart:.4f} nats on average")
    for name, measured in metrics.items():
        phase = name.removeprefix("measured_bytes/")
        planned = metrics.get(f"predicted_bytes/{phase}")
        if phase != name and planned and abs(measured / planned - 1) > OFF:
            found.append(f"{phase}: {measured / 2**20:.0f} MiB measured, {planned / 2**20:.0f} planned")
    return found


if __name__ == "__main__":
    sys.exit(main())
