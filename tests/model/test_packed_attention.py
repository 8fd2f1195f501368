from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longgrpo.config.model import LoraConfig
from longgrpo.model.load import backbone
from longgrpo.model.lora import add_lora
from longgrpo.model.packed_attention import pack_sequences, packed_hidden, use_packed_attention
from testing.models import random_model, trainable_parameters

ARCHITECTURES = ["llama", "qwen2", "qwen3"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def pack(rows, device="cpu"):
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return pack_sequences(ids, positions, [0, *accumulate(map(len, rows))]).to(torch.device(device))


def random_rows(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, rows):
    """The oracle: transformers' plain attention, a sequence at a time."""
    model.set_attn_implementation("eager")
    return torch.cat([backbone(model)(torch.tensor([row])).last_hidden_state[0] for row in rows])


def gradients(model, hidden):
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=10, deadline=None)
def test_a_packed_sequence_is_what_it_is_alone(architecture, lengths):
    model = random_model(architecture).double()
    rows = random_rows(lengths)
    expected = one_by_one(model, rows)
    expected_gradients = gradients(model, expected)
    use_packed_attention(model)
    hidden = packed_hidden(model, pack(rows))
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)  # rotary angles and norms are fp32
    for name, gradient in gradients(model, hidden).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(groups=st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), max_size=4)), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_sequences_that_share_a_prefix_are_what_they_are_alone(architecture, groups):
    """groups: the length of a prefix, and those of the sequences that go on from it."""
    model = random_model(architecture).double()
    rows = random_rows([n for first, rest in groups for n in (first, *rest)])
    prefix, positions, whole, kept = [], [], [], []
    remaining = iter(rows)
    for first, rest in groups:
        head, before = next(remaining), len(prefix)
        for tokens in [[], *(next(remaining) for _ in rest)]:
            prefix.append(before if tokens else -1)
            positions += range(first, first + len(tokens)) if tokens else range(first)
            whole.append(head + tokens)
            kept += [not tokens] * first + [True] * len(tokens)
    expected = one_by_one(model, whole)[kept]
    expected_gradients = gradients(model, expected)
    use_packed_attention(model)
    ids = torch.tensor([token for row in rows for token in row])
    batch = pack_sequences(ids, torch.tensor(positions), [0, *accumulate(map(len, rows))], prefix)
    hidden = packed_hidden(model, batch)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, hidden).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_and_gradient_checkpointing(checkpointing):
    model = add_lora(random_model("llama"), LoraConfig(rank=4), seed=0).double()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    rows = random_rows([7, 1, 30, 12])
    expected = gradients(model, one_by_one(model.get_base_model(), rows))
    use_packed_attention(model)
    model.train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    actual = gradients(model, packed_hidden(model, pack(rows)))
    assert actual.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_no_tensor_grows_with_the_square_of_the_row():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    model = random_model("llama")
    use_packed_attention(model)
    batch = pack(random_rows([64] * 32))  # 2,048 tokens
    with Largest() as largest:
        packed_hidden(model, batch).sum().backward()
    assert 0 < largest.numel <= 2048 * 48  # tokens x intermediate


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device):
    model = random_model("qwen3")
    rows = random_rows([33, 2, 65])
    expected = one_by_one(model, rows)
    model.to(device, torch.bfloat16)
    use_packed_attention(model)
    hidden = packed_hidden(model, pack(rows, device))
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float().cpu() - expected).abs().mean() < 0.03


def test_misuse_is_refused():
    model = random_model("llama")
    batch = pack(random_rows([3, 4]))
    with pytest.raises(ValueError, match="use_packed_attention"):
        packed_hidden(model, batch)
    use_packed_attention(model)
    with pytest.raises(ValueError, match="packed_hidden"):
        model(torch.tensor([[1, 2, 3]]))
    windowed = random_model("mistral", sliding_window=4)
    use_packed_attention(windowed)
    packed_hidden(windowed, batch)
    with pytest.raises(NotImplementedError, match="sliding window of 4 under a sequence of 5"):
        packed_hidden(windowed, pack(random_rows([3, 5])))


EXPERTS = dict(num_experts=4, num_local_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
DELTA_NET = dict(
    num_hidden_layers=4,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8)
FAMILIES = {
    **{name: {} for name in ("llama", "qwen2", "phi3", "mistral", "granite", "smollm3", "olmo2", "gemma3_text")},
    "qwen3_moe": EXPERTS,
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": DELTA_NET | EXPERTS,
    "mamba": {},
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "granitemoehybrid": MAMBA
    | dict(layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=32),
    "recurrent_gemma": dict(lru_width=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_its_layers_are_a_packed_sequence_is_what_it_is_alone(family):
    model = random_model(family, **{"pad_token_id": 0} | FAMILIES[family]).eval()
    prompt, *others = rows = random_rows([9, 14, 3])
    prefixed = [prompt, *(prompt + row for row in others)]
    expected = one_by_one(model, rows)
    whole = one_by_one(model, prefixed).split([len(row) for row in prefixed])
    use_packed_attention(model)
    torch.testing.assert_close(packed_hidden(model, pack(rows)), expected, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat((torch.arange(9), torch.arange(9, 23), torch.arange(9, 12)))
    shared = packed_hidden(model, pack_sequences(ids, positions, [0, 9, 23, 26], [-1, 0, 0]))
    torch.testing.assert_close(shared, torch.cat([whole[0], whole[1][9:], whole[2][9:]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "message"), [("gpt_oss", "sinks"), ("bloom", "attention of its own")])
def test_an_attention_that_cannot_be_replaced_is_refused_at_once(family, message):
    model = random_model(family, **EXPERTS | {"pad_token_id": 0})
    with pytest.raises(NotImplementedError, match=message):
        use_packed_attention(model)
