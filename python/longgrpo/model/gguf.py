"""GGUF files, whole or in shards, decoded tensor by tensor into a checkpoint in the Hugging Face format.

transformers knows the architectures (its names for GGUF's tensors, and what llama.cpp does to their values), the gguf
package decodes the tensor types. Reading is ours: transformers decodes the whole model before it builds one, and of a
file in shards it loads the first and leaves the rest random.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy
import torch
from torch import Tensor

from longgrpo.model.files import LOCAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Dense ones, in which each of GGUF's tensors is one parameter."""

ROPE_FACTORS = "rope_freqs.weight"

ROPE: dict[str, tuple[Any, ...] | None] = {
    "freq_base": None,
    "dimension_count": None,
    "freq_base_swa": (10000.0,),
    "scale_linear": (1.0,),
    "scaling.type": ("none",),
    "scaling.factor": (0.0, 1.0),
    "scaling.attn_factor": (1.0,),
    "scaling.original_context_length": None,
    "scaling.finetuned": (False,),
}
"""The keys of rope that are read (None), or that change nothing at these values."""

TOKENIZER: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("model", "pre", "tokens", "token_type", "token_type_count", "merges", "scores")),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix")),
    **dict.fromkeys(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "padding", "unknown")),
    **dict.fromkeys(f"{name}_token_id" for name in ("seperator", "cls", "mask")),
    **dict.fromkeys(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    **dict.fromkeys(f"{name}_token_id" for name in ("prefix", "suffix", "middle")),
    "remove_extra_whitespaces": (False,),
    "add_sep_token": (False,),
}

LONGEST = 1 << 21  # entries of an array in the header; a vocabulary has fewer than 300,000
CHUNK = 1 << 20  # elements decoded at a time, a multiple of every type's block
EXACT = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
"""Types that a checkpoint holds as they are; the values of the others are exact only in float32."""


def shards(path: Path) -> list[Path]:
    """The files of the model whose first file is `path`, by llama.cpp's names for shards (nothing is read).

    Raises ValueError if `path` is a later shard, FileNotFoundError if one is missing.
    """
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", path.stem)
    if not named:
        return [path]
    files = [path.with_name(f"{named[1]}-{i:05}-of-{named[3]}.gguf") for i in range(1, int(named[3]) + 1)]
    if path != files[0]:
        raise ValueError(f"{path} is a later shard: set model.path to the first, {files[0].name}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path} is the first of {len(files)} shards; missing beside it: {', '.join(missing)}")
    return files


