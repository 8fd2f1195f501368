"""The memory table of Unsloth's article "Long-context GRPO" by formula, and the same task by this repository's planner:

python bench/article_memory.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from longgrpo.checks.rehearsal import Forecast
from longgrpo.config.run import TrainConfig, load_config
from longgrpo.memory.cards import GIB

ROOT = Path(__file__).parents[1]
LAYERS, HIDDEN, KV_WIDTH, VOCABULARY = 32, 4096, 1024, 128256  # Llama 3.1 8B
GENERATIONS, LENGTH = 8, 20480

ARTICLE = [  # term, bytes, what the article says (GiB; * GB), the formula
    ("logits of GRPO, standard", 2 * 2 * GENERATIONS * LENGTH * VOCABULARY, "78.3", "2 b G S V"),
    ("logits, theirs", 2 * 2 * LENGTH * VOCABULARY, "9.8", "2 b S V: one completion at a time"),
    ("key-value cache", 2 * 2 * LAYERS * LENGTH * KV_WIDTH, "2.5", "2 b L Hkv S: ONE live sequence; eight need 20"),
    ("a second copy of the weights", 2 * 8_030_261_248, "16*", "2 bytes a parameter"),
    ("layer inputs, which their offload removes", 2 * LAYERS * HIDDEN * GENERATIONS * LENGTH, "-", "b L H T"),
]


def main() -> None:
    print(f"Llama 3.1 8B, {GENERATIONS} completions of {LENGTH} tokens. By formula, GiB:")
    for term, size, said, formula in ARTICLE:
        value = f"{size / 1e9:.2f} GB" if said.endswith("*") else f"{size / GIB:.2f}"
        print(f"  {value:>9}  {term:44} article {said:5} {formula}")
    print(f"  sums: 42 + 9.8 + 0 + 2.5 = {42 + 9.8 + 2.5:.1f}; 414 + 78.3 + 16 + 2.5 = {414 + 78.3 + 16 + 2.5:.1f}")
    print("By the planner, training peak in GiB (without the CUDA context; QLoRA of rank 32):")
    for text, config in ladder():
        print(f"  {sum(training_terms(config).values()) / GIB:9.2f}  {text}")
    for step in ("embedding on the host", "frozen NF4 layers streamed", "sequence-chunked attention"):
        print(f"  {'missing':>9}  {step}")
    print("A trainer of today that makes the logits, layers checkpointed, one sequence at a time:")
    print(f"  {baseline() / GIB:9.2f}  with bf16 logits, and fp32 ones, their log-softmax and its gradient beside them")


def training_terms(config: TrainConfig) -> dict[str, int]:
    """Bytes, without the CUDA context."""
    terms = Forecast(config, "h100-80").plan.training.terms
    return {name: size for name, size in terms.items() if name != "context"}


def baseline() -> int:
    """Bytes: the same model with one sequence at a time. Its peak is at the head, where no layer is in its backward."""
    terms = training_terms(_set(ladder()[1][1], "train", token_budget=LENGTH))
    return sum(terms.values()) - terms["MLP's backward"] + (2 + 4 + 4 + 4) * LENGTH * VOCABULARY


def ladder() -> list[tuple[str, TrainConfig]]:
    """Each step on top of those before it."""
    config = load_config(ROOT / "examples/llama-3.1-8b-20k-24gb.yaml")
    config = replace(config, model=replace(config.model, path=str(ROOT / config.model.path)))
    config = _set(config, "rollout", release_kv_cache=False, kv_cache_gib=2.6)
    config = _set(config, "train", token_budget=GENERATIONS * LENGTH, prompts_per_step=1)
    config = _set(config, "memory", offload=False, checkpoint=True, tiled_mlp=False, share_prompts=False)
    steps = [("all eight at once, layers checkpointed, the loss in its 256 MiB", config)]
    for text, group, fields in (
        ("key-value cache released while training", "rollout", {"release_kv_cache": True}),
        ("layer inputs on the host", "memory", {"offload": True}),
        ("MLPs and norms tiled, 2,048 tokens a tile", "memory", {"tiled_mlp": True, "tile_rows": 2048}),
        ("one sequence at a time, the same gradient", "train", {"token_budget": LENGTH}),
    ):
        config = _set(config, group, **fields)
        steps.append((text, config))
    return steps


def _set(config: TrainConfig, group: str, **fields: Any) -> TrainConfig:
    return replace(config, **{group: replace(getattr(config, group), **fields)})


if __name__ == "__main__":
    main()
