import pytest

from longgrpo.config.overrides import parse_overrides
from longgrpo.config.run import build_config, dump_config, load_config
from longgrpo.errors import ConfigError
from testing import ROOT
from testing.commands import write_config


@pytest.fixture
def path(tree, tmp_path):
    return write_config(tree, tmp_path / "mine.yaml")


def test_what_is_printed_reads_back_the_same(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_example_is_valid():
    config = load_config(ROOT / "examples" / "smollm2-sums.yaml")
    assert config.train.learning_rate == 1e-3
    assert config.loss.loss_type == "dapo"
    assert [reward.function for reward in config.rewards] == ["exact_answer"]


def test_overrides_reach_groups_lists_and_absent_groups(path):
    config = load_config(
        path, ["--train.steps", "7", "--rewards.0.weight=0.5", "--loss.beta", "1e-2", "--train.betas", "[0.8, 0.9]"]
    )
    assert (config.train.steps, config.rewards[0].weight, config.loss.beta) == (7, 0.5, 0.01)
    assert config.train.betas == (0.8, 0.9)


def test_a_null_lora_means_full_fine_tuning(path):
    assert load_config(path, ["--lora", "null"]).lora is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (["--train.stepz", "5"], ["mine.yaml", "'train.stepz'", "did you mean 'steps'"]),
        (["--rewards.0.wieght", "5"], ["'rewards.0.wieght'", "did you mean 'weight'"]),
        (["--loss.bet", "5"], ["'loss.bet'", "did you mean 'beta'"]),
        (["--lora.rnak", "5"], ["'lora.rnak'", "did you mean 'rank'"]),
        (["--traim", "{}"], ["'traim'", "did you mean 'train'"]),
        (["--train.zzz", "5"], ["known keys are steps"]),
        (["--train.steps", "many"], ["train.steps = 'many'", "integer"]),
        (["--train.steps", "0"], ["steps = 0", "at least 1"]),
        (["--train.learning_rate", "-1"], ["learning_rate = -1", "above 0"]),
        (["--rollout.num_generations", "1"], ["num_generations = 1", "take 8"]),
        (["--rollout.temperature", "0"], ["temperature = 0", "above 0"]),
        (["--rewards", "[]"], ["rewards is empty"]),
        (["--loss.loss_type", "ppo"], ["loss: unknown loss_type 'ppo'", "dapo"]),
        (
            ["--train.off_policy_threshold", "-1", "--train.num_iterations", "2"],
            ["off_policy_threshold = -1", "0 nats or more"],
        ),
        (
            ["--loss.beta", "1", "--loss.kl", "exact_reverse", "--rollout.sampling", "{top_p: 0.9}"],
            ["loss.kl = 'exact_reverse'", "rollout.sampling cuts", "k3"],
        ),
        (
            ["--loss.beta", "1", "--loss.kl", "exact_reverse", "--loss.function", "mine.py:loss"],
            ["loss.kl = 'exact_reverse' has none", "k3"],
        ),
        (["--train.off_policy_threshold", "1"], ["train.off_policy_threshold", "train.minibatches = 1"]),
        (["--train.reference_sync_steps", "5"], ["loss.beta is 0", "set loss.beta above 0"]),
        (
            ["--loss.detach", "false", "--train.num_iterations", "2"],
            ["loss.detach = false", "train.num_iterations and"],
        ),
        (["--train.minibatches", "9"], ["minibatches = 9", "prompts_per_step = 3"]),
        (["--train.top_entropy_quantile", "0"], ["top_entropy_quantile = 0", "(0, 1]"]),
        (["--rewards.0.timeout", "0"], ["timeout = 0", "above 0"]),
        (["--rewards.3.weight", "1"], ["a list of 1"]),
        (["--train.steps"], ["needs a value"]),
        (["steps", "5"], ["'steps'", "--train.steps 5"]),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(path, override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(path, override)
    for part in expected:
        assert part in str(error.value)


def test_a_missing_group_is_named(tree):
    del tree["task"]
    with pytest.raises(ConfigError, match="'task' is missing"):
        build_config(tree)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(tmp_path / "list.yaml")


def test_override_values_are_yaml():
    assert parse_overrides(["--a.b=[1, 2]", "--c", "null", "--d", "-3"]) == [("a.b", [1, 2]), ("c", None), ("d", -3)]
