"""A model of any shape with random weights, in training: a step's memory and time depend on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longgrpo.config.run import TrainConfig, build_config
from longgrpo.memory.dryrun import MetaEngine
from longgrpo.offload import OffloadEngine
from longgrpo.train.state import TrainState, make_state


def run_config(
    directory: Path, shape: dict[str, Any], tokens: int, memory: dict[str, Any], model: dict[str, Any]
) -> TrainConfig:
    """Of LoRA on sequences of `tokens` tokens, one in a micro-batch; the shape is a config.json, put into directory."""
    (directory / "config.json").write_text(json.dumps(shape))
    return build_config(
        {
            "model": {"path": str(directory), **model},
            "lora": {"rank": 32, "alpha": 32},
            "task": {"name": "chain_sum"},
            "rewards": [{"function": "score_answer"}],
            "rollout": {
                "engine": "transformers", "num_generations": 8, "max_completion_length": tokens - tokens // 10,
                "max_model_len": tokens,
            },
            "train": {"prompts_per_step": 1, "token_budget": tokens},
            "memory": memory,
        }
    )  # fmt: skip


def random_state(config: TrainConfig, device: torch.device) -> TrainState:
    """The model in training, its weights small random numbers; without storage on `meta`."""
    engine: Any = MetaEngine(Path(config.model.path), getattr(torch, config.model.dtype), config.model.quantization)
    depths = config.memory.depths
    if device.type == "meta":
        counting = OffloadEngine(backend="count", host_bytes=1 << 44, **depths) if config.memory.offload else None
        return make_state(config, engine, counting)
    engine.model.to_empty(device=device).tie_weights()
    for parameter in engine.model.parameters():
        if parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            parameter.data.random_(0, 255)
    rotary = engine.model.model.rotary_emb
    engine.model.model.rotary_emb = type(rotary)(config=engine.model.config).to(device)
    return make_state(config, engine, OffloadEngine(**depths) if config.memory.offload else None)
