"""verl's own training workers, two of them on Ray with FSDP2: two steps with our head and loss, and with verl's.

`make bench-integrations` runs this.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

ray = pytest.importorskip("ray")
pytest.importorskip("verl")

from testing import ROOT  # noqa: E402
from testing.models import write_tiny_llama  # noqa: E402

STEPS, WORKERS, SEQUENCES, PROMPT, RESPONSE = 2, 2, 8, 5, 7


@pytest.fixture(scope="module")
def cluster():
    from testing import verl_cpu

    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_ENGINE_DEVICE", verl_cpu.ENVIRONMENT["VERL_ENGINE_DEVICE"])
        variables = verl_cpu.ENVIRONMENT | {"PYTHONPATH": path}
        ray.init(num_cpus=2 * WORKERS, include_dashboard=False, runtime_env={"env_vars": variables})
        yield verl_cpu
        ray.shutdown()


def batch():
    """What verl's trainer hands its actor: responses of unequal lengths, padded, and then without padding."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (SEQUENCES, PROMPT + RESPONSE), generator=g)
    mask = torch.arange(RESPONSE) < torch.randint(3, RESPONSE + 1, (SEQUENCES, 1), generator=g)
    attention = torch.cat([torch.ones(SEQUENCES, PROMPT, dtype=torch.bool), mask], 1).long()
    data = left_right_2_no_padding(TensorDict({
        "input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "response_mask": mask.long(),
        "old_log_probs": -3 + 0.3 * torch.randn(SEQUENCES, RESPONSE, generator=g),
        "advantages": torch.randn(SEQUENCES, 1, generator=g) * mask,
    }, batch_size=SEQUENCES))  # fmt: skip
    tensordict_utils.assign_non_tensor(
        data, temperature=0.9, calculate_entropy=False, distillation_use_topk=False, distillation_only=False,
        global_batch_size=SEQUENCES, mini_batch_size=SEQUENCES, epochs=1, seed=0, compute_loss=True,
        dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    return data


def trained(cluster, model, ours):
    """Loss and gradient norm of each step."""
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils
    from verl.workers.config import (
        ActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.utils.losses import ppo_loss

    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(model), use_remove_padding=False, use_fused_kernels=ours,
            fused_kernel_options={"impl_backend": "torch"}, override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_dynamic_bsz=False, micro_batch_size_per_gpu=2, dtype="float32",
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    pool = RayResourcePool(process_on_nodes=[WORKERS], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(ray.remote(cluster.worker()), config=config)
    group = RayWorkerGroup(pool, made, use_gpu=False)
    group.reset()
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=SEQUENCES, ppo_micro_batch_size_per_gpu=2,
        policy_loss={"loss_mode": "longgrpo" if ours else "vanilla"},
    )  # fmt: skip
    group.set_loss_fn(partial(ppo_loss, actor))
    steps = [tensordict_utils.get(group.train_mini_batch(batch()).get(), "metrics") for _ in range(STEPS)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def test_two_workers_of_verl_train_with_our_head_and_loss(cluster, tmp_path):
    model = write_tiny_llama(tmp_path, tie_word_embeddings=True)
    theirs, ours = (torch.tensor(trained(cluster, model, ours)) for ours in (False, True))
    assert (theirs[1] - theirs[0]).abs().max() > 0.1  # the first step has changed the weights
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
