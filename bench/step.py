"""An 8B-shaped LoRA step with random weights on a GPU: the allocator's peak against the plan, and the step's time with
offload, with plain checkpointing and without offload's tiling. Part of `make gpu`:

    python bench/step.py [--json FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from synthetic import random_state, run_config

from longgrpo.checks.counted import NOT_TRAINERS, longest_rollout, rows_of
from longgrpo.memory.cards import GIB
from longgrpo.memory.internal import Internal, Target
from longgrpo.memory.live import LiveStorages
from longgrpo.memory.plan import plan_memory
from longgrpo.memory.shape import model_shape
from longgrpo.train.loop import loss_and_backward, optimizer_step
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.state import TrainState
from longgrpo.train.update import plan_updates

SHAPE = Path(__file__).parents[1] / "examples/models/llama-3.1-8b/config.json"
MODES = {
    "offload and tiles": {"offload": True, "tiled_mlp": True, "tile_rows": 2048},
    "checkpointing and tiles": {"checkpoint": True, "tiled_mlp": True, "tile_rows": 2048},
    "checkpointing": {"checkpoint": True},
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dry-run", action="store_true", help="on tensors without storage: does it run")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        print("bench/step.py needs a GPU", file=sys.stderr)
        return 2
    device = torch.device("meta" if options.dry_run else "cuda")
    kinds = [None, *(["nf4"] if importlib.util.find_spec("bitsandbytes") and not options.dry_run else [])]
    for kind in kinds:
        for sequences in (1,) if options.dry_run else (1, 8):
            for name, memory in MODES.items():
                result = measure(device, kind, name, memory, sequences, options.tokens, options.layers)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    return 0


def measure(
    device: torch.device, kind: str | None, name: str, memory: dict[str, Any], sequences: int, tokens: int, layers: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        layered = json.loads(SHAPE.read_text()) | {"num_hidden_layers": layers}
        config = run_config(Path(directory), layered, tokens, memory, {"dtype": "bfloat16", "quantization": kind})
        shape = model_shape(config.model.path)
        rollout = longest_rollout(config, shape.context)
        on_gpu = device.type == "cuda"
        target = Target(torch.cuda.get_device_properties().multi_processor_count if on_gpu else 132)
        phase = plan_memory(config, shape, rows_of(config, rollout), target).training
        state = random_state(config, device)
    loss = PolicyLoss(config)
    (once,) = plan_updates(config, rollout, device, parts=1)
    update = replace(once, batches=once.batches * sequences)
    seconds = []
    clock = Clock() if on_gpu else DryClock(target, state)
    with clock:
        for number in range(1, 5 if on_gpu else 3):
            if number == 2:  # the optimizer's state is there
                clock.reset_peak()
            start = clock.now()
            norm, _ = loss_and_backward(loss, state, update)
            optimizer_step(config, state, number, update, norm)
            seconds.append(clock.now() - start)
    peak = clock.peak()
    planned = phase.device_bytes - sum(phase.terms.get(term, 0) for term in NOT_TRAINERS)
    result = {
        "weights": kind or "bfloat16", "mode": name, "sequences": sequences, "tokens": tokens, "peak_bytes": peak,
        "planned_bytes": planned, "seconds": statistics.median(seconds[1:]),
    }  # fmt: skip
    print(
        f"{result['weights']:9} {name:24} {sequences} x {tokens}: peak {peak / GIB:6.2f} GiB, planned "
        f"{planned / GIB:6.2f} ({peak / planned - 1:+.1%}), {result['seconds']:.2f} s a step",
        flush=True,
    )
    del state
    if on_gpu:
        torch.cuda.empty_cache()
    return result


class Clock(AbstractContextManager["Clock"]):
    """The GPU's time, and the allocator's peak."""

    def __exit__(self, *error: object) -> None:
        pass

    def now(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated())


class DryClock(Clock):
    """The peak of storages that are not there; its time says nothing."""

    def __init__(self, target: Target, state: TrainState) -> None:
        self.live = LiveStorages(Internal(target))
        self.state = state

    def __enter__(self) -> DryClock:
        self.live.__enter__()
        self.live.add([*self.state.model.parameters(), *self.state.model.buffers()], "weights")
        self.live.add(self.state.parameters.values(), "masters")
        return self

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(*error)

    def now(self) -> float:
        return time.perf_counter()

    def reset_peak(self) -> None:
        self.live.reset_peak()

    def peak(self) -> int:
        return self.live.peak


if __name__ == "__main__":
    sys.exit(main())
