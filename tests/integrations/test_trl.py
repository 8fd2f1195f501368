"""TRL's trainer with our head beside TRL's own: the same run, step by step."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ProcessorMixin,
    TrainerCallback,
)

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402

from longgrpo.integrations.trl import LongGRPOTrainer, patch_trl  # noqa: E402
from testing import ROOT, load  # noqa: E402
from testing.models import SIZES, random_model  # noqa: E402

BF16 = 2 * 2**-7  # dL/dhidden is rounded to it on both sides, and so is every product of the backbone's backward
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def vowels(completions, **columns):
    return [float(sum(text.count(c) for c in "aeiou")) + len(text) % 3 for text in completions]


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, before clipping changes it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def arguments(directory, **options) -> trl.GRPOConfig:
    values = {
        "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 6, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "logging_steps": 1, "report_to": [], "save_strategy": "no", "bf16": False,
        "use_cpu": True, "seed": 3, "disable_tqdm": True,
    }  # fmt: skip
    return trl.GRPOConfig(str(directory), **{**values, **options})


def train(trainer_class, model_directory, output, *, model=None, resume=None, trainer=None, **options):
    """(trainer, log history without times, gradients of each optimizer step)"""
    gradients = Gradients()
    built = trainer_class(
        model if model is not None else str(model_directory),
        reward_funcs=vowels,
        args=arguments(output, **options),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} and {i + 1}: " for i in range(16)]}),
        eval_dataset=Dataset.from_dict({"prompt": ["7 and 8: "] * 4}),
        processing_class=AutoTokenizer.from_pretrained(model_directory),
        callbacks=[gradients],
        **(trainer or {}),
    )
    built.train(resume_from_checkpoint=resume)
    return built, without_times(built.state.log_history), gradients.steps


def without_times(history):
    timed = ("time", "runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in history]


def assert_same_run(ours, theirs, bound=1e-4):
    """Same metrics by name and value, and gradients whose distance from TRL's is at most `bound` of their norm."""
    (_, our_log, our_gradients), (_, their_log, their_gradients) = ours, theirs
    assert [set(entry) for entry in our_log] == [set(entry) for entry in their_log]
    for a, b in zip(our_log, their_log, strict=True):
        for name in a:
            assert a[name] == (None if b[name] is None else pytest.approx(b[name], rel=bound, abs=bound)), name
    assert len(our_gradients) == len(their_gradients) > 0
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] - b[name]).norm() <= bound * b[name].norm(), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ten_steps_of_each_loss_type(loss_type, model_directory, tmp_path):
    """Off policy every second step (num_iterations=2), with a KL term."""
    options = {"loss_type": loss_type, "max_steps": 10, "num_iterations": 2, "beta": 0.04}
    if loss_type == "cispo":
        options["epsilon_high"] = 1.05
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, **options)
    ours = train(LongGRPOTrainer, model_directory, tmp_path, **options)
    assert_same_run(ours, theirs)
    assert any(entry.get("grad_norm", 0) > 0 for entry in theirs[1])


FUSED_LEAVES_OUT = {"clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio", "vespo/phi_seq_mean"}


def without(history, names):
    return [{k: v for k, v in entry.items() if k.removeprefix("eval_") not in names} for entry in history]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_fused_loss(loss_type, model_directory, tmp_path):
    options = {"loss_type": loss_type, "num_iterations": 2, "beta": 0.04, "max_steps": 4}
    theirs, log, gradients = train(trl.GRPOTrainer, model_directory, tmp_path, **options)
    ours = train(LongGRPOTrainer, model_directory, tmp_path, trainer={"fused_loss": True}, **options)
    assert_same_run(ours, (theirs, without(log, FUSED_LEAVES_OUT), gradients))


