"""The loss of a run: the library's, or one of the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from longgrpo.loss.config import GRPOLossConfig


@dataclass(frozen=True)
class LossConfig(GRPOLossConfig):
    """The loss. The formulas and their sources are in csrc/math/token_loss.h."""

    function: str | None = None
    """A loss of your own (path/to/file.py:function, package.module:function) instead of loss_type's. It takes a
    longgrpo.loss.LossInputs and returns a scalar and a dict of metrics. loss_type then only sets what the normalizer
    counts, beta only whether there is a reference policy, and the function itself applies rollout.importance
    (docs/own-loss.md)."""
