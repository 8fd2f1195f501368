"""What a config may not be, though YAML takes it."""

from __future__ import annotations

import pytest
import yaml

from longgrpo.config.document import read_yaml
from longgrpo.config.run import build_config, load_config
from longgrpo.errors import ConfigError

BASE = """
model: {path: m}
task: {name: chain_sum}
rewards: [{function: score_answer}]
"""


def load(tmp_path, text, overrides=()):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", list(overrides))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("train: {steps: 5}\ntrain: {seed: 1}", "'train' stands twice, in line 5 and in line 6"),
        ("train: {steps: 5, steps: 6}", "'steps' stands twice, in line 5 and in line 5"),
        ("model: {path: other}", "'model' stands twice"),
    ],
)
def test_a_key_that_stands_twice(tmp_path, more, line):
    with pytest.raises(ConfigError, match=f"c.yaml: is not YAML: the key {line}"):
        load(tmp_path, BASE + more)


def test_a_key_that_stands_twice_in_an_override(tmp_path):
    with pytest.raises(ConfigError, match="'size' stands twice"):
        load(tmp_path, BASE, ["--task.parameters", "{size: 1, size: 2}"])


def test_a_merged_key_is_overridden_and_stands_once(tmp_path):
    config = load(tmp_path, BASE + "train:\n  <<: {steps: 3, seed: 5}\n  steps: 7\n")
    assert (config.train.steps, config.train.seed) == (7, 5)


def test_aliases_that_explode(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    for text in (bomb, "a: &a [*a]", "[" * 5000):
        with pytest.raises(ConfigError, match="is not YAML"):
            load(tmp_path, text)
    with pytest.raises(yaml.YAMLError, match=r"more than 100,000 values"):
        read_yaml(bomb)


KEYS = {
    "rewards.0.weight": (".nan", ".inf", "-.inf"),
    "rollout.temperature": (".nan", ".inf"),
    "rollout.kv_cache_gib": (".nan", ".inf"),
    "train.learning_rate": (".nan", ".inf"),
    "train.weight_decay": (".nan", ".inf"),
    "train.betas": ("[.nan, 0.9]", "[0.9, .inf]"),
    "train.optim_args": ("{eps: .nan}",),
    "train.max_grad_norm": (".nan", "-.inf"),
    "train.reference_mixup": (".nan",),
    "rollout.sampling": ("{presence_penalty: .nan}", "{temperature: .inf}"),
    "rollout.importance_cap": (".nan", ".inf"),
    "loss.epsilon_high": (".nan",),
    "loss.sapo_temperature_pos": (".inf",),
    "loss.vespo_k_pos": (".nan",),
    "loss.entropy_target": (".nan",),
    "watch.truncated": ("{share: .nan}",),
    "train.seed": (str(2**64), str(-(2**70))),
    "task.eval_seed": (str(2**64),),
    "rollout.max_num_seqs": (str(10**30),),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in KEYS.items() for value in values])
def test_a_number_that_no_run_can_have(tmp_path, key, value):
    with pytest.raises(ConfigError):
        load(tmp_path, BASE, [f"--{key}", value])


def test_no_bound_is_infinity(tmp_path):
    config = load(tmp_path, BASE, ["--train.max_grad_norm", ".inf", "--loss.epsilon_high", ".inf"])
    assert config.train.max_grad_norm == config.loss.epsilon_high == float("inf")


def test_the_number_is_named():
    tree = yaml.safe_load(BASE) | {"rewards": [{"function": "score_answer", "weight": float("nan")}]}
    with pytest.raises(ConfigError, match=r"rewards\.0\.weight = nan: must be a finite number"):
        build_config(tree)


def test_arguments_of_a_function_are_its_own(tmp_path):
    assert load(tmp_path, BASE, ["--rewards.0.parameters", "{limit: .inf}"]).rewards[0].parameters["limit"] > 1e300
