import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch

STARTED = time.monotonic()
torch.backends.cuda.matmul.allow_tf32 = False  # whatever the environment says: the bounds are those of fp32

if importlib.util.find_spec("hypothesis") is None:  # a rented machine has what it has
    sys.path.append(str(Path(__file__).parent / "stand_in"))


@pytest.fixture(autouse=True)
def in_time():
    """After so many seconds, which bench/gpu.py sets, the tests that are left are skipped."""
    if time.monotonic() - STARTED > float(os.environ.get("LONGGRPO_GPU_SECONDS", "inf")):
        pytest.skip("no time is left")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name.startswith("test_large_head"))  # the longest come last, and may be cut off
    if not torch.cuda.is_available() and "LONGGRPO_GPU_TESTS_ON" not in os.environ:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
