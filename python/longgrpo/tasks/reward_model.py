"""A reward model: a sequence classifier of transformers that scores conversations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longgrpo.errors import ConfigError, RewardError
from longgrpo.model.files import check_finite, reading
from longgrpo.tasks.data import Prompt, Reply

log = logging.getLogger(__name__)


class RewardModel:
    """A reward function: the classifier's one logit for prompt and completion together.

    path: a directory or a hub id. dtype: of its weights. batch_size: texts in a forward. max_length: tokens of a text,
    whose end is kept; default: what the model takes. A conversation goes through the chat template of the model's own
    tokenizer; text is read as it is.

    Raises ConfigError if the model cannot be loaded or has not exactly one label.
    """

    def __init__(self, path: str, dtype: str = "float32", batch_size: int = 16, max_length: int | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.path, self.batch_size = path, batch_size
        try:
            sides = {"padding_side": "right", "truncation_side": "left"}
            self.tokenizer: Any = reading(
                Path(path), lambda: AutoTokenizer.from_pretrained(path, **sides, trust_remote_code=False)
            )
            self.model: Any = reading(
                Path(path),
                lambda: AutoModelForSequenceClassification.from_pretrained(
                    path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
                ),
            )
            check_finite(self.model, path)
        except ValueError as error:
            raise ConfigError(f"rewards: the model {path!r} cannot be loaded as a classifier: {error}") from error
        labels = self.model.config.num_labels
        if labels != 1:
            raise ConfigError(f"rewards: the model {path!r} has {labels} labels: a reward model has one, its score")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # finds a text's last token
        limits = (max_length, self.tokenizer.model_max_length, self.model.config.get_text_config().to_dict().get(
            "max_position_embeddings"
        ))  # fmt: skip
        self.max_length = min(limit for limit in limits if limit)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Reply], **columns: Any) -> list[float]:
        """One score a completion."""
        texts = [self._text(prompt, reply) for prompt, reply in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one batch are of one length, nearly
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=self.max_length,
                add_special_tokens=isinstance(prompts[chosen[0]], str), return_tensors="pt",
            )  # fmt: skip
            batch.pop("token_type_ids", None)
            logits = self.model(**batch.to(self.model.device)).logits  # [B, 1]
            for i, score in zip(chosen, logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _text(self, prompt: Prompt, reply: Reply) -> str:
        if isinstance(prompt, str) and isinstance(reply, str):
            return prompt + reply
        if self.tokenizer.chat_template is None:
            raise RewardError(
                f"rewards: the tokenizer of the model {self.path!r} has no chat template and the task's prompts are "
                "conversations: take task.chat: false, or call the model from a function of your own"
            )
        return str(self.tokenizer.apply_chat_template([*prompt, *reply], tokenize=False))
