"""NF4 in vLLM, through its public hooks for quantization methods and model loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.utils import set_weight_attrs

from longgrpo.model import nf4
from longgrpo.rollout.vllm_private import weight_views

NAME = "longgrpo_nf4"
"""What vLLM's `quantization` and `load_format` are to be set to."""


@register_quantization_config(NAME)
class NF4Config(QuantizationConfig):
    """Which of the engine's linears are packed. A fused one is left out as a whole if one of its parts is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # vLLM leaves it untyped
        self.packed: set[str] = set()

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # of bitsandbytes' kernels

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NF4Config:
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """A checkpoint in bitsandbytes' format is ours if we are asked for."""
        return NAME if user_quant == NAME else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.packed = nf4.packed_modules(Path(model_name))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return NF4Method() if all(f"{parent}.{part}" in self.packed for part in parts) else UnquantizedLinearMethod()


class NF4Method(LinearMethodBase):
    """Stores and computes what NF4Linear does: the parameters are laid out as its own, fused parts row upon row."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        codes, absmax = nf4.packed_shapes(sum(output_partition_sizes), input_size_per_partition)
        for name, shape, dtype in (("weight", codes, torch.uint8), ("absmax", absmax, torch.float32)):
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nf4.linear(x, layer.weight, layer.absmax, bias)


@register_model_loader(NAME)
class NF4Loader(BaseModelLoader):
    """Reads a checkpoint tensor by tensor, packing the weights that the model holds packed."""

    def download_model(self, model_config: Any) -> None:
        """The directory is here already."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        names = weight_views(model, model_config.get_vocab_size())
        packed = {name.removesuffix(".absmax") for name in names if name.endswith(".absmax")}
        load: Any = model.load_weights
        device = next(model.parameters()).device
        load(nf4.tensors(Path(model_config.model), packed, model_config.dtype, device))
