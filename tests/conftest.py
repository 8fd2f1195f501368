from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import installed
import pytest
import torch

from testing import OWN_REWARDS

LONG = ("run", "train", "rollout", "tasks", "checks", "memory", "report")

if not torch.cuda.is_available():  # where there is a GPU, the CPU's threads compute oracles
    # The tensors are tiny: a team of threads would only wait for each other, and long on a busy machine.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_configure():
    if problem := installed.problem(installed.imported()):
        raise pytest.UsageError(f"these tests would not test this tree. {problem}")
    # What nohup and a shell's & have made deaf, tests and the processes that they start hear again.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    """The folders with the longest files come first: processes that take file after file then end together."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] not in LONG)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model small enough to train in milliseconds, on disk."""
    from testing.models import write_tiny_llama

    options = {"intermediate_size": 64, "initializer_range": 0.02, "tie_word_embeddings": True}
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), **options)


@pytest.fixture
def tree(base_tree: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(base_tree)


@pytest.fixture(scope="session")
def base_tree(tiny_model: Path) -> dict[str, Any]:
    """A config as YAML gives it: every completion's letter count is its reward, so that groups have spread."""
    return {
        "model": {"path": str(tiny_model)},
        "lora": {"rank": 4, "alpha": 4},
        "task": {
            "name": "chain_sum",
            "parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "eval_n": 8,
            "eval_reward": "score_answer",
        },
        "rewards": [{"function": f"{OWN_REWARDS}:digits"}],
        "rollout": {"engine": "transformers", "num_generations": 4, "max_completion_length": 6},
        "train": {"steps": 4, "prompts_per_step": 3, "learning_rate": 1e-2, "probe_prompts": 2, "save_steps": 2},
    }
