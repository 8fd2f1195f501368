"""float16 ends at 65504 and holds nothing below 6e-8, where the gradients of a loss over many tokens lie on their way
through the layers: its loss is multiplied for the backward, and the float32 gradients are divided again (Micikevicius
et al., Mixed Precision Training, 2018). Each update tries the scales again, so there is no state to resume."""

from __future__ import annotations


def loss_scales(dtype: str) -> tuple[float, ...]:
    """What to try for a model in `dtype`, the largest first. Powers of two, which round nothing."""
    return (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if dtype == "float16" else (1.0,)
