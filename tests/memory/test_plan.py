"""The planner against the dry run, which runs the trainer's own step, and against real runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from longgrpo.checks.counted import NOT_TRAINERS, count_step, dry_run, longest_rollout, rows_of
from longgrpo.checks.rehearsal import Forecast, forecast_run
from longgrpo.config.run import load_config
from longgrpo.errors import ConfigError
from longgrpo.memory.cards import GIB, card
from longgrpo.memory.internal import CPU, Target
from longgrpo.memory.plan import NF4_BYTES, plan_memory
from longgrpo.memory.shape import model_shape
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.transformers import TransformersEngine
from longgrpo.train.state import make_state
from testing.planned_runs import MODELS as SHAPES
from testing.planned_runs import run_config

EXAMPLES = SHAPES.parent
H100 = Target(card("h100-80").multiprocessors)
LAYERS = 6  # with more, weights and layer inputs hide what a formula of one layer gets wrong
MODELS = ("llama-3.1-8b", "qwen2.5-1.5b", "smollm2")
BOTH = {"offload": True, "tiled_mlp": True}
RUNS = {
    "lora": (True, {}),
    "lora, offloaded and tiled": (True, BOTH),
    "full, checkpointed": (False, {"checkpoint": True}),
    "full, offloaded": (False, {"offload": True}),
}


def planned(config, target):
    shape = model_shape(config.model.path)
    rollout = longest_rollout(config, shape.context)
    return plan_memory(config, shape, rows_of(config, rollout), target), rollout


def held(phase):
    """What the trainer itself holds."""
    return phase.device_bytes - sum(phase.terms.get(term, 0) for term in NOT_TRAINERS)


def agree(config, target=H100):
    plan, rollout = planned(config, target)
    counted = dry_run(config, rollout, target)
    assert held(plan.training) == pytest.approx(held(counted["training"]), rel=0.05)
    if config.scores_reference:
        assert held(plan.scoring) == pytest.approx(held(counted["scoring"]), rel=0.05)
    assert plan.training.host_bytes == pytest.approx(counted["training"].host_bytes, rel=0.01)  # blocks are aligned


@pytest.mark.parametrize(("lora", "memory"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("length", [2048, 8000, 20480])
@pytest.mark.parametrize("name", MODELS)
def test_the_planner_agrees_with_the_dry_run(model, name, length, lora, memory):
    if name == "smollm2" and length > 8192:
        length = 4096  # of what its positions reach
    tiles = {"tile_rows": length // 4} if "tiled_mlp" in memory else {}  # few tiles: they are run in Python
    dtype = "bfloat16" if lora else "float32"
    agree(run_config(model(name, LAYERS), length, lora=lora, dtype=dtype, memory=memory | tiles))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [512, 8000])
def test_a_trained_head_in_bf16(model, length, tied):
    """Its gradient is written in bf16, and is half of what an fp32 one takes."""
    path = model("qwen2.5-1.5b", 2, tie_word_embeddings=tied)
    agree(run_config(path, length, lora=False, memory={"checkpoint": True}))


@pytest.mark.parametrize("name", ["phi-4", "qwen3-8b-128k", "gemma-7b", "mistral-7b"])
def test_every_family(model, name):
    agree(run_config(model(name, LAYERS), 8192, memory=BOTH | {"tile_rows": 2048}, beta=0.1))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["qwen3-8b-128k", "qwen2.5-1.5b", "phi-4"])
def test_attention_by_groups_of_heads(model, name, lora):
    memory = BOTH | {"tile_rows": 2048, "attention_heads": 1, "inputs_on_device": 1}
    config = run_config(model(name, LAYERS), 8192, lora=lora, memory=memory)
    agree(config)
    agree(replace(config, memory=replace(config.memory, tiled_mlp=False)))


def test_attention_by_groups_needs_less(model):
    config = run_config(model("qwen3-8b-128k", 2), 32768, memory=BOTH)
    needs = []
    for heads in (8, 2, 1):
        plan, _ = planned(replace(config, memory=replace(config.memory, attention_heads=heads)), H100)
        needs.append(plan.training.device_bytes)
    whole, _ = planned(config, H100)
    assert needs[2] <= needs[1] <= needs[0]
    assert needs[2] < whole.training.device_bytes


def test_attention_by_groups_is_refused_where_heads_do_not_come_apart(model):
    config = run_config(model("qwen3-8b-128k", 2), 4096, memory={"checkpoint": True, "attention_heads": 1})
    shape = replace(model_shape(config.model.path), kind="olmo2")
    rows = rows_of(config, longest_rollout(config, shape.context))
    with pytest.raises(ValueError, match="the architecture 'olmo2'"):
        plan_memory(config, shape, rows, H100)


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_gradients_of_eight_ranks(model, dtype, element):
    """All, or a rank's own (an eighth, or the largest), a layer's or a table's that wait, and one in float32."""
    config = run_config(model("llama-3.1-8b", 4), 4096, lora=False, dtype=dtype, memory={"checkpoint": True})
    shape = model_shape(config.model.path)
    rows = rows_of(config, longest_rollout(config, shape.context))
    sharded = replace(config, memory=replace(config.memory, shard_gradients=True))
    whole, own = (plan_memory(c, shape, rows, H100, 8).training.terms["gradients"] for c in (config, sharded))
    assert whole == 4 * shape.parameters
    table = 128256 * 4096
    assert own == 4 * table + element * table + (4 * table if element < 4 else 0)
    assert plan_memory(sharded, shape, rows, H100).training.terms["gradients"] == whole  # of one rank


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("loss", [{"kl": "exact_reverse", "beta": 0.1}, {"entropy_coef": 0.01}], ids=str)
def test_the_head_of_a_loss_beyond_logp(model, loss, lora):
    dtype = "bfloat16" if lora else "float32"
    config = run_config(model("llama-3.1-8b", 2), 4096, lora=lora, dtype=dtype, memory=BOTH | {"tile_rows": 1024})
    agree(replace(config, loss=replace(config.loss, **loss)))


