from pathlib import Path

import installed
import pytest
import torch

LONG_FILES = ("train", "rollout", "memory")


def pytest_configure():
    if problem := installed.problem(installed.imported()):
        raise pytest.UsageError(f"these tests would not test this tree. {problem}")


def pytest_collection_modifyitems(items):
    """The folders with the longest files come first: processes that take file after file then end together."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] not in LONG_FILES)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
