"""A model as one GGUF file for llama.cpp and Ollama, as llama.cpp's converter writes it: longgrpo.model.gguf backwards.

The metadata of a model that came from a GGUF file is that of the file. Another tokenizer has to be one of PRE: by its
name llama.cpp chooses how text is split, and with another name the same text would be other tokens.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import torch
from torch import Tensor

from longgrpo.model.gguf import ROPE_FACTORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Type = Literal["bfloat16", "q8_0"]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
TYPES = {
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", "digits": "smollm", "": "gpt-2"}
"""llama.cpp's names of pre-tokenizers, by the expression that they split by (before bytes)."""
NOT_COPIED = ("GGUF.", "split.", "general.file_type", "general.quantization_version", "tokenizer.chat_template")


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, kind: Type, source: Path | None = None
) -> None:
    """Writes `model` and its tokenizer to `path`: matrices in bfloat16 or in Q8_0 (blocks of 32 values with one scale),
    vectors in float32. source: the GGUF file that the model came from.

    Raises ValueError for an architecture, a tokenizer or a rotary embedding that the file could not say.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"gguf: a {config.model_type} model is not written; {', '.join(ARCHITECTURES)} are")
    if getattr(config, "sliding_window", None):
        raise ValueError(f"gguf: a sliding window of {config.sliding_window} is not written")
    logging.getLogger("gguf").setLevel(logging.ERROR)
    tensor_type, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(path, config.model_type)
    if source:
        _copy_metadata(writer, source)
    else:
        _add_shape(writer, config)
        embedding: Any = model.get_input_embeddings()
        _add_tokenizer(writer, tokenizer, embedding.num_embeddings)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in _tensors(model):
        own = tensor_type if tensor.dim() > 1 and name != ROPE_FACTORS else gguf.GGMLQuantizationType.F32
        data = tensor.contiguous().numpy()
        writer.add_tensor(name, gguf.quantize(data, own) if own is not own.F32 else data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(GGUF's name, float32 values): rows of Llama's q and k are in the order of its rotary embedding."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    if (factors := _rope_factors(config)) is not None:
        yield ROPE_FACTORS, factors
    for name, parameter in model.named_parameters():  # a tied head is the embedding's
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"gguf: there is no name for {name}")
        values = parameter.detach().float().cpu()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            parts = values.view(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = parts.transpose(1, 2).reshape(values.shape)
        if values.dim() > 1 and values.shape[-1] % 32:
            raise ValueError(f"gguf: {name} has rows of {values.shape[-1]} values, and blocks have 32")
        yield theirs, values


def _rope_factors(config: Any) -> Tensor | None:
    """[head_dim / 2]: what Llama 3's frequencies are divided by; None of a plain rotary embedding."""
    parameters = config.rope_parameters
    if (kind := parameters.get("rope_type", "default")) == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"gguf: a rotary embedding of type {kind!r} is not written")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    factors: Tensor = plain / scaled
    return factors


# ---- metadata


def _copy_metadata(writer: gguf.GGUFWriter, source: Path) -> None:
    for name, field in gguf.GGUFReader(source).fields.items():
        if not name.startswith((*NOT_COPIED, "general.architecture")):
            nested = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=nested)


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """size: rows of the embedding, of which some tokenizers use fewer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        data = json.loads((Path(folder) / "tokenizer.json").read_bytes())
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(data))
        added = {token["id"]: token["special"] for token in data["added_tokens"]}
        by_id = {i: token for token, i in tokenizer.get_vocab().items()}
        writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
        writer.add_token_types([_token_type(i, by_id, added) for i in range(size)])
        vocabulary = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    vocabulary.chat_template = None  # the task's may be another
    vocabulary.add_to_gguf(writer, quiet=True)


def _token_type(i: int, by_id: Mapping[int, str], added: Mapping[int, bool]) -> gguf.TokenType:
    """added: the added tokens, and whether they are special."""
    if i not in by_id:
        return gguf.TokenType.UNUSED
    if i in added:
        return gguf.TokenType.CONTROL if added[i] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.NORMAL


def _pre(data: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    stages = data.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", [stages])
    said = [
        stage.get("pattern", {}).get("Regex", "?") if stage.get("type") == "Split" else "digits"
        for stage in stages
        if stage.get("type") in ("Split", "Digits")
    ]
    whole = data["model"]["type"] == "BPE" and len(said) < 2 and any(s.get("type") == "ByteLevel" for s in stages)
    if not whole or "".join(said) not in PRE:
        raise ValueError(
            "gguf: llama.cpp has no name that we know for how this tokenizer splits text: export a model, and use "
            "llama.cpp's own converter"
        )
    return PRE["".join(said)]