def test_fused_loss_refuses_what_it_does_not_know(model_directory, tmp_path):
    for options in ({"top_entropy_quantile": 0.5}, {"off_policy_mask_threshold": 0.1}, {"entropy_coef": 0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            train(LongGRPOTrainer, model_directory, tmp_path, trainer={"fused_loss": True}, **options)


OPTIONS = {
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 10.0},
    # At 0.3 a threshold falls on tokens of one entropy (the first of a prompt's completions), and rounding decides.
    "high-entropy tokens": {"top_entropy_quantile": 0.6},
    "off-policy mask": {"off_policy_mask_threshold": 1e-6, "num_iterations": 2},
    "sequence ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    "two-sided clip": {"delta": 1.01, "num_iterations": 2, "epsilon": 0.01},
    "unbiased KL": {"use_bias_correction_kl": True, "beta": 0.1, "num_iterations": 2},
    "synchronized reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "temperature and truncation": {
        "temperature": 0.7,
        "top_k": 20,
        "max_completion_length": 12,
        "mask_truncated_completions": True,
    },
    "unscaled rewards": {"scale_rewards": "none", "steps_per_generation": 4},
    "fp32 head": {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "beta": 0.1},
    "no checkpointing": {"gradient_checkpointing": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, model_directory, tmp_path):
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, **options)
    ours = train(LongGRPOTrainer, model_directory, tmp_path, **options)
    assert_same_run(ours, theirs, bound=BF16 if "model_init_kwargs" in options else 1e-4)


def test_bfloat16_autocast(model_directory, tmp_path):
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, bf16=True, max_steps=1)
    ours = train(LongGRPOTrainer, model_directory, tmp_path, bf16=True, max_steps=1)
    assert_same_run(ours, theirs, bound=BF16)


def test_lora_with_its_base_as_reference(model_directory, tmp_path):
    peft = pytest.importorskip("peft")
    lora = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)}
    options = {"beta": 0.04, "num_iterations": 2, "max_steps": 4}
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, trainer=lora, **options)
    ours = train(LongGRPOTrainer, model_directory, tmp_path, trainer=lora, **options)
    assert_same_run(ours, theirs)
    fused = train(LongGRPOTrainer, model_directory, tmp_path, trainer={**lora, "fused_loss": True}, **options)
    assert_same_run(fused, (theirs[0], without(theirs[1], FUSED_LEAVES_OUT), theirs[2]))


def test_offload_keeps_the_numbers(model_directory, tmp_path):
    from longgrpo.offload import OffloadEngine

    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, beta=0.1)
    with OffloadEngine(min_bytes=0, keep_last=0) as engine:
        ours = train(LongGRPOTrainer, model_directory, tmp_path, beta=0.1, trainer={"offload": engine})
        assert engine.stats()["bytes_out"] > 0
    assert_same_run(ours, theirs)


def agent(prompts, trainer):
    """A rollout of fixed tokens, every third one a tool's: it counts in no loss."""
    completions = [[5 + (7 * i + t) % 80 for t in range(4 + i % 3)] for i in range(len(prompts))]
    return {
        "prompt_ids": [[10, 11, 12 + i % 2] for i in range(len(prompts))],
        "completion_ids": completions,
        "logprobs": [[-3.0] * len(ids) for ids in completions],
        "env_mask": [[int(t % 3 != 1) for t in range(len(ids))] for ids in completions],
    }


def test_tokens_of_tools_are_masked(model_directory, tmp_path):
    rollout = {"rollout_func": agent}
    options = {"loss_type": "bnpo", "beta": 0.1}
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path, trainer=rollout, **options)
    assert_same_run(train(LongGRPOTrainer, model_directory, tmp_path, trainer=rollout, **options), theirs)
    fused = train(LongGRPOTrainer, model_directory, tmp_path, trainer={**rollout, "fused_loss": True}, **options)
    assert_same_run(fused, (theirs[0], without(theirs[1], FUSED_LEAVES_OUT), theirs[2]))


