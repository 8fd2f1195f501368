"""One copy of the weights: full fine-tuning and LoRA in each mode, on each layout that the engine gives them."""

import logging
from pathlib import Path

import psutil
import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.model.load import backbone
from longgrpo.model.lora import linear_names
from longgrpo.model.masters import MasterWeights
from longgrpo.rollout import vllm_private
from longgrpo.rollout.adapters import choose_mode
from testing.agreement import assert_agrees, sampled_logprobs, trainer_logprobs
from testing.engines import PROMPTS, change, running, sample, write_model
from testing.models import trainable_parameters

pytest.importorskip("vllm")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """architecture -> its directory and the names of its weights, written when first asked for."""
    made = {}

    def get(architecture):
        if architecture not in made:
            directory = tmp_path_factory.mktemp(architecture)
            made[architecture] = directory, write_model(architecture, directory)
        return made[architecture]

    return get


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def lora_storages(engine):
    return storages(t for pair in vllm_private.lora_slots(engine.llm).values() for t in pair)


# Untied heads, biases, q and k norms, norms by 1 + weight with a scaled and tied embedding, fused projections.
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_fine_tuning_and_merged_lora(architecture, models):
    directory, names = models(architecture)
    with running(directory, LoraConfig(rank=4, mode="merge")) as (engine, model):
        assert engine.lora_mode == "merge"
        change(model)
        assert engine.weights_changed() == 0
        completions = sample(engine)
        assert_agrees(model, PROMPTS, completions)
        with model.disable_adapter():
            base = trainer_logprobs(model, PROMPTS, completions)
        assert (base - sampled_logprobs(completions)).abs().mean() > 1e-2

        whole = model.unload()
        engine.attach(whole)
        assert set(whole.state_dict()) == names
        assert not any(tensor.is_meta for tensor in [*whole.parameters(), *whole.buffers()])
        assert storages(whole.parameters()) == storages(vllm_private.engine_module(engine.llm).parameters())
        change(whole)
        assert engine.weights_changed() == 0
        assert_agrees(whole, PROMPTS, sample(engine))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_on_views_is_never_copied(architecture, models):
    directory, _ = models(architecture)
    with running(directory, LoraConfig(rank=8, alpha=8, mode="views")) as (engine, model):
        assert storages(trainable_parameters(model)) == lora_storages(engine)
        untouched = storages(vllm_private.engine_module(engine.llm).parameters())
        assert storages(backbone(model).parameters()) <= untouched | lora_storages(engine)
        for _ in range(2):
            change(model)
            assert engine.weights_changed() == 0
            completions = sample(engine)
            assert_agrees(model, PROMPTS, completions)
        with model.disable_adapter():
            base = trainer_logprobs(model, PROMPTS, completions)
        assert (base - sampled_logprobs(completions)).abs().mean() > 1e-2
        engine.attach(model.get_base_model())
        assert_agrees(model.unload(), PROMPTS, sample(engine))  # without a request for the adapter


@pytest.mark.parametrize(("rank", "targets"), [(8, "all-linear"), (3, ["q_proj", "v_proj", "down_proj"])])
def test_lora_by_copy_copies_its_own_bytes(rank, targets, models):
    """A scale, a rank below the engine's, and modules without an adapter."""
    directory, _ = models("llama")
    lora = LoraConfig(rank=rank, alpha=2 * rank, targets=targets, mode="copy")
    with running(directory, lora) as (engine, model):
        change(model)
        assert engine.weights_changed() == sum(p.nbytes for p in trainable_parameters(model))
        assert_agrees(model, PROMPTS, sample(engine))
        assert not storages(trainable_parameters(model)) & lora_storages(engine)


