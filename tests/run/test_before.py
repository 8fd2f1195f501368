"""What is tried before step 1 leaves no trace on the run."""

from __future__ import annotations

import random

import numpy
import torch

from longgrpo.run.before import rehearsed
from longgrpo.train.generators import random_states


class Draws:
    """A forecast whose rehearsal draws from every global generator, as an engine may."""

    def rehearse(self, loop):
        return {"rollout": (int(1e9 * random.random()), int(1e9 * (torch.rand(()) + numpy.random.rand())))}


def test_a_rehearsal_leaves_the_generators_as_they_were():
    """A resumed run rehearses again, after its generators are restored."""
    states = random_states()
    metrics = rehearsed(Draws(), None, lambda text: None)
    assert metrics.keys() == {"predicted_bytes/rollout", "measured_bytes/rollout"}
    assert random_states() == states
