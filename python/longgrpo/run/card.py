"""The model card beside trained weights: what was trained, how, and what came of it. It has no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from longgrpo.config.run import TrainConfig
from longgrpo.model.load import published_name
from longgrpo.run.files import write_file
from longgrpo.run.summary import versions
from longgrpo.visible import visible

NAME = "README.md"


def write_card(weights: Path, config: TrainConfig, step: int, summary: Mapping[str, Any] | None = None) -> None:
    """Writes the card into the directory of an adapter or a model, in place of PEFT's. step: the weights'; summary: of
    the run, if they are those of its end."""
    write_file(weights / NAME, card(config, step, summary or {}))


def summary_at(run: Path, step: int) -> Mapping[str, Any] | None:
    """The summary of `run`, if it ended at this step."""
    try:
        found = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("steps") == step else None


def card(config: TrainConfig, step: int, summary: Mapping[str, Any]) -> str:
    hub, name = published_name(config.model.path), Path(config.model.path).name
    hub = None if hub and Path(hub).suffix == ".gguf" else hub
    lora, train = config.lora, config.train
    head: dict[str, Any] = {"base_model": hub} if hub else {}
    head |= {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["grpo", "longgrpo", *(["lora"] if lora else [])]
    what = f"A LoRA adapter of rank {lora.rank} for {hub or name}" if lora else f"{hub or name}, all weights"
    rewards = ", ".join(f"{reward.label} ({reward.weight:g})" for reward in config.rewards)
    rows = {
        "base model": hub or name,
        "task": _task(config),
        "rewards (weight)": rewards,
        "loss": f"{config.loss.function or config.loss.loss_type}, beta {config.loss.beta:g}".rpartition("/")[2],
        "a step": f"{train.prompts_per_step} prompts x {config.rollout.num_generations} completions of at most "
        f"{config.rollout.max_completion_length} tokens",
        "learning rate": f"{train.rate:g}, {train.schedule}",
        "steps": f"{step}",
        "seed": f"{train.seed}",
        **_results(config, summary),
        "versions": ", ".join(f"{package} {found}" for package, found in versions().items()),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    loaded = "peft import AutoPeftModelForCausalLM" if lora else "transformers import AutoModelForCausalLM"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {_cell(name)}, trained with GRPO

{_cell(what)}, trained by longgrpo.

| | |
|---|---|
{table}

```python
from {loaded}

model = {loaded.rpartition(" ")[2]}.from_pretrained("this directory")
```
"""


def _task(config: TrainConfig) -> str:
    name = config.task.name.rpartition("/")[2] if Path(config.task.name).is_absolute() else config.task.name
    parameters = json.dumps(config.task.parameters) if config.task.parameters else ""
    return f"{name} {parameters}".strip()


def _results(config: TrainConfig, summary: Mapping[str, Any]) -> dict[str, str]:
    """A row for each held-out set that was evaluated."""
    rows = {}
    for name in config.task.held_out:
        of = f"_{name}" if name else ""
        if (after := summary.get(f"eval_after{of}")) is None:
            continue
        text = f"{after:.3f} on {summary[f'eval_n{of}']} problems"
        if (before := summary.get(f"eval_before{of}")) is not None:
            low, high = summary[f"eval_diff_interval{of}"]
            text += f", {before:.3f} before; 95 % interval of the paired difference [{low:+.3f}, {high:+.3f}]"
        rows[f"held-out accuracy{f' ({name})' if name else ''}"] = text
    return rows


def _cell(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
