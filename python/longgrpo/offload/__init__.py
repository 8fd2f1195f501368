"""Activation offload: the inputs of checkpointed layers wait in host memory for their backward."""

from longgrpo.offload.engine import OffloadEngine

__all__ = ["OffloadEngine"]
