"""One engine of each kind a test file: each costs seconds, and a process holds one vLLM at a time."""

import pytest

from longgrpo.model.load import load_tokenizer, resolve_model
from longgrpo.rollout import RolloutConfig, make_engine
from testing.agreement import CONTEXT, SMOLLM2


@pytest.fixture(scope="module")
def vllm_engine():
    pytest.importorskip("vllm")
    engine = make_engine(RolloutConfig(engine="vllm", max_model_len=CONTEXT), SMOLLM2)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_engine():
    return make_engine(RolloutConfig(engine="transformers", max_model_len=CONTEXT), SMOLLM2)


@pytest.fixture(params=["vllm", "transformers"])
def engine(request):
    """Either engine, on the base weights."""
    engine = request.getfixturevalue(f"{request.param}_engine")
    engine.attach(engine.model)
    return engine


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(resolve_model(SMOLLM2.path))


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Eight prompts of different lengths, between 30 and 50 tokens."""

    def encode(question):
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    return [encode(f"What is {'1 + ' * (i + 1)}{i}?") for i in range(8)]
