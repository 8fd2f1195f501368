"""How a rollout and an update cost in each way of sharing the weights: python bench/rollout.py [--prompts 8 64]

SmolLM2-135M on vLLM in this process, one engine after the other: tokens a second, seconds and bytes of a weight sync,
the gap between the engine's logprobs and the trainer's, and the process's memory."""

from __future__ import annotations

import argparse
import time
from typing import Any

import psutil
import torch

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.model.head import head_of
from longgrpo.model.load import SMOLLM2
from longgrpo.model.lora import add_lora
from longgrpo.model.packed_attention import packed_hidden, use_packed_attention
from longgrpo.rollout import RolloutConfig, Sampling, make_engine
from longgrpo.rollout.support import sampled_logprob
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.packing import pack

CASES: dict[str, tuple[str, LoraConfig | None, dict[str, Any]]] = {
    "full": ("float32", None, {}),
    "full, packed copy": ("float32", None, {"repack_weights": True}),
    "merge": ("float32", LoraConfig(mode="merge"), {}),
    "merge, packed copy": ("float32", LoraConfig(mode="merge"), {"repack_weights": True}),
    "views": ("float32", LoraConfig(mode="views"), {}),
    "copy": ("float32", LoraConfig(mode="copy", alpha=32), {}),
    "views, fp8 cache": ("float32", LoraConfig(mode="views"), {"kv_cache_dtype": "fp8"}),
    "views, bfloat16": ("bfloat16", LoraConfig(mode="views"), {}),
    "views, bfloat16, fp8 cache": ("bfloat16", LoraConfig(mode="views"), {"kv_cache_dtype": "fp8"}),
}
TOKENS = 64


def measure(name: str, counts: list[int]) -> None:
    dtype, lora, options = CASES[name]
    config = RolloutConfig(engine="vllm", max_model_len=512, kv_cache_gib=0.5, **options)
    engine = make_engine(config, ModelConfig(SMOLLM2, dtype), lora)  # type: ignore[arg-type]
    model: Any = add_lora(engine.model, lora, seed=0) if lora else engine.model.requires_grad_(True)
    use_packed_attention(model)
    engine.attach(model)
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    prompts = [list(range(100 + i, 140 + i)) for i in range(max(counts))]
    engine.generate(prompts[:2], sampling, range(2))  # warm
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.01 if lora else 1e-4)
    start = time.perf_counter()
    copied = engine.weights_changed()
    seconds = time.perf_counter() - start
    speeds = []
    for count in counts:
        start = time.perf_counter()
        completions = engine.generate(prompts[:count], sampling, range(count))
        speeds.append(count * TOKENS / (time.perf_counter() - start))
    samples = [Sample(i, p, c, "") for i, (p, c) in enumerate(zip(prompts, completions, strict=False))][:8]
    batch = pack(Rollout.of([], samples, torch.zeros(0, 1, len(samples))), range(len(samples)))
    with torch.no_grad():
        hidden = packed_hidden(model, batch.packed)[batch.rows]
        logp = sampled_logprob(hidden, head_of(model), batch.target, sampling).logp
    gap = (logp - batch.tokens.sampling_logp).abs()
    ratio = (logp - batch.tokens.sampling_logp).exp().mean()
    rss = psutil.Process().memory_info().rss / 2**30
    gaps = f"{gap.mean():.1e} / {gap.max():.1e} | {ratio:.4f}"
    rates = " | ".join(f"{speed:.0f}" for speed in speeds)
    print(f"| {name} | {rates} | {seconds:.2f} | {copied:,} | {gaps} | {rss:.1f} |", flush=True)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    rates = " | ".join(f"tok/s, {count} prompts" for count in options.prompts)
    print(f"| weights | {rates} | weight sync s | bytes copied | gap mean / max | mean ratio | RSS GiB |")
    print("|---" * (6 + len(options.prompts)) + "|", flush=True)
    for name in options.cases:
        measure(name, options.prompts)


if __name__ == "__main__":
    main()
