"""Models of which nothing but config.json is there, and configs of runs with them."""

from __future__ import annotations

import json
from typing import Any

from longgrpo.config.run import TrainConfig, build_config
from testing import ROOT

MODELS = ROOT / "examples" / "models"
SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": 100000, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def model_config(name: str) -> dict[str, Any]:
    return dict(SMOLLM2) if name == "smollm2" else json.loads((MODELS / name / "config.json").read_text())


def run_config(
    path: str, length: int, *, lora: bool = True, dtype: str = "bfloat16", beta: float = 0.0, budget: int | None = None,
    completion: int | None = None, memory: dict[str, Any] | None = None, **rollout: Any,
) -> TrainConfig:  # fmt: skip
    """A run on sequences of `length` tokens, half of them the completion's."""
    tree: dict[str, Any] = {
        "model": {"path": path, "dtype": dtype},
        "task": {"name": "chain_sum"},
        "rewards": [{"function": "score_answer"}],
        "rollout": {
            "engine": "transformers", "num_generations": 4, "max_completion_length": completion or length // 2,
            "max_model_len": length,
        } | rollout,
        "loss": {"beta": beta},
        "train": {"prompts_per_step": 2, "token_budget": budget or length},
        "memory": memory or {},
    }  # fmt: skip
    return build_config(tree | ({"lora": {"rank": 16, "alpha": 16}} if lora else {}))
