import pytest

from testing.compiled import ROOT, build, load
from testing.offload import SCHEDULES, PoisonedEngine


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:offload. a saved tensor of shape:UserWarning")


@pytest.fixture(scope="session")
def native():
    """The torch-free core as a Python module; see tests/native/offload/module.cpp."""
    folder = ROOT / "build" / "native" / "offload"
    return load(build(ROOT / "tests" / "native" / "offload", folder, "-DCMAKE_BUILD_TYPE=Release"))


@pytest.fixture(params=SCHEDULES)
def engine(request):
    with PoisonedEngine(request.param) as made:
        yield made
