"""Attention by groups of heads against the whole."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo.config.model import LoraConfig
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.model.grouped_attention import FAMILIES, check_family, group_attention
from longgrpo.model.lean_lora import use_lean_lora
from longgrpo.model.lora import add_lora
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from longgrpo.model.tiled_mlp import tile_mlp, tile_norms
from longgrpo.offload import OffloadEngine
from testing.models import random_model, trainable_parameters

PAD = {"pad_token_id": 0}  # Phi-3's own is beyond this vocabulary


def batch_of(groups):
    """Of each group a prefix and the sequences that go on from it, by their lengths."""
    lengths, prefix, positions = [], [], []
    for first, rest in groups:
        before = len(prefix)
        prefix += [-1] + [before] * len(rest)
        lengths += [first, *rest]
        positions += [*range(first), *(first + i for n in rest for i in range(n))]
    ids = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return pack_sequences(ids, torch.tensor(positions), [0, *accumulate(lengths)], prefix)


def run(model, batch):
    """Hidden states and the gradients of what is trained."""
    model.zero_grad()
    hidden = packed_hidden(model, batch)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def prepared(model, lora):
    if lora:
        model = add_lora(model, LoraConfig(rank=3), seed=0)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    use_packed_attention(model)
    return use_lean_lora(model) if lora else model


def agree(got, want, tolerance):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
@given(
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3), (12, 3), (5, 5)]),
    group=st.integers(1, 6),
    rows=st.one_of(st.none(), st.integers(1, 50)),
    groups=st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), max_size=3)), min_size=1, max_size=3),
    lora=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_gradients_are_those_of_the_whole(family, heads, group, rows, groups, lora):
    sizes = PAD | {"hidden_size": 60, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model, batch = prepared(random_model(family, **sizes).double(), lora), batch_of(groups)
    want = run(model, batch)
    agree(run(group_attention(model, group, rows), batch), want, 1e-6)  # rotation and norms are fp32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_all_switches_on_equal_none(family, lora):
    """In fp32, within its rounding."""
    model, batch = prepared(random_model(family, **PAD), lora), batch_of([(19, [7, 11]), (30, [])])
    want = run(model, batch)
    with OffloadEngine(min_bytes=0, backend="count") as offload:
        tile_norms(tile_mlp(model, 7), 7)
        offload.install(group_attention(model, 1, 7))
        model.train()
        agree(run(model, batch), want, 1e-4)


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text"])
def test_other_families_are_refused_by_name(family):
    with pytest.raises(ValueError, match=f"the architecture '{family}'"):
        check_family(family)


def test_options_that_cannot_have_it():
    tree = {"model": {"path": "m"}, "task": {"name": "chain_sum"}, "rewards": [{"function": "score_answer"}]}
    with pytest.raises(ConfigError, match="saves memory in a layer that is recomputed"):
        build_config(tree | {"memory": {"attention_heads": 1}})
    with pytest.raises(ConfigError, match="attention_heads = 0"):
        build_config(tree | {"memory": {"attention_heads": 0, "checkpoint": True}})
    with pytest.raises(ConfigError, match=r"rollout.bitwise cannot be with memory.attention_heads"):
        build_config(tree | {"rollout": {"bitwise": True}, "memory": {"attention_heads": 1, "checkpoint": True}})