@pytest.mark.parametrize(("loss_type", "per_sequence"), [("dapo", False), ("dapo", True), ("vespo", False)])
def test_the_correction_of_an_engines_logprobs(loss_type, per_sequence, model_directory, tmp_path):
    """The ratio that TRL computes under vLLM, given by hand."""
    g = torch.Generator().manual_seed(4)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]).long()
    ratio = torch.rand(4, 1 if per_sequence else 6, generator=g) + 0.5
    inputs = {
        "prompt_ids": torch.randint(2, 97, (4, 3), generator=g), "prompt_mask": torch.ones(4, 3, dtype=torch.int64),
        "completion_ids": torch.randint(2, 97, (4, 6), generator=g), "completion_mask": mask,
        "advantages": torch.randn(4, generator=g), "num_items_in_batch": mask.sum(),
        "old_per_token_logps": -4 - torch.rand(4, 6, generator=g),
        "importance_sampling_ratio": ratio if per_sequence else torch.where(mask == 1, ratio, 1.0),
    }  # fmt: skip
    gradients = []
    for trainer_class, own in ((trl.GRPOTrainer, {}), (LongGRPOTrainer, {}), (LongGRPOTrainer, {"fused_loss": True})):
        trainer = trainer_class(
            str(model_directory), reward_funcs=vowels, args=arguments(tmp_path, loss_type=loss_type),
            train_dataset=Dataset.from_dict({"prompt": ["a"]}), **own,
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 2
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        trainer.compute_loss(trainer.model, inputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    theirs, *ours = gradients
    for gradient in ours:
        assert (gradient - theirs).norm() <= 1e-4 * theirs.norm()


def test_refusals_with_a_processor_of_images(model_directory, tmp_path):
    """TRL's own stays, and the fused loss refuses what it does not know."""
    processor = ImageProcessor(AutoTokenizer.from_pretrained(model_directory, padding_side="left"))
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    model.config.image_token_id = 3
    common = {"reward_funcs": vowels, "processing_class": processor,
              "train_dataset": Dataset.from_dict({"prompt": ["a"]})}  # fmt: skip
    with pytest.raises(ValueError, match="does not support multimodal models"):
        LongGRPOTrainer(model, args=arguments(tmp_path, use_transformers_continuous_batching=True), **common)
    with pytest.raises(ValueError, match="fused_loss=True is for text models"):
        LongGRPOTrainer(model, args=arguments(tmp_path), fused_loss=True, **common)


class ImageProcessor(ProcessorMixin):
    """All that the trainers look at: the class."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


def test_resuming_gives_the_uninterrupted_run(model_directory, tmp_path):
    whole = train(LongGRPOTrainer, model_directory, tmp_path / "whole", max_steps=4)
    options = {"save_strategy": "steps", "save_steps": 2}
    train(LongGRPOTrainer, model_directory, tmp_path / "half", max_steps=2, **options)
    checkpoint = tmp_path / "half" / "checkpoint-2"
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path / "theirs", max_steps=4, resume=str(checkpoint))
    ours = train(LongGRPOTrainer, model_directory, tmp_path / "half", max_steps=4, resume=str(checkpoint))
    assert_same_run(ours, theirs)  # TRL's own class goes on from our checkpoint
    for a, b in zip(ours[2], whole[2][2:], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name])
    AutoModelForCausalLM.from_pretrained(checkpoint)


def test_patch_serves_the_class_that_was_imported_before_and_undoes_cleanly(model_directory, tmp_path):
    before = vars(trl.trainer.utils).copy()
    theirs = train(trl.GRPOTrainer, model_directory, tmp_path)
    called = []
    with patch_trl() as patch:
        head = trl.trainer.utils._ChunkedLogProbFunction
        apply = head.apply
        head.apply = lambda *arguments: called.append(len(arguments[0])) or apply(*arguments)
        assert_same_run(train(trl.GRPOTrainer, model_directory, tmp_path), theirs)
        assert_same_run(train(LongGRPOTrainer, model_directory, tmp_path), theirs)
    assert called
    patch.undo()  # a second time does nothing
    assert vars(trl.trainer.utils) == before
    assert_same_run(train(trl.GRPOTrainer, model_directory, tmp_path), theirs)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def mixture_of_experts():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return random_model("qwen3_moe", pad_token_id=0, **experts)


def vision_and_language():
    text = {**SIZES, "pad_token_id": 0, "final_logit_softcapping": 3.0}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("make", [mixture_of_experts, vision_and_language])
def test_the_fused_forward_of_other_models(make):
    torch.manual_seed(0)
    model = make()
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100

    def step():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + 0.1 * out.entropy.sum() + (0 if out.aux_loss is None else out.aux_loss)).backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    theirs, their_gradients = step()
    with patch_trl():
        ours, gradients = step()
    for name in ("loss", "log_probs", "entropy", "aux_loss", "label_mask"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - their_gradients[name]).norm() <= 1e-4 * their_gradients[name].norm(), name


def test_another_version_is_refused(model_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"tested with trl 1\.16\.0 and not with 1\.17\.0: pip install trl=="):
        patch_trl()
    with pytest.raises(RuntimeError, match="tested with trl"):
        LongGRPOTrainer(str(model_directory), reward_funcs=vowels, args=arguments(tmp_path))


def test_the_example_learns(model_directory, tmp_path):
    example = load(ROOT / "examples" / "integrations" / "trl_grpo.py")
    trainer = example.main(
        str(model_directory), str(tmp_path), max_steps=20, learning_rate=5e-3, use_cpu=True, bf16=False
    )
    rewards = [entry["rewards/digits/mean"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
