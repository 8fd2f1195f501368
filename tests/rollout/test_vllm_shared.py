"""A canary for each private name of vLLM that longgrpo.rollout.vllm_shared and vllm_cache touch, on an engine with its
own operators: in a version that moved one, the name stands in the failure."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from longgrpo._ops import fixed
from longgrpo.rollout import vllm_private, vllm_shared
from testing.engines import PROMPTS, RANDOM, running, sample, write_model

pytest.importorskip("vllm")

HEADS, KEY_HEADS, SIZE = 4, 2, 32  # of the model
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_model("llama", directory)
    with running(directory) as (engine, _):
        yield engine


@pytest.fixture(scope="module")
def module(engine):
    return vllm_private.engine_module(engine.llm)


@pytest.fixture
def attention(module):
    return module.get_submodule(f"{LAYER}.self_attn.attn")


def parameters(function):
    return list(inspect.signature(function).parameters)


def spied(monkeypatch, owner, name):
    """The calls of owner.name, which go on to it."""
    calls, whole = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: (calls.append((args, kw)), whole(*args, **kw))[1])
    return calls


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "mlp.act_fn"])
def test_the_method_of_a_custom_op_is_what_its_forward_calls(engine, module, name, monkeypatch):
    """share_operators sets _forward_method; a norm is called with x and the residual, a gate with [T, 2 I]."""
    operator = module.get_submodule(f"{LAYER}.{name}")
    calls = spied(monkeypatch, operator, "_forward_method")
    sample(engine)
    assert calls
    for args, kw in calls:
        assert not kw
        assert [x.shape[-1] for x in args] in ([[2 * 192]] if name == "mlp.act_fn" else [[128], [128, 128]])


def test_names_of_the_classes(module):
    found = {
        type(operator).__name__ for name, operator in vllm_private.operators(module).items() if "rotary" not in name
    }
    assert found == {
        "VocabParallelEmbedding", "RMSNorm", "QKVParallelLinear", "Attention", "RowParallelLinear",
        "MergedColumnParallelLinear", "SiluAndMul",
    }  # fmt: skip


def test_the_rotation_is_an_attribute_of_each_attention_and_one_module(engine, module, monkeypatch):
    """It is replaced layer by layer, and called with positions [T], queries and keys [T, heads D]."""
    owners = [module.get_submodule(f"model.layers.{i}.self_attn") for i in range(2)]
    assert owners[0].rotary_emb is owners[1].rotary_emb
    calls = spied(monkeypatch, owners[0].rotary_emb, "forward")
    sample(engine)
    args, kw = calls[0]
    assert not kw
    assert [x.shape[1:] for x in args] == [(), (HEADS * SIZE,), (KEY_HEADS * SIZE,)]


def test_the_attention_of_a_layer(engine, attention, monkeypatch):
    """Its two methods are replaced; what they are called with, and the fields of the metadata."""
    impl = attention.impl
    assert parameters(impl.forward)[:7] == [
        "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"
    ]  # fmt: skip
    assert parameters(impl.do_kv_cache_update) == ["layer", "key", "value", "kv_cache", "slot_mapping"]
    assert (impl.scale, impl.sliding_window) == (SIZE**-0.5, -1)
    # Of what is refused, nothing: a name that is gone would let it through.
    assert [getattr(impl, name) for name in vllm_shared.NOT_SHARED] == [None, 0, None, None]
    calls, writes = spied(monkeypatch, impl, "forward"), spied(monkeypatch, impl, "do_kv_cache_update")
    sample(engine)
    (layer, query, key, _, cache, metadata), kw = calls[0]
    output = kw.pop("output")
    assert layer is attention
    assert (query.shape[1:], key.shape[1:], output.shape[1:]) == ((HEADS, SIZE), (KEY_HEADS, SIZE), (HEADS, SIZE))
    assert cache.shape[1:] == (KEY_HEADS, vllm_shared.PAGE, 2 * SIZE)
    assert metadata.causal
    fields = {field.name for field in dataclasses.fields(metadata)}
    assert fields >= {"num_actual_tokens", "query_start_loc", "seq_lens", "block_table"}
    for tensor in (metadata.query_start_loc, metadata.seq_lens, metadata.block_table):
        assert tensor.dtype == torch.int32
    assert not set(kw) - {"output_scale", "output_block_scale"}
    assert all(value is None for value in kw.values())
    (_, key, value, cache, slots), kw = writes[0]
    assert not kw
    assert key.shape[1:] == value.shape[1:] == (KEY_HEADS, SIZE)
    assert len(slots) <= len(key)


@pytest.mark.parametrize("name", ["alibi_slopes", "logits_soft_cap", "sinks", "kv_sharing_target_layer_name"])
def test_an_attention_that_has_more_is_refused_by_name(attention, name):
    impl = SimpleNamespace(**{n: getattr(attention.impl, n) for n in (*vllm_shared.NOT_SHARED, "scale")})
    setattr(impl, name, {"logits_soft_cap": 30.0, "kv_sharing_target_layer_name": "other"}.get(name, torch.ones(4)))
    with pytest.raises(NotImplementedError, match=f"the engine's layer has {name}, which is not shared"):
        vllm_shared._check_attention("layer", impl)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not fixed.has_bf16(), reason="no bf16"))],
)
def test_the_cache_has_queries_attend_to_the_same_keys_as_the_engines_own(attention, dtype):
    """The engine's own write and read of a cache, against those that take their place: its layout, of which vLLM says
    nothing in public, and the metadata's fields."""
    lengths = [70, 33]
    count, pages = sum(lengths), [[4, 2, 7], [1, 3, 0]]
    query, key, value = (torch.randn(count, heads, SIZE).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    slots = torch.tensor([pages[s][i // 32] * 32 + i % 32 for s, n in enumerate(lengths) for i in range(n)])
    cache = torch.zeros(8, KEY_HEADS, vllm_shared.PAGE, 2 * SIZE, dtype=dtype)
    vllm_shared._write_cache(attention, key, value, cache, slots)
    kept = [torch.cat([half[page] for page in pages[0]])[:70] for half in vllm_shared._pages(cache)]
    assert torch.equal(kept[0], key[:70])
    assert torch.equal(kept[1], value[:70])
    metadata = SimpleNamespace(
        num_actual_tokens=count, query_start_loc=torch.tensor([0, 70, count], dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32), block_table=torch.tensor(pages, dtype=torch.int32),
    )  # fmt: skip
    out = torch.empty(count + 2, HEADS, SIZE, dtype=dtype)
    padded = torch.cat((query, query[:2]))
    vllm_shared._attend(SIZE**-0.5, 0, attention, padded, key, value, cache, metadata, out)
    for begin, end in ((0, 70), (70, count)):
        rows = (x[begin:end].transpose(0, 1)[None].double() for x in (query, key, value))
        exact = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        bound = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[begin:end].double(), exact[0].transpose(0, 1), rtol=0, atol=bound)
    assert vllm_shared._attend(1.0, 0, attention, padded, key, value, cache, None, out) is out


def test_the_heads_linear_and_the_temperature_of_the_sampler(engine, module, monkeypatch):
    """_share_head sets the linear of embedding and head, and reads metadata.temperature; greedy below GREEDY."""
    from vllm.v1.sample import sampler

    heads = [m for m in module.modules() if vllm_private.is_head(m)]
    assert len(heads) == 2
    assert all(vars(head)["cpu_linear"] is vllm_private.plain_linear for head in heads)
    assert sampler._SAMPLING_EPS == vllm_shared.GREEDY
    calls = spied(monkeypatch, vllm_private.sampler_of(engine.llm), "sample")
    sample(engine)
    logits, metadata = calls[0][0][:2]
    assert logits.shape[1] >= 1000
    assert metadata.temperature.tolist() == [1.0] * len(logits)
    greedy = dataclasses.replace(RANDOM, temperature=0.0)
    calls.clear()
    engine.generate(PROMPTS, greedy, range(len(PROMPTS)))
    assert calls[0][0][1].temperature is None


def test_the_layers_whose_cache_has_scales(engine, attention):
    """calibrate_kv_cache finds them in the context of the forward, and sets both forms of a scale."""
    layers = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert layers[f"{LAYER}.self_attn.attn"] is attention
    assert len(layers) == 2
    for which in ("k", "v"):
        assert getattr(attention, f"_{which}_scale_float") == 1.0
        assert getattr(attention, f"_{which}_scale").item() == 1.0
