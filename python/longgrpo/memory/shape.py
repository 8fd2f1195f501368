"""The shape of a model, from only its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longgrpo.model.files import reading
from longgrpo.model.load import SMOLLM2, resolve_model


class Linear(NamedTuple):
    """A linear layer of a decoder layer; its weight is [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


class UnknownArchitecture(ValueError):
    """A model whose memory can be neither computed nor counted."""


@dataclass(frozen=True)
class Family:
    """In what the decoder layers of an architecture differ from Llama's, as far as memory is concerned."""

    qkv_bias: bool = False
    head_norms: bool = False  # RMS norms over the head dimension of queries and keys
    fused: bool = False  # one linear for q, k and v, one for gate and up
    norms: int = 2  # RMS norms of H a layer


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "phi3": Family(fused=True),  # Phi-3, Phi-3.5, Phi-4
    "gemma": Family(),
}


_SIZES = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size",
    "max_position_embeddings", "num_key_value_heads", "head_dim", "tie_word_embeddings", "sliding_window",
    "use_sliding_window",
)  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    kind: str  # config.json's model_type
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    context: int  # tokens that the positions reach
    tied: bool  # the head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    @property
    def has_formulas(self) -> bool:
        """Whether family, linears and what follows from them are known."""
        return self.kind in FAMILIES

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[Linear]:
        """Those of one decoder layer."""
        h, q, kv, i = self.hidden, self.q_width, self.kv_width, self.mlp
        bias = self.attention_bias or self.family.qkv_bias
        if self.family.fused:
            first = [Linear("qkv_proj", h, q + 2 * kv, bias)]
            gates = [Linear("gate_up_proj", h, 2 * i, self.mlp_bias)]
        else:
            first = [Linear("q_proj", h, q, bias), Linear("k_proj", h, kv, bias), Linear("v_proj", h, kv, bias)]
            gates = [Linear("gate_proj", h, i, self.mlp_bias), Linear("up_proj", h, i, self.mlp_bias)]
        return [*first, Linear("o_proj", q, h, self.attention_bias), *gates, Linear("down_proj", i, h, self.mlp_bias)]

    @property
    def linear_weights(self) -> int:
        """Elements of the weights of all decoder layers' linears."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """Elements of everything else but embedding and head: norms and biases."""
        norms = self.family.norms * self.hidden + (2 * self.head_dim if self.family.head_norms else 0)
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.layers * (norms + biases) + self.hidden

    @property
    def embeddings(self) -> int:
        """Elements of the embedding and, if it is not the same matrix, the head."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.other_weights + self.embeddings


def model_shape(path: str) -> ModelShape:
    """The shape of the model that `model.path` names; for a hub id only config.json is fetched.

    Raises FileNotFoundError if there is none, UnknownArchitecture if transformers does not know it either, or
    ValueError if config.json lacks a size.
    """
    file = config_file(path)
    return shape_from_config(reading(file, lambda: json.loads(file.read_bytes())), path)


def shape_from_config(config: dict[str, Any], source: str) -> ModelShape:
    kind = str(config.get("model_type"))
    sizes = config if kind in FAMILIES else _sizes_of_class(config, source)
    try:
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        return ModelShape(
            kind=kind,
            layers=sizes["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=sizes.get("num_key_value_heads") or heads,
            head_dim=sizes.get("head_dim") or hidden // heads,
            mlp=sizes["intermediate_size"],
            vocabulary=sizes["vocab_size"],
            context=sizes["max_position_embeddings"],
            tied=sizes.get("tie_word_embeddings", kind == "gemma"),
            attention_bias=sizes.get("attention_bias", False),
            mlp_bias=sizes.get("mlp_bias", False),
            sliding_window=sizes.get("sliding_window") if sizes.get("use_sliding_window", True) else None,
        )
    except KeyError as error:
        raise ValueError(f"{source}: config.json has no {error}") from None


def _sizes_of_class(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The sizes of a model whose config.json may have other names for them, or leave them to its class's defaults."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.for_model(**config).get_text_config()
    except (KeyError, ValueError, TypeError) as error:
        raise UnknownArchitecture(
            f"{source}: transformers does not know the architecture {config.get('model_type')!r}: {error}"
        ) from error
    names = {name: getattr(text, name, None) for name in _SIZES}
    sizes = {name: value for name, value in names.items() if value is not None}
    if "hidden_size" in sizes:
        sizes.setdefault(
            "intermediate_size", 4 * sizes["hidden_size"]
        )  # the usual width, if the class has no name for it
    return sizes


def config_file(path: str) -> Path:
    """config.json of the model that `path` names."""
    directory = Path(path).expanduser()
    if path == SMOLLM2 or directory.exists() or path.count("/") != 1:
        return resolve_model(path) / "config.json"  # or its error
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model.path = {path!r} is not a local directory, and the hub did not give its config.json: {error}"
        ) from error
