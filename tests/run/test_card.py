"""The model card of an adapter and of a model, at the end of a run, in a checkpoint and exported."""

from __future__ import annotations

import json

import pytest
import yaml

from longgrpo.config.run import build_config
from longgrpo.run.card import card
from longgrpo.run.export import export
from longgrpo.run.trainer import Trainer


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("lora", [True, False])
def test_a_card_says_what_was_trained_and_what_came_of_it(tree, tmp_path, tiny_model, lora):
    tree["train"] |= {"steps": 2, "save_steps": 1}
    if not lora:
        del tree["lora"]
    run = tmp_path / "run"
    Trainer(build_config(tree), run).run()
    summary = json.loads((run / "summary.json").read_text())
    text = (run / ("adapter" if lora else "model") / "README.md").read_text()
    low, high = summary["eval_diff_interval"]
    assert f"| {summary['eval_after']:.3f} on 8 problems, {summary['eval_before']:.3f} before" in text
    assert f"[{low:+.3f}, {high:+.3f}]" in text
    assert "| digits (1) |" in text
    assert "| steps | 2 |" in text
    assert f"torch {summary['versions']['torch']}" in text
    assert front(text)["library_name"] == ("peft" if lora else "transformers")
    assert str(tiny_model.parent) not in text
    assert "More Information Needed" not in text

    export(run, tmp_path / "out", None)
    assert (tmp_path / "out/README.md").read_text() == text
    export(run, tmp_path / "earlier", "model", "1")
    earlier = (tmp_path / "earlier/README.md").read_text()
    assert "| steps | 1 |" in earlier
    assert "held-out accuracy" not in earlier  # the run ended with other weights


def test_a_card_names_what_is_published_and_no_place(tree, tmp_path):
    tree["task"] |= {"name": str(tmp_path / "own|rows.jsonl"), "parameters": {}}
    tree["model"]["path"] = "smollm2-135m-instruct"
    text = card(build_config(tree), 3, {})
    assert front(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| own\\|rows.jsonl |" in text
    assert str(tmp_path) not in text
    tree["model"]["path"] = "/home/me/.cache/model.gguf"
    assert "base_model" not in front(card(build_config(tree), 3, {}))
    assert "/home/me" not in card(build_config(tree), 3, {})
