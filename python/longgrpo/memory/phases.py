"""What a plan is made of: the peak of each phase, term by term."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Rows(NamedTuple):
    """The longest micro-batch."""

    tokens: int  # N
    attention: int  # K
    loss: int  # M
    longest: int  # tokens of its longest sequence


@dataclass(frozen=True)
class Phase:
    """terms: what lives on the device at the phase's peak; host_terms: in host memory. Bytes."""

    name: str
    terms: dict[str, int]
    host_terms: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host_terms.values())


@dataclass(frozen=True)
class Plan:
    rollout: Phase
    scoring: Phase
    training: Phase
    rows: Rows

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        return self.rollout, self.scoring, self.training

    @property
    def device_bytes(self) -> int:
        return max(phase.device_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        return max(phase.host_bytes for phase in self.phases)
