import pytest

from testing.compiled import ROOT, build, load


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:offload. a saved tensor of shape:UserWarning")


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are tiny; a team of threads would only wait for each other."""
    set_threads(1)


@pytest.fixture(scope="session")
def native():
    """The torch-free core as a Python module; see tests/native/offload/module.cpp."""
    folder = ROOT / "build" / "native" / "offload"
    return load(build(ROOT / "tests" / "native" / "offload", folder, "-DCMAKE_BUILD_TYPE=Release"))
