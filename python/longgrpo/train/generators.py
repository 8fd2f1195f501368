"""The global random generators: the steps draw from none, a user's reward function may."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def random_states() -> dict[str, Any]:
    """Their states as plain values."""
    version, keys, gauss = random.getstate()
    name, array, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, numpy.asarray(array).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()],
    }


def set_random_states(states: dict[str, Any]) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    cuda = states["cuda"][: torch.cuda.device_count()]
    torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in cuda])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What draws from them in the block leaves them as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