def convert(files: list[Path], directory: Path) -> None:
    """Writes the model in `files` (see shards) and its tokenizer into `directory`.

    Memory never holds more than about two tensors. Raises ValueError, before anything is written, for an
    architecture, a tensor type or a tensor that cannot be taken, for a truncated file and for a full disk.
    """
    from transformers import AutoTokenizer

    source = _Source(files)
    model, names = _outline(source)
    sizes = [tensor.n_elements * _dtype(tensor).itemsize for _, tensor in source.tensors.values()]
    directory.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(directory).free) < sum(sizes):
        raise ValueError(
            f"{files[0]} decodes to {sum(sizes) / 1e9:.1f} GB and {directory.parent} has {free / 1e9:.1f} GB free: "
            "make room, or set LONGGRPO_CACHE to a larger disk"
        )
    _write(_decoded(source, model.config, names), directory, limit=max(sizes))
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name, **LOCAL)
    _set_specials(tokenizer, source)
    tokenizer.save_pretrained(directory)
    ends = [_field(source.header, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if len(ids := list(dict.fromkeys(end for end in ends if end is not None))) > 1:
        model.generation_config.eos_token_id = ids  # llama.cpp stops at each
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)


def _set_specials(tokenizer: Any, source: _Source) -> None:
    """Whether a text gets a BOS and an EOS token, if the file says so."""
    said = {name: _field(source.header, f"tokenizer.ggml.{name}") for name in ("add_bos_token", "add_eos_token")}
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        setattr(tokenizer, name, value)
    if said:
        tokenizer.update_post_processor()


class _Reader(gguf.GGUFReader):
    """Looks at every tensor's type and place before the library maps any of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        """Beyond the end of the file the library reads on, value after value of no bytes."""
        end = int(offset) + numpy.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"a value of its header ends at byte {end:,}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY and (count := int(self._get(orig_offs + 4, numpy.uint64)[0])) > LONGEST:
            raise ValueError(f"an array of its header has {count:,} entries")
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        size = self.path.stat().st_size
        for field in fields:
            _, name_bytes, _, dims, raw_type, offset = field.parts
            name = bytes(name_bytes).decode()
            block, block_bytes = gguf.GGML_QUANT_SIZES[self._type(name, int(raw_type[0]))]
            end = int(start_offs) + int(offset[0]) + math.prod(map(int, dims)) // block * block_bytes
            if end > size:
                raise _Refused(
                    f"{self.path} is truncated: its tensor {name} ends at byte {end:,}, the file at {size:,}; "
                    "download it again"
                )
        super()._build_tensors(start_offs, fields)

    def _type(self, name: str, raw: int) -> gguf.GGMLQuantizationType:
        try:
            kind = gguf.GGMLQuantizationType(raw)
            gguf.dequantize(numpy.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
        except (ValueError, NotImplementedError):
            known = [k.value for k in gguf.GGMLQuantizationType]
            what = gguf.GGMLQuantizationType(raw).name if raw in known else f"number {raw}"
            raise _Refused(
                f"{self.path}: tensor {name} has type {what}, which gguf {version('gguf')} does not decode; "
                "use a file in other types"
            ) from None
        return kind


class _Refused(ValueError):
    """A file that is read rightly and cannot be taken."""


def _read(path: Path) -> _Reader:
    try:
        reader = _Reader(path)
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is no whole GGUF file: {error}") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{path} is a big-endian GGUF file: use the little-endian one")
    return reader


def _field(reader: _Reader, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


class _Source:
    """The metadata of the first file, and the tensors of all: name -> (file, what the library knows of it)."""

    def __init__(self, files: list[Path]) -> None:
        self.path = files[0]
        readers = [_read(file) for file in files]
        self.header = readers[0]
        self.tensors = {tensor.name: (reader.path, tensor) for reader in readers for tensor in reader.tensors}
        self._check_split(readers)
        self.architecture = _field(self.header, "general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: architecture {self.architecture!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        self._check_layers()
        self._check_keys(f"{self.architecture}.rope.", ROPE, "rope scaling")
        self._check_keys("tokenizer.ggml.", TOKENIZER, "a tokenizer with")

    def _check_layers(self) -> None:
        """Before anything is built by the metadata: by a number that is wrong it could be built for hours."""
        key = f"{self.architecture}.block_count"
        named = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if (said := _field(self.header, key)) != len(named):
            raise ValueError(f"{self.path}: {key} = {str(said)[:40]}, and it holds tensors of {len(named)} layers")

    def _check_keys(self, prefix: str, known: dict[str, tuple[Any, ...] | None], what: str) -> None:
        """Raises ValueError for a key that would change the model, and is not read."""
        for key in (key for key in self.header.fields if key.startswith(prefix)):
            neutral = known.get(key.removeprefix(prefix), ())
            if neutral is not None and (value := _field(self.header, key)) not in neutral:
                raise ValueError(
                    f"{self.path}: {what} {str(value)[:40]!r} is not supported ({key}); take the model in safetensors"
                )

    def _check_split(self, readers: list[_Reader]) -> None:
        for i, reader in enumerate(readers):
            number, count = _field(reader, "split.no") or 0, _field(reader, "split.count") or 1
            if (number, count) != (i, len(readers)):
                raise ValueError(
                    f"{reader.path} says it is shard {number + 1} of {count}, its name {i + 1} of {len(readers)}: "
                    "give the shards their first names, NAME-00001-of-00003.gguf"
                )
        expected = _field(self.header, "split.tensors.count") or len(self.tensors)
        if len(self.tensors) != expected:
            raise ValueError(f"{self.path}: its shards hold {len(self.tensors)} tensors, and should hold {expected}")

    def processor(self, config: PreTrainedConfig) -> Any:
        """Undoes what llama.cpp does to an architecture's values: rotated q and k rows, norms plus one."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        make: Callable[..., TensorProcessor] = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        return make(config=config.to_dict())


def _dtype(tensor: gguf.ReaderTensor) -> torch.dtype:
    return EXACT.get(tensor.tensor_type, torch.float32)


def _outline(source: _Source) -> tuple[Any, dict[str, str]]:
    """The model on meta, and its parameters' names by GGUF's. Raises ValueError if the two do not match."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name, **LOCAL)
    config.tie_word_embeddings = "output.weight" not in source.tensors  # which may stand in a later shard
    if head_dim := _field(source.header, f"{source.architecture}.attention.key_length"):
        config.head_dim = head_dim  # read by transformers for some architectures only
    _check_rotated(source, config)
    if factors := source.tensors.get(ROPE_FACTORS):
        _set_llama3_rope(config, _decode(*factors), source.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.architectures = [type(model).__name__]
    by_gguf_name = get_gguf_hf_weights_map(model, source.processor(config), source.architecture)
    names = {name: by_gguf_name.get(name, name) for name in source.tensors if name != ROPE_FACTORS}
    _check_shapes(source.path, model, {names[name]: source.tensors[name][1] for name in names})
    return model, names


def _check_rotated(source: _Source, config: PreTrainedConfig) -> None:
    key = f"{source.architecture}.rope.dimension_count"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (rotated := _field(source.header, key) or head_dim) != head_dim:
        raise ValueError(f"{source.path}: {key} = {rotated} of {head_dim} is not supported: take it in safetensors")


def _check_shapes(path: Path, model: Any, tensors: dict[str, gguf.ReaderTensor]) -> None:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}  # a tied head is the embedding's
    if unknown := sorted(set(tensors) - set(shapes)):
        raise ValueError(f"{path}: {type(model).__name__} has no place for tensor {unknown[0]}")
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing in it")
        found = [int(n) for n in reversed(tensors[name].shape)]
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {found} in it, and {shape} by its metadata")


def _set_llama3_rope(config: PreTrainedConfig, factors: Tensor, path: Path) -> None:
    """llama.cpp stores what the rotary frequencies are divided by (f32 [head_dim / 2]); the config holds the rule.

    Llama 3.1's and 3.2's rules differ only in the factor. Raises ValueError if neither gives `factors`.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = theta ** -(torch.arange(len(factors)) / len(factors))
    if len(scaled) != len(factors) or not torch.allclose(plain / scaled, factors, rtol=1e-4):
        raise ValueError(f"{path}: its rope_freqs.weight is not Llama 3's rule; take the model in safetensors")


def _decoded(source: _Source, config: PreTrainedConfig, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name, its value), one in memory at a time."""
    processor = source.processor(config)
    for gguf_name, name in names.items():
        path, tensor = source.tensors[gguf_name]
        values = processor.process(weights=_decode(path, tensor).numpy(), name=gguf_name).weights
        yield name, torch.from_numpy(values).to(_dtype(tensor)).contiguous()


def _decode(path: Path, tensor: gguf.ReaderTensor) -> Tensor:
    """The values of a tensor in the file at `path`, f32 in torch's order of dimensions.

    Read by plain reads and not through the library's mapping, whose pages would all stay in memory; in chunks, since
    the library's arithmetic needs several times what it decodes.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    values = torch.empty([int(n) for n in reversed(tensor.shape)])
    with path.open("rb") as file:
        file.seek(tensor.data_offset)
        for chunk in values.view(-1).split(CHUNK):
            raw = numpy.fromfile(file, numpy.uint8, len(chunk) // block * block_bytes)
            chunk.copy_(torch.from_numpy(gguf.dequantize(raw[None], tensor.tensor_type)[0]))
    return values


def _write(tensors: Iterable[tuple[str, Tensor]], directory: Path, limit: int) -> None:
    """safetensors files, each closed by the tensor that takes it to `limit` bytes, and their index."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def write_held() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        if sum(t.nbytes for t in held.values()) >= limit:
            write_held()
    if held:
        write_held()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
