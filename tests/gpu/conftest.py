import importlib.util
import sys
from pathlib import Path

import pytest
import torch

torch.backends.cuda.matmul.allow_tf32 = False  # whatever the environment says: the bounds are those of fp32

if importlib.util.find_spec("hypothesis") is None:  # a rented machine has what it has
    sys.path.append(str(Path(__file__).parent / "stand_in"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
