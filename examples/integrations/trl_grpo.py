"""TRL's GRPO with longgrpo's head: change the class, or call patch_trl() and keep it.

python examples/integrations/trl_grpo.py MODEL      # a directory or a hub id
"""

from __future__ import annotations

import sys

from datasets import Dataset
from trl import GRPOConfig

from longgrpo.integrations.trl import LongGRPOTrainer
from longgrpo.offload import OffloadEngine

PROBLEMS = [{"prompt": f"{a} + {b} = ", "answer": str(a + b)} for a in range(4) for b in range(4)]


def digits(completions: list[str], **columns: object) -> list[float]:
    """The share of digits, so that there is something to learn from the first step on."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def exact(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    return [float(text.strip().startswith(right)) for text, right in zip(completions, answer, strict=True)]


def main(model: str, output_dir: str = "runs/trl-grpo", **options: object) -> LongGRPOTrainer:
    args = GRPOConfig(
        output_dir, num_generations=8, per_device_train_batch_size=8, max_completion_length=8, loss_type="dapo",
        logging_steps=1, report_to=[], **{"max_steps": 20, "learning_rate": 1e-5, **options},
    )  # fmt: skip
    with OffloadEngine() as offload:  # the layers' inputs wait in host memory; leave it out for short sequences
        trainer = LongGRPOTrainer(
            model, reward_funcs=[digits, exact], args=args, train_dataset=Dataset.from_list(PROBLEMS), offload=offload
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