def test_a_whole_model(model):
    agree(run_config(model("llama-3.1-8b"), 20480, memory={"offload": True}))


@pytest.mark.parametrize("share", [True, False])
def test_shared_prompts(model, share):
    """Four completions of one prompt: shared, their trunk has fewer tokens and attention as many."""
    memory = {"checkpoint": True, "share_prompts": share}
    config = run_config(model("llama-3.1-8b", LAYERS), 4096, completion=1024, budget=16384, memory=memory)
    plan, _ = planned(config, H100)
    assert plan.rows.tokens == (3072 + 4 * 1023 + 3072 + 4 * 1023 if share else 4 * 4095)
    agree(config)


REAL = {
    "plain": (True, {}),
    "offloaded and tiled": (True, BOTH),
    "full, checkpointed": (False, {"checkpoint": True}),
}


@pytest.mark.long
@pytest.mark.parametrize(("lora", "memory"), REAL.values(), ids=REAL)
def test_the_planner_is_right_about_real_runs_of_smollm2(lora, memory):
    length = 480 if memory.get("offload") else 256  # offload leaves what is below 1 MiB alone
    config = run_config(
        "smollm2-135m-instruct", length, lora=lora, dtype="float32", completion=32, memory=memory, beta=0.1
    )
    plan, rollout = planned(config, CPU)
    engine = TransformersEngine(config.rollout, config.model)
    state = make_state(config, engine, OffloadEngine() if config.memory.offload else None)
    measured = count_step(config, state, rollout, CPU)
    assert held(plan.training) == pytest.approx(held(measured["training"]), rel=0.05)
    assert held(plan.scoring) == pytest.approx(held(measured["scoring"]), rel=0.05)
    assert plan.training.host_bytes == pytest.approx(measured["training"].host_bytes, rel=0.01)


def test_terms_worked_out_by_hand(model):
    """The seed article's model: 8B, rank 16, bf16."""
    config = run_config(model("llama-3.1-8b"), 20480, engine="vllm", kv_cache_gib=2.5)
    plan, _ = planned(config, H100)
    terms = plan.training.terms
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    adapter = 32 * 16 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert terms["linear weights"] == 2 * linears
    assert terms["embedding and head"] == 2 * 2 * 128256 * 4096
    assert terms["optimizer"] == 8 * adapter
    assert terms["gradients"] == 4 * adapter
    assert terms["KV cache"] == 2 * 2 * 32 * 20480 * 1024  # one live sequence
    assert linears * NF4_BYTES == pytest.approx(3.66 * GIB, rel=0.01)


def test_a_run_that_contradicts_itself(model):
    path = model("llama-3.1-8b")
    with pytest.raises(ValueError, match=r"kv_cache_gib = 1: one sequence of 20480 tokens needs 2\.50 GiB"):
        planned(run_config(path, 20480, engine="vllm"), H100)
    windowed = model("mistral-7b", sliding_window=4096)
    with pytest.raises(ValueError, match="8192 tokens under a sliding window of 4096"):
        planned(run_config(windowed, 8192), H100)


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b-20k-24gb",
        "phi-4-16k-80gb",
        "qwen2.5-1.5b-5gb",
        pytest.param("qwen3-8b-128k-80gb", marks=pytest.mark.long),
    ],
)
def test_a_recipe_runs_dry(model, name):
    config = load_config(EXAMPLES / f"{name}.yaml")
    if config.model.quantization:
        pytest.importorskip("bitsandbytes")
    path = model(Path(config.model.path).name, 4)
    agree(replace(config, model=replace(config.model, path=path)))


GEMMA3 = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "max_position_embeddings": 32768, "sliding_window": 4096, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("lora", [True, False])
def test_a_model_without_formulas_is_counted(tmp_path, lora):
    """Its plan is that of a step on meta tensors; the oracle is the same step on real ones."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3))
    config = run_config(str(tmp_path), 1024, lora=lora, dtype="float32", memory={"checkpoint": True}, beta=0.1)
    plan = Forecast(config).plan
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, local_files_only=True))
    model.save_pretrained(tmp_path)
    rollout = longest_rollout(config, 32768)
    measured = count_step(
        config, make_state(config, TransformersEngine(config.rollout, config.model), None), rollout, CPU
    )
    assert held(plan.training) == pytest.approx(held(measured["training"]), rel=0.05)
    assert held(plan.scoring) == pytest.approx(held(measured["scoring"]), rel=0.05)
    assert plan.rollout.terms["KV cache"] == 8 * 1024 * 4 * 2 * 256 * 4  # sequences, tokens, layers, k and v, bytes


def test_a_model_that_does_not_run_on_meta_tensors_has_no_plan(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3 | {"hidden_activation": "no such function"}))
    config = run_config(str(tmp_path), 1024)
    with pytest.raises(
        ConfigError, match=r"no formulas for the architecture 'gemma3_text', and a step on meta tensors"
    ):
        Forecast(config)
    assert forecast_run(config, 4, force=False) is None
