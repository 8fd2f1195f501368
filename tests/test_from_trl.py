"""docs/from-trl.md has each option of TRL's GRPOConfig once, and names of ours that exist."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import pytest
import trl_docs
import yaml

from longgrpo.config.run import TrainConfig, build_config
from testing import ROOT

trl = pytest.importorskip("trl", reason="no TRL: pip install -r requirements/test.txt")

PAGE = (ROOT / "docs/from-trl.md").read_text()
TRLS, _, OTHERS = PAGE.partition("## `LoraConfig` of PEFT")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| TRL |")
]


def ours():
    """The dotted keys of the config: groups, and what is in them."""
    keys = set()
    for name, hint in typing.get_type_hints(TrainConfig).items():
        keys.add(name)
        group = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        keys |= {f"{name}.{field.name}" for field in dataclasses.fields(group)} if group else set()
    return keys


def test_each_option_of_trl_stands_there_once():
    names = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0]) if f"| {row[0]} |" in TRLS]
    options = [field.name for field in dataclasses.fields(trl.GRPOConfig)]
    arguments = set(inspect.signature(trl.GRPOTrainer.__init__).parameters) - {"self", "args"}
    assert sorted(names) == sorted([*options, *arguments])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split("`")[1])
def test_our_name_exists_or_a_reason_is_given(row):
    _, here, reason = row
    if here in ("none", "always"):
        assert reason
    else:
        assert re.sub(r"`([\w.]+|longgrpo [\w -]+)`", "", here).strip(", ") == ""
    named = re.findall(r"`((?:model|lora|task|rollout|loss|train|memory|log)\.[\w.]+)`", f"{here} {reason}")
    assert set(named) | set(re.findall(r"`([\w.]+)`", here)) <= ours()


def test_each_option_of_pefts_adapters_stands_there_once():
    peft = pytest.importorskip("peft")
    section = OTHERS.partition("\n## ")[0]
    names = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0]) if f"| {row[0]} |" in section]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(peft.LoraConfig))


def test_the_page_is_made_of_the_table():
    assert trl_docs.render(PAGE) == PAGE, "run python scripts/trl_docs.py"


def test_the_scripts_config_is_one():
    """The page's own, before and after: a config that is valid, with the numbers of the script."""
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    config = build_config(yaml.safe_load(block))
    assert config.train.steps == 2 * (1000 - config.task.eval_n) / config.train.prompts_per_step
    assert config.train.warmup_steps == 0.05 * config.train.steps


def test_most_of_trls_options_have_a_counterpart():
    lacking = [theirs for theirs, here, _ in ROWS if here == "none" and f"| {theirs} |" in TRLS]
    assert len(lacking) < 37 / 2  # there were 37 before optimizers by name, callbacks and evaluation


def test_the_values_that_differ_are_those_of_both():
    config = trl.GRPOConfig
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert "256 here, 512 in TRL" in PAGE
    assert defaults["max_completion_length"] == 512
    assert defaults["learning_rate"] == 1e-6
    assert defaults["use_bias_correction_kl"] is True
    assert defaults["adam_beta2"] == 0.999
