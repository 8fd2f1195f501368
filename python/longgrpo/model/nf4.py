"""Linear layers in bitsandbytes' NF4: 4-bit codes, and an absmax that scales each block of 64 values.

The blocks run along a row (in_features % 64 == 0), so that the rows of a packed matrix are rows of its two tensors. The
parts of a fused projection are then plain slices, and one packed copy serves the engine and the trainer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo.model.files import model_config, reading

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import PreTrainedModel

BLOCK = 64
STORED = ".weight.quant_state.bitsandbytes__nf4"
"""The key that bitsandbytes saves for a module whose weight is packed."""

CHUNK = 1 << 22  # elements packed at a time: bitsandbytes' CPU path needs several times what it packs


class NF4Linear(torch.nn.Linear):
    """A frozen linear layer on packed weights: weight uint8 [N, K / 2], absmax f32 [N, K / 64], bias [N] or None.

    On a CPU with AVX512-BF16 bitsandbytes' own Linear4bit repacks its weight as soon as it runs in eval mode: the
    storage is no longer shared, and gradients computed afterwards are wrong without an error. This one never does.
    """

    weight: torch.nn.Parameter
    absmax: torch.nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        codes, absmax = packed_shapes(out_features, in_features)
        self.weight = torch.nn.Parameter(torch.empty(codes, dtype=torch.uint8), requires_grad=False)
        self.absmax = torch.nn.Parameter(torch.empty(absmax, dtype=torch.float32), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.absmax, self.bias)


def packed_shapes(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the codes (uint8, two to a byte) and of absmax (f32) of a [rows, columns] matrix."""
    return (rows, columns // 2), (rows, columns // BLOCK)


def linear(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias [..., N] for x [..., K], in x's dtype; differentiable in x, for which W is unpacked once more."""
    from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]  # public, and not in its __all__

    # Of more than two dimensions and with a bias its result is a view, to which an adapter could not be added in place.
    rows = x if bias is None else x.flatten(0, -2)
    y: Tensor = matmul_4bit(rows, codes.view(-1, 1), _state(codes, absmax, x.dtype), bias=bias)
    return y.view(*x.shape[:-1], -1)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """codes uint8 [N, K / 2] and absmax f32 [N, K / 64] of weight [N, K], K % 64 == 0."""
    from bitsandbytes.functional import quantize_4bit

    rows = max(1, CHUNK // weight.shape[1])
    parts = [quantize_4bit(part, blocksize=BLOCK, quant_type="nf4") for part in weight.split(rows)]
    codes, absmax = packed_shapes(*weight.shape)
    return torch.cat([c for c, _ in parts]).view(codes), torch.cat([state.absmax for _, state in parts]).view(absmax)


def unpack(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that codes [N, K / 2] and absmax [N, K / 64] stand for."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(codes.view(-1, 1), _state(codes, absmax, dtype))


def _state(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> QuantState:
    from bitsandbytes.functional import QuantState

    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    return QuantState(absmax.view(-1), shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)


def pack_modules(model: PreTrainedModel, names: set[str]) -> None:
    """Replaces the linears of `model` that `names` names by NF4Linears on meta, to be loaded."""
    for name in names:
        module: Any = model.get_submodule(name)
        with torch.device("meta"):
            packed = NF4Linear(module.in_features, module.out_features, module.bias is not None, module.weight.dtype)
        model.set_submodule(name, packed)


def check_checkpoint(directory: Path, quantization: str | None) -> None:
    """Raises ValueError if the checkpoint in `directory` cannot be loaded with `quantization` (nf4 or None)."""
    if quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("model.quantization = 'nf4' needs bitsandbytes: pip install bitsandbytes")
    stored = _quantization_config(directory)
    if not stored:
        return
    kind = _kind(stored)
    if kind != "bitsandbytes nf4":
        raise ValueError(
            f"{directory} is quantized already, by {kind}, which cannot be trained here: take the model in bfloat16, "
            "or in bitsandbytes nf4"
        )
    if quantization is None:
        raise ValueError(f"{directory} is quantized already, in bitsandbytes nf4: set model.quantization: nf4")


def stored_modules(directory: Path) -> set[str]:
    """The modules that the checkpoint in `directory` stores in NF4."""
    return {name.removesuffix(STORED) for name in Checkpoint(directory).files if name.endswith(STORED)}


def packed_modules(directory: Path) -> set[str]:
    """The modules to hold in NF4, the head never: those that the checkpoint stores so, or, if it stores none, every
    linear but those that its config leaves out (llm_int8_skip_modules) and those whose rows are no whole blocks."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = _quantization_config(directory).get("llm_int8_skip_modules") or []
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config(directory))
    head = model.get_output_embeddings()
    if stored := stored_modules(directory):
        return {name for name in stored if model.get_submodule(name) is not head}
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and module.in_features % BLOCK == 0
        and should_convert_module(name, left_out)
    }
    if not names:
        raise ValueError(f"{directory}: none of its linear layers has rows of whole blocks of {BLOCK}: nothing to pack")
    return names


def tensors(
    directory: Path, packed: set[str], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) of the checkpoint in `directory`, one in memory at a time: the modules in `packed` as
    `weight` and `absmax`, whether the checkpoint stores them so or not, and everything else in `dtype`, likewise."""
    checkpoint = Checkpoint(directory)
    for name in checkpoint.files:
        module, _, kind = name.rpartition(".")
        if ".weight." in name:
            continue  # belongs to a stored weight, and is read with it
        stored = kind == "weight" and module + STORED in checkpoint.files
        if kind == "weight" and module in packed:
            codes, absmax = _read_packed(checkpoint, module) if stored else pack(checkpoint[name].to(device))
            yield name, codes.to(device)
            yield f"{module}.absmax", absmax.to(device)
        elif stored:
            yield name, unpack(*_read_packed(checkpoint, module), dtype).to(device)
        else:
            yield name, checkpoint[name].to(device, dtype)


class Checkpoint:
    """The safetensors of a directory as one mapping, each tensor read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _read_packed(checkpoint: Checkpoint, module: str) -> tuple[Tensor, Tensor]:
    """codes and absmax as bitsandbytes stored them, absmax out of its own 8 bits."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    prefix = f"{module}.weight."
    parts = {name.removeprefix(prefix): checkpoint[name] for name in checkpoint.files if name.startswith(prefix)}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    columns = state.shape[-1]
    if state.blocksize != BLOCK or columns % BLOCK:
        raise ValueError(
            f"{module} is packed in blocks of {state.blocksize} over rows of {columns}: only blocks of {BLOCK} that "
            "fill the rows can be shared with the engine"
        )
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    codes, scales = packed_shapes(*state.shape)
    return checkpoint[f"{module}.weight"].view(torch.uint8).view(codes), absmax.float().view(scales)


def _quantization_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    config = reading(path, lambda: json.loads(path.read_bytes()))
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _kind(stored: dict[str, Any]) -> str:
    """What a checkpoint's quantization_config says that it is."""
    method = stored.get("quant_method") or "an unnamed method"
    if method != "bitsandbytes":
        return method
    return (
        f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
        if stored.get("load_in_4bit")
        else "bitsandbytes int8"
    )
