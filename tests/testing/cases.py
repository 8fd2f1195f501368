"""Random inputs for the loss, and the comparison that all its tests use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from longgrpo import GRPOLossConfig, LossTokens, OffPolicyCorrection
from longgrpo.loss import reference
from longgrpo.loss.types import CORRECTIONS, KL_ESTIMATORS, LOSS_TYPES, loss_type

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Head:
    """Head inputs, flat: hidden [N, H], weight [V, H], target [N], bias [V]."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def options(self) -> dict:
        return {
            "bias": self.bias, "temperature": self.temperature, "softcap": self.softcap, "logit_scale": self.logit_scale
        }  # fmt: skip

    def cast(self, dtype: torch.dtype, *, train_head: bool) -> Head:
        """A copy in another dtype that asks for gradients: the oracle gets the very values that the op got."""
        temperature = self.temperature
        return replace(
            self,
            hidden=self.hidden.detach().to(dtype).requires_grad_(),
            weight=self.weight.detach().to(dtype).requires_grad_(train_head),
            bias=None if self.bias is None else self.bias.detach().to(dtype).requires_grad_(train_head),
            temperature=temperature.double()
            if dtype == torch.float64 and isinstance(temperature, Tensor)
            else temperature,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def rows(self) -> Tensor:
        return reference.log_softmax_rows(self.hidden, self.weight, **self.options)

    def logprob(self) -> tuple[Tensor, Tensor]:
        return reference.logprob_and_entropy(self.rows(), self.target)


def make_head(
    seed: int, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, bias: bool = False,
    temperature: float | None = 1.0, softcap: float | None = None, logit_scale: float = 1.0, ignored: float = 0.0,
    spread: float = 2.0,
) -> Head:  # fmt: skip
    """spread: standard deviation of the logits. temperature None: one for each token."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocabulary, (tokens,), generator=g)
    target[torch.rand(tokens, generator=g) < ignored] = -100
    token_temperature = torch.rand(tokens, generator=g) + 0.5
    return Head(
        torch.randn(tokens, hidden, generator=g).to(dtype),
        (torch.randn(vocabulary, hidden, generator=g) * spread / hidden**0.5).to(dtype),
        target,
        torch.randn(vocabulary, generator=g).to(dtype) if bias else None,
        token_temperature if temperature is None else temperature,
        softcap,
        logit_scale,
    )


@st.composite
def heads(draw, max_tokens: int = 40) -> Head:
    return make_head(
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, max_tokens)),
        draw(st.integers(1, 48)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.7, 1.5, None])),
        softcap=draw(st.sampled_from([None, 5.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.25])),
        ignored=draw(st.sampled_from([0.0, 0.4, 1.0])),
        spread=draw(st.sampled_from([0.5, 2.0, 6.0])),
    )


NO_CORRECTION = OffPolicyCorrection()


@dataclass
class Batch:
    """Per-token inputs of the loss over flat sequences. Masked positions hold NaN and inf on purpose."""

    logp: Tensor
    entropy: Tensor
    tokens: LossTokens

    @property
    def advantages(self) -> Tensor:
        return self.tokens.advantages

    @property
    def mask(self) -> Tensor:
        return self.tokens.mask

    @property
    def cu_seqlens(self) -> Tensor:
        return self.tokens.cu_seqlens

    @property
    def old_logp(self) -> Tensor | None:
        return self.tokens.old_logp

    def without(self, *names: str) -> Batch:
        return replace(self, tokens=replace(self.tokens, **dict.fromkeys(names)))

    def masked(self, used: Tensor) -> Batch:
        """Fewer tokens in the loss."""
        return replace(self, tokens=replace(self.tokens, mask=self.mask & used))

    def arguments(self, config: GRPOLossConfig) -> dict:
        """The keyword arguments beside the advantages."""
        values = dict(vars(self.tokens))
        del values["advantages"]
        return values if config.beta else {**values, "ref_logp": None}

    def oracle(
        self, config: GRPOLossConfig, normalizer: float | None = None,
        correction: OffPolicyCorrection = NO_CORRECTION, **overrides,
    ) -> Tensor:  # fmt: skip
        """The reference in float64, or in the dtype of the logp that overrides this batch's."""
        values = {"logp": self.logp.double(), "entropy": self.entropy.double(), **overrides}
        dtype = values["logp"].dtype
        tokens = LossTokens(**{
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in vars(self.tokens).items()
        })  # fmt: skip
        return reference.grpo_loss(
            values["logp"], tokens, entropy=values["entropy"], exact=values.get("exact"), normalizer=normalizer,
            correction=correction, config=config,
        )  # fmt: skip


def make_batch(
    seed: int, lengths: list[int], *, masked: float = 0.3, off_policy: float | None = 0.2, importance: bool = False,
    token_advantages: bool = False, zero_advantages: float = 0.2, logp: Tensor | None = None, distance: float = 0.5,
    engine: float | None = None, largest_advantage: float = 1.0,
) -> Batch:  # fmt: skip
    """off_policy: deviation of the log ratio, None for old_logp=None; distance: deviation of ref - logp; engine: that
    of old_logp - sampling_logp, None for sampling_logp=None."""
    g = torch.Generator().manual_seed(seed)
    n, sequences = sum(lengths), len(lengths)
    noise = lambda scale: torch.randn(n, generator=g) * scale  # noqa: E731
    if logp is None:
        logp = -torch.rand(n, generator=g) * 4
    mask = torch.rand(n, generator=g) >= masked
    advantages = torch.randn(n if token_advantages else sequences, generator=g) * largest_advantage
    advantages[torch.rand(advantages.numel(), generator=g) < zero_advantages] = 0
    old = None if off_policy is None else logp.detach() + noise(off_policy)
    ref = logp.detach() + noise(distance)
    sampling = None if engine is None else (logp.detach() if old is None else old) + noise(engine)
    ratio = None
    if importance:
        ratio = noise(0.3).exp()
        ratio[torch.rand(n, generator=g) < 0.2] = 0
    for poisoned in (old, ref, sampling, ratio, advantages if token_advantages else None):
        if poisoned is not None:
            poisoned[~mask] = torch.tensor([float("nan"), float("inf"), -float("inf")])[
                torch.randint(0, 3, (int((~mask).sum()),), generator=g)
            ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(logp, torch.rand(n, generator=g), LossTokens(advantages, mask, bounds, old, ref, sampling, ratio))


@st.composite
def configs(draw) -> GRPOLossConfig:
    """Every combination of the options that makes sense; the others are refused, which test_errors checks."""
    row = loss_type(draw(st.sampled_from(LOSS_TYPES)))
    kl = draw(st.sampled_from([kl for kl in KL_ESTIMATORS if not kl.startswith("exact")]))
    return GRPOLossConfig(
        loss_type=row.name,
        importance_level="token" if row.whole_sequence else draw(st.sampled_from(["token", "sequence"])),
        kl=kl,
        kl_correction=kl == "k3" and draw(st.booleans()),
        beta=draw(st.sampled_from([0.0, 0.04, 1.0])),
        epsilon=draw(st.sampled_from([0.0, 0.2])),
        epsilon_high=5.0 if row.name == "cispo" else draw(st.sampled_from([None, 0.28])),
        delta=draw(st.sampled_from([None, 1.1, 3.0])) if row.ppo_clip else None,
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
        max_completion_length=64,
    )


@st.composite
def batches(draw) -> Batch:
    return make_batch(
        draw(st.integers(0, 2**31)),
        # With as many tokens as sequences an advantage would be read as a sequence's.
        draw(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda x: sum(x) != len(x))),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        off_policy=draw(st.sampled_from([None, 0.05, 0.5])),
        importance=draw(st.booleans()),
        token_advantages=draw(st.booleans()),
        distance=draw(st.sampled_from([0.5, 6.0])),
        engine=draw(st.sampled_from([0.05, 1.0])),
        largest_advantage=draw(st.sampled_from([1.0, 100.0])),
    )


@st.composite
def corrections(draw) -> OffPolicyCorrection:
    return OffPolicyCorrection(
        draw(st.sampled_from(CORRECTIONS)), draw(st.sampled_from([1.2, 2.0])), draw(st.sampled_from([None, 0.1, 3.0]))
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the oracle's; absolute where the oracle is 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    return float(difference / norm if norm > 0 else difference)
