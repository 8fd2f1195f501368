"""Offload under transformers and PEFT models. The oracle is plain gradient checkpointing, bit for bit."""

import pytest
import torch

from testing.models import random_model
from testing.offload import PoisonedEngine

LAYERS, TOKENS, HIDDEN = 4, 40, 32


def make_model(attention="sdpa", **config):
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    return random_model("llama", attn_implementation=attention, **sizes, **config).train()


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def step(model, accumulate=1):
    torch.manual_seed(2)
    for _ in range(accumulate):
        ids = torch.randint(0, 64, (2, TOKENS))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(params=["threaded", "lazy", "seeded:3"])
def engine(request):
    return PoisonedEngine(request.param, host_bytes=1 << 24)


def plain(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return step(model, 2)


def packed(wrap):
    """PEFT makes the embedding's output a leaf that requires grad: autograd itself holds it on the device."""
    return LAYERS - (wrap is lora)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
def test_install(engine, wrap):
    model = wrap(make_model())
    want = plain(model)
    assert engine.install(model) is model
    assert same(step(model, 2), want)
    assert same(step(model, 2), want)
    stats = engine.stats()
    assert stats["packs"] == 4 * packed(wrap)
    assert stats["misses"] == 0
    assert stats["device_peak"] <= 5 * 2 * TOKENS * HIDDEN * 4
    engine.synchronize()
    assert engine.stats()["host_live"] == 0


def test_hooks_around_a_model(engine):
    model = make_model()
    want = plain(model)
    with engine.hooks():
        assert same(step(model, 2), want)
    assert engine.stats()["packs"] > 2 * LAYERS


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
def test_selective_skips_the_attention_recompute(engine, wrap, monkeypatch):
    model = wrap(make_model())
    want = plain(model)
    ran = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "flash_attention_for_cpu" in str(func) and "backward" not in str(func):
                ran.append(1)
            return func(*args, **(kwargs or {}))

    with Count():
        assert same(plain(model), want)
        assert len(ran) == 2 * 2 * LAYERS
        ran.clear()
        engine.install(model, selective=True)
        assert same(step(model, 2), want)
    assert len(ran) == 2 * LAYERS
    # The layer's input, attention's output and its log-sum-exp.
    assert engine.stats()["packs"] == 2 * (2 * LAYERS + packed(wrap))
    assert engine.stats()["misses"] == 0
    engine.synchronize()
    assert engine.stats()["host_live"] == 0


def test_selective_twice_through_one_graph(engine):
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(TOKENS)[None]

    def twice():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return gradients

    want = twice()
    engine.install(model, selective=True)
    assert same(twice(), want)


def test_selective_says_where_it_does_not_apply(engine):
    model = make_model("eager")
    want = plain(model)
    engine.install(model, selective=True)
    with pytest.warns(UserWarning, match="found no attention op to skip.*sdpa"):
        assert same(step(model, 2), want)


def test_selective_leaves_attention_with_dropout_alone(engine):
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def attend(q):
        return torch.nn.functional.scaled_dot_product_attention(q * 1, q, q, dropout_p=0.5)

    with pytest.warns(UserWarning, match="without dropout"):
        engine.checkpoint(attend, q * 1.0, selective=True).sum().backward()


def test_install_needs_a_transformers_model(engine):
    with pytest.raises(TypeError, match=r"engine\.checkpoint"):
        engine.install(torch.nn.Linear(2, 2))


def test_one_engine_for_two_models(engine):
    first, second = make_model(), make_model(rope_theta=500.0)
    want = plain(first), plain(second)
    engine.install(first), engine.install(second)
    assert same(step(first, 2), want[0])
    assert same(step(second, 2), want[1])


@pytest.mark.parametrize("form", ["function", "module", "in place", "a part"])
def test_selective_says_that_a_compiled_layer_runs_eagerly(engine, form):
    layer = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.ReLU())
    if form == "in place":
        layer.compile(backend="eager")
    if form == "a part":
        layer[0] = torch.compile(layer[0], backend="eager")
    fn = torch.compile(layer if form == "module" else layer.forward, backend="eager")
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    with pytest.warns(UserWarning, match="runs eagerly in a selective checkpoint"):
        engine.checkpoint(fn if form in ("function", "module") else layer, hidden, selective=True)
