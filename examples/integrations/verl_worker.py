"""verl with longgrpo's head and policy loss. verl imports this file's module in every worker:

    PYTHONPATH=examples/integrations python -m verl.trainer.main_ppo \
        actor_rollout_ref.model.external_lib=verl_worker \
        actor_rollout_ref.model.use_fused_kernels=True \
        actor_rollout_ref.actor.policy_loss.loss_mode=longgrpo ...

Run by itself it takes some steps of an actor through the functions that verl calls, on one rank and without ray:

    python examples/integrations/verl_worker.py MODEL      # a directory or a hub id
"""

from __future__ import annotations

import sys
import types

import torch

from longgrpo.integrations.verl import patch_verl, register_policy_loss

patch_verl()
register_policy_loss("longgrpo")


def train(path: str, steps: int, learning_rate: float) -> list[float]:
    """Mean log-probability of a completion with a positive advantage, step by step."""
    from transformers import AutoModelForCausalLM
    from verl.models.transformers.dense_common import forward_with_torch_backend
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    model = AutoModelForCausalLM.from_pretrained(path)
    forward = types.MethodType(forward_with_torch_backend, model)  # where verl's monkey patch puts it
    config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 11, 12, 13, 14]])  # one prompt, a good completion and a bad one
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]] * 2)  # log_probs[:, t] is of token t + 1
    advantages = torch.tensor([[1.0], [-1.0]]) * mask
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    old, curve = None, []
    for _ in range(steps):
        logp = forward(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True, temperature=1.0).log_probs
        old = logp.detach() if old is None else old
        loss, _ = get_policy_loss_fn("longgrpo")(
            old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask, config=config
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float((logp[0] * mask[0]).sum() / mask[0].sum()))
    return curve


if __name__ == "__main__":
    curve = train(sys.argv[1], steps=5, learning_rate=1e-5)
    print(f"logp of the good completion {curve[0]:.3f} -> {curve[-1]:.3f}")
