"""What a host gains from our head, on a vocabulary of 131072: `make bench-integrations` runs it.

The same model (random, two layers, so that the head dominates as it does on long completions), the same tokens and the
same call, with the host's own head and with ours: loss and backward. Programs take turns; wall and CPU seconds are
medians of the rounds with their range. Peak memory is that of one call in a fresh process, beyond the model, with the
gradients. The error is the distance between the two gradients of the whole model, over the norm of the host's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import memory

VOCABULARY, HIDDEN, LAYERS = 131_072, 576, 2
SEQUENCES, PROMPT, COMPLETION = 4, 64, 128  # tokens; the completions are 1/4 to all of that long
HEADS = ("frozen", "trained")
Step = Callable[[], Tensor]  # the loss, its graph alive


def make_model(head: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=PROMPT + COMPLETION,
        tie_word_embeddings=False, pad_token_id=0,
    ))  # fmt: skip
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(head == "trained")
    return model


def make_tokens() -> dict[str, Tensor]:
    """ids and attention mask [B, P + T], completion mask [B, T], old logprobs [B, T], advantages [B]."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.linspace(COMPLETION // 4, COMPLETION, SEQUENCES).long()
    mask = (torch.arange(COMPLETION) < lengths[:, None]).long()
    return {
        "ids": torch.randint(1, VOCABULARY, (SEQUENCES, PROMPT + COMPLETION), generator=g),
        "attention_mask": torch.cat([torch.ones(SEQUENCES, PROMPT, dtype=torch.int64), mask], 1),
        "mask": mask,
        "old": -12 - torch.rand(SEQUENCES, COMPLETION, generator=g) / 10,
        "advantages": torch.tensor([1.0, -1.0] * (SEQUENCES // 2)),
    }


# ---- hosts: model, tokens -> one step's loss


def trl_step(model: Any, x: dict[str, Tensor], ours: bool, **own: Any) -> Step:
    import trl
    from datasets import Dataset

    from longgrpo.integrations.trl import LongGRPOTrainer

    args = trl.GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, use_cpu=True, bf16=False,
        report_to=[], max_completion_length=COMPLETION, loss_type="dapo", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = (LongGRPOTrainer if ours else trl.GRPOTrainer)(
        model, reward_funcs=len, args=args, train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer(), **own,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": x["ids"][:, :PROMPT], "prompt_mask": x["attention_mask"][:, :PROMPT],
        "completion_ids": x["ids"][:, PROMPT:], "completion_mask": x["mask"], "advantages": x["advantages"],
        "old_per_token_logps": x["old"], "num_items_in_batch": x["mask"].sum(),
    }  # fmt: skip
    return lambda: trainer.compute_loss(model, inputs)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")


def huggingface_step(model: Any, x: dict[str, Tensor], ours: bool) -> Step:
    """Supervised fine-tuning: the model's own loss from its logits."""
    from longgrpo.integrations.huggingface import causal_lm_logprob

    labels = x["ids"].masked_fill(x["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100

    def theirs() -> Tensor:
        return model(input_ids=x["ids"], attention_mask=x["attention_mask"], labels=labels).loss

    def with_ours() -> Tensor:
        logp = causal_lm_logprob(model, x["ids"], x["attention_mask"], labels=labels).logp
        return -logp.sum() / x["mask"].sum()

    return with_ours if ours else theirs


def verl_step(model: Any, x: dict[str, Tensor], ours: bool) -> Step:
    from verl.models.transformers.dense_common import forward_with_torch_backend
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    from longgrpo.integrations.verl import patch_verl, register_policy_loss

    register_policy_loss("longgrpo")
    config = ActorConfig(strategy="fsdp", rollout_n=SEQUENCES, ppo_micro_batch_size_per_gpu=SEQUENCES)
    forward = types.MethodType(forward_with_torch_backend, model)

    def theirs(loss_mode: str = "vanilla") -> Tensor:
        out = forward(input_ids=x["ids"], attention_mask=x["attention_mask"], return_dict=True, temperature=1.0)
        loss, _ = get_policy_loss_fn(loss_mode)(
            old_log_prob=x["old"], log_prob=out.log_probs[:, PROMPT - 1 : -1],
            advantages=x["advantages"][:, None] * x["mask"], response_mask=x["mask"], config=config,
        )  # fmt: skip
        return loss

    def with_ours() -> Tensor:
        with patch_verl():
            return theirs("longgrpo")

    return with_ours if ours else theirs


HOSTS: dict[str, dict[str, Callable[..., Step]]] = {
    "TRL 1.16.0": {
        "TRL's head": lambda model, x: trl_step(model, x, ours=False),
        "LongGRPOTrainer": lambda model, x: trl_step(model, x, ours=True),
        "LongGRPOTrainer, fused_loss": lambda model, x: trl_step(model, x, ours=True, fused_loss=True),
    },
    "transformers": {
        "the model's logits": lambda model, x: huggingface_step(model, x, ours=False),
        "causal_lm_logprob": lambda model, x: huggingface_step(model, x, ours=True),
    },
    "verl 0.9.1": {
        "verl's torch backend": lambda model, x: verl_step(model, x, ours=False),
        "patch_verl": lambda model, x: verl_step(model, x, ours=True),
    },
}


# ---- measuring


def run(step: Step, model: Any) -> None:
    model.zero_grad(set_to_none=True)
    step().backward()


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(host: str, head: str, rounds: int) -> list[dict[str, Any]]:
    """One record a program, the host's own first."""
    model, x = make_model(head), make_tokens()
    steps = {name: make(model, x) for name, make in HOSTS[host].items()}
    records: list[dict[str, Any]] = []
    theirs = None
    for name, step in steps.items():  # and warm-up
        run(step, model)
        got = gradient(model)
        theirs = got if theirs is None else theirs
        error = float((got - theirs).norm() / theirs.norm())
        records.append({"host": host, "head": head, "program": name, "error": error, "wall": [], "cpu": []})
    for _ in range(rounds):
        for record, step in zip(records, steps.values(), strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            run(step, model)
            record["wall"].append(time.perf_counter() - wall)
            record["cpu"].append(time.process_time() - cpu)
    del model, theirs, got, steps
    for record in records:
        command = [__file__, "--memory", json.dumps([host, head, record["program"]])]
        record["extra_bytes"] = int(memory.in_fresh_process(*command))
    return records


def extra_bytes(host: str, head: str, program: str) -> int:
    model = make_model(head)
    step = HOSTS[host][program](model, make_tokens())
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # thread pools
    return memory.peak_extra(lambda: run(step, model))


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--host", choices=HOSTS, action="append", help="default: all")
    parser.add_argument("--json", type=Path, help="write the records there too")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(extra_bytes(*json.loads(options.memory)))
        return
    print(f"{SEQUENCES} sequences of {PROMPT} + {COMPLETION} tokens, {int(make_tokens()['mask'].sum())} of them in the "
          f"loss; hidden {HIDDEN}, vocabulary {VOCABULARY}, {LAYERS} layers, fp32; torch {torch.__version__}, "
          f"transformers {version('transformers')}, {os.cpu_count()} cores, {platform.machine()}\n")  # fmt: skip
    print("| host | head | program | seconds | CPU seconds | peak MiB | gradient's distance |")
    print("|---|---|---|---|---|---|---|")
    records = []
    for host in options.host or HOSTS:
        for head in HEADS:
            try:
                measured = measure(host, head, options.rounds)
            except ImportError as error:
                print(f"| {host} | {head} | not installed: {error} | | | | |")
                continue
            records += measured
            for r in measured:
                print(f"| {host} | {head} | {r['program']} | {spread(r['wall'])} | {spread(r['cpu'])} | "
                      f"{r['extra_bytes'] / 2**20:.0f} | {r['error']:.1e} |", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
