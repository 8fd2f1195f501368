"""The parts of `make trl-suite` (trl_suite.py, trl_hub.py), on a checkout of three tests and a vocabulary of bytes."""

from __future__ import annotations

import base64

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import trl_hub
import trl_suite

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
VOCABULARY = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(TOKENS))

SCRIPT = """
from datasets import Dataset

def main(test_size, push_to_hub, repo_id):
    if push_to_hub:
        data = Dataset.from_dict({"prompt": ["abc", "cab", "bca", "acb"]}).train_test_split(test_size, shuffle=False)
        data.push_to_hub(repo_id, config_name="standard_prompt_only")
"""

TESTS = """
import pytest
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

def trained(tmp_path, **options):
    trainer = GRPOTrainer(
        "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", reward_funcs=lambda completions, **_: [0.0, 1.0],
        args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, num_generations=2, report_to=[],
                        per_device_train_batch_size=2, max_completion_length=3, **options),
        train_dataset=load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train"),
    )
    trainer.train()
    return trainer

@pytest.mark.slow
def test_train(tmp_path):
    trainer = trained(tmp_path)
    assert trainer.fused_loss
    assert "train_loss" in trainer.state.log_history[-1]

def test_a_refused_option(tmp_path):
    trained(tmp_path, top_entropy_quantile=0.5)

@pytest.mark.parametrize("model", ["tiny-Qwen2VLForConditionalGeneration"])
def test_a_model_that_is_not_made(model):
    raise AssertionError
"""


def test_the_tokenizer_merges_by_rank_and_puts_the_special_tokens_behind():
    tokenizer = trl_hub.qwen_tokenizer(VOCABULARY)
    assert tokenizer("abcab<tool_call>c<|im_end|>")["input_ids"] == [257, 256, 258 + 14, ord("c"), 258 + 2]
    assert tokenizer.decode([257, 258 + 14, 258 + 2], skip_special_tokens=True) == "abc<tool_call>"


def test_a_suite_runs_on_what_stands_for_the_hub(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "scripts").mkdir()
    options = "[tool.pytest.ini_options]\nmarkers = ['slow']\naddopts = '--strict-markers'"
    (checkout / "pyproject.toml").write_text(options)
    (checkout / "trl").mkdir()
    (checkout / "trl" / "__init__.py").write_text("raise AssertionError('not the installed TRL')")
    (checkout / "tests" / "test_grpo_trainer.py").write_text(TESTS)
    for name in ("zen", "zen_image", "zen_multi_image"):
        (checkout / "scripts" / f"generate_{name}_dataset.py").write_text(SCRIPT)
    trl_hub.make_hub(checkout, VOCABULARY, tmp_path / "Qwen3")
    monkeypatch.setattr(trl_suite, "HUBS", {"Qwen3": ""})
    trl_suite.copy_tests(checkout, tmp_path)
    results = trl_suite.run("longgrpo-fused", tmp_path, ["-p", "no:cacheprovider", "-n", "1"])
    assert results == {
        "test_grpo_trainer::test_train": "passed",
        "test_grpo_trainer::test_a_refused_option": "skipped",
        "test_grpo_trainer::test_a_model_that_is_not_made[tiny-Qwen2VLForConditionalGeneration]": "skipped",
    }


def test_only_what_passes_with_the_control_counts_against_ours():
    control = {"a": "passed", "b": "failed", "c": "passed", "d": "passed", "e": "skipped"}
    ours = {"a": "passed", "b": "failed", "c": "failed", "e": "failed"}
    table, worse = trl_suite.compare({"trl": control, "longgrpo": ours})
    assert worse == ["longgrpo: c", "longgrpo: d"]
    assert table.splitlines()[2:] == ["| trl | 3 | 1 | 1 |", "| longgrpo | 1 | 3 | 0 |"]
