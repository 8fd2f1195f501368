from pathlib import Path

LONG_FILES = ("train", "rollout", "memory")


def pytest_collection_modifyitems(items):
    """The folders with the longest files come first: processes that take file after file then end together."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] not in LONG_FILES)
