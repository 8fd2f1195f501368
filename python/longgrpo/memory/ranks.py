"""What several ranks change in a plan, and what they send each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from longgrpo.memory.shape import ModelShape
from longgrpo.model.masters import BUCKET, balanced

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig

FP32 = 4
BANDWIDTH = 25.0  # GB/s between ranks: what PCIe 4.0 x16 leaves of its 32


class Layout(NamedTuple):
    """The ranks of a run: on each of `machines` as many."""

    machines: int = 1
    each: int = 1

    @property
    def ranks(self) -> int:
        return self.machines * self.each

    @classmethod
    def of(cls, text: str) -> Layout:
        """ "8", or "2x8": machines and the ranks on each. Raises ValueError for anything else."""
        machines, _, each = text.rpartition("x")
        try:
            found = cls(int(machines or 1), int(each))
        except ValueError:
            found = cls(0, 0)
        if min(found) < 1:
            raise ValueError(f"--ranks {text}: give a number, such as 8, or machines x ranks, such as 2x8")
        return found


ONE = Layout()


def tensors_of(shape: ModelShape) -> list[int]:
    """Elements of the model's parameters, tensor by tensor; its norms and biases as one."""
    table = shape.vocabulary * shape.hidden
    linears = [linear.inputs * linear.outputs for linear in shape.linears]
    return [table] * (shape.embeddings // table) + linears * shape.layers + [shape.other_weights]


def owned(shape: ModelShape, ranks: int) -> int:
    """Elements whose masters and moments the fullest rank has in full fine-tuning."""
    sizes = tensors_of(shape)
    owners = balanced(sizes, ranks)
    return max(sum(size for size, rank in zip(sizes, owners, strict=True) if rank == one) for one in range(ranks))


def sum_buffer(trained: int, largest: int) -> int:
    """Bytes of the gradient that one collective moves."""
    return min(FP32 * trained, max(BUCKET, FP32 * largest))


def sent(config: TrainConfig, element: int, trained: int, ranks: int, backwards: int = 1) -> int:
    """Bytes that a rank sends for an update, in rings. Of an adapter the gradient goes around twice, but for the own
    part; in full fine-tuning it goes to the owners (with memory.shard_gradients after each of its `backwards`), and the
    weights come from them."""
    if config.lora:
        return 2 * FP32 * trained * (ranks - 1) // ranks
    gradients = backwards if config.memory.shard_gradients else 1
    return (FP32 * gradients + element) * trained if ranks > 1 else 0