def test_bf16_lora_goes_by_views_with_masters(models, caplog):
    """The trainer's adapter is the engine's, bfloat16; what the optimizer steps is float32."""
    directory, _ = models("llama")
    caplog.set_level(logging.INFO)
    with running(directory, LoraConfig(rank=8, alpha=8), dtype="bfloat16") as (engine, model):
        assert engine.lora_mode == "views"
        assert "lora.mode: views (not merge: B A would be rounded away in a base below float32)" in caplog.text
        parameters = dict(model.named_parameters())
        masters = MasterWeights({n: p for n, p in parameters.items() if p.requires_grad})
        assert {p.dtype for p in masters.parameters.values()} == {torch.float32}
        with torch.no_grad():
            for master in masters.parameters.values():
                master.add_(torch.randn(master.shape), alpha=0.1)
        masters.publish()
        assert engine.weights_changed() == 0
        assert all(torch.equal(parameters[n], master.bfloat16()) for n, master in masters.parameters.items())
        completions = sample(engine)
        difference = (trainer_logprobs(model, PROMPTS, completions) - sampled_logprobs(completions)).abs()
        assert 0 < difference.mean() < 0.2
        with model.disable_adapter():
            base = trainer_logprobs(model, PROMPTS, completions)
        assert (base - sampled_logprobs(completions)).abs().mean() > 0.5


@pytest.mark.parametrize("mode", [None, "merge", "views", "copy"])
def test_one_copy_by_every_count(mode, tmp_path):
    """Storages: nothing lies outside of the engine but the adapter, and by views not even that. RSS: attaching, updates
    and rollouts add a fraction of the weights (67 MB here) to what the engine took."""
    write_model("llama", tmp_path, hidden_size=512, intermediate_size=4096, vocab_size=4000)
    lora = LoraConfig(rank=8, alpha=8, mode=mode) if mode else None
    with running(tmp_path, lora) as (engine, model):
        sample(engine)
        weights = sum(p.nbytes for p in engine.model.parameters())
        assert weights > 60e6
        before = psutil.Process().memory_info().rss
        for _ in range(5):
            change(model, alpha=0.001)
            engine.weights_changed()
            sample(engine)
        assert psutil.Process().memory_info().rss - before < 0.3 * weights

        inside = storages(vllm_private.engine_module(engine.llm).parameters())
        inside |= lora_storages(engine) if mode in ("views", "copy") else set()
        outside = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
        adapter = sum(p.nbytes for p in trainable_parameters(model)) if mode in ("merge", "copy") else 0
        assert sum(n for pointer, n in outside.items() if pointer not in inside) == adapter


@pytest.mark.parametrize(
    ("lora", "mergeable", "expected"),
    [
        (LoraConfig(rank=12, alpha=12), True, "merge"),
        (LoraConfig(rank=16, alpha=16), False, "views"),
        (LoraConfig(rank=16, alpha=32), False, "copy"),
        (LoraConfig(rank=12, alpha=12), False, "copy"),
        (LoraConfig(rank=12, alpha=12, mode="copy"), True, "copy"),
    ],
)
def test_the_fastest_safe_mode(lora, mergeable, expected, caplog):
    caplog.set_level(logging.INFO)
    assert choose_mode(lora, mergeable=mergeable, ranks=RANKS) == expected
    assert ("lora.mode: " + expected in caplog.text) == (lora.mode == "auto")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(mode="merge"), "lora.mode = merge: B A would be rounded away"),
        (LoraConfig(rank=12, alpha=12, mode="views"), r"rank 1, 8, 16, .*, 512, lora\.rank is 12"),
        (LoraConfig(rank=16, alpha=32, mode="views"), r"lora\.alpha = 32 must be lora\.rank = 16"),
        (LoraConfig(rank=600, mode="copy"), r"lora\.rank = 600, and the engine takes at most 512"),
        (LoraConfig(rank=600), "auto finds no way into the engine: not merge: .*; not views: .*; not copy: .*600"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        choose_mode(lora, mergeable=False, ranks=RANKS)


def test_slots_that_the_engine_refuses():
    lora, slots = LoraConfig(rank=8, alpha=8), "vLLM's LoRA layers on a GPU take"
    assert choose_mode(lora, mergeable=True, ranks=RANKS, slots=slots) == "merge"
    with pytest.raises(ValueError, match=f"not merge: .*; not views: {slots}.*; not copy: {slots}"):
        choose_mode(lora, mergeable=False, ranks=RANKS, slots=slots)


def test_the_head_is_no_linear_layer_of_an_adapter(models):
    assert linear_names(Path(models("llama")[0])) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
