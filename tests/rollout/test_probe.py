"""The probe after an update, and each way that the engine can fail to run what is trained."""

from contextlib import contextmanager

import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.model.packed_attention import use_packed_attention
from longgrpo.rollout import vllm_private
from longgrpo.rollout.probe import EngineMismatch, Probe
from testing.engines import change, running, write_model

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_model("llama", directory)
    return directory


@contextmanager
def probed(directory, lora=None, **rollout):
    """An engine after an update that reached it, and its probe."""
    with running(directory, lora, **rollout) as (engine, model):
        use_packed_attention(model)
        probe = Probe([5, 9, 30, 31], engine, engine.config, "float32")
        assert probe(model) <= 1e-5
        change(model)
        engine.weights_changed()
        assert probe(model) <= 1e-5
        yield engine, model, probe


def test_an_adapter_that_was_never_published(directory):
    with probed(directory, LoraConfig(rank=8, alpha=16, mode="copy")) as (engine, model, probe):
        change(model)
        engine.llm.reset_prefix_cache()
        with pytest.raises(EngineMismatch, match="does not run what is trained"):
            probe(model)
        engine.weights_changed()
        assert probe(model) <= 1e-5


def test_a_stale_prefix_cache(directory, monkeypatch):
    with probed(directory) as (engine, model, probe):
        monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        change(model)
        engine.weights_changed()
        with pytest.raises(EngineMismatch):
            probe(model)


def test_weights_packed_before_the_update(directory, monkeypatch):
    with probed(directory, LoraConfig(rank=4), repack_weights=True) as (engine, model, probe):
        monkeypatch.setattr(vllm_private, "repack", lambda llm: None)
        change(model)
        engine.weights_changed()
        with pytest.raises(EngineMismatch):
            probe(model)


def test_an_adapter_at_another_scale(directory):
    with probed(directory, LoraConfig(rank=8, alpha=16, mode="copy")) as (engine, model, probe):
        for _, b in vllm_private.lora_slots(engine.llm).values():
            b.div_(2)
        engine.llm.reset_prefix_cache()
        with pytest.raises(EngineMismatch):
            probe(model)


def test_an_adapter_merged_twice(directory, monkeypatch):
    with probed(directory, LoraConfig(rank=4, mode="merge")) as (engine, model, probe):
        adapter = engine._adapter

        @contextmanager
        def twice():
            with type(adapter).in_engine(adapter), type(adapter).in_engine(adapter):
                yield

        monkeypatch.setattr(adapter, "in_engine", twice)
        engine.llm.reset_prefix_cache()
        with pytest.raises(EngineMismatch):
            probe(model)


def test_numbers_that_are_none(directory):
    with probed(directory) as (engine, model, probe):
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        engine.weights_changed()
        with pytest.raises(EngineMismatch):
            probe(model)
