"""Which engine a run gets."""

from __future__ import annotations

import importlib.util
import logging

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.model.files import check_finite
from longgrpo.model.load import resolve_model
from longgrpo.model.lora import check_lora
from longgrpo.rollout.protocol import RolloutEngine

log = logging.getLogger(__name__)


def make_engine(config: RolloutConfig, model: ModelConfig, lora: LoraConfig | None = None) -> RolloutEngine:
    """Builds the engine that `config` names; "auto" takes vLLM if it is installed, else transformers. `lora`: of the
    adapter that will be attached, for the engine that makes room for it; one that cannot be is refused first."""
    if lora:
        check_lora(resolve_model(model.path, model.quantization), lora)
    name = config.engine
    if unknown := config.not_recomputed:
        log.warning(
            "rollout.sampling: the trainer cannot compute the effect of %s on the distribution; the ratio of trainer's "
            "to engine's probability shows it, and importance_ratio_mean how far it is from 1",
            ", ".join(unknown),
        )
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        log.info("rollout engine: %s%s", name, "" if name == "vllm" else " (vllm is not installed)")
    if name == "vllm":
        from longgrpo.rollout.vllm import VllmEngine

        return _finite(VllmEngine(config, model, lora), model)
    if name == "transformers":
        from longgrpo.rollout.transformers import TransformersEngine

        return _finite(TransformersEngine(config, model), model)
    raise ValueError(f"rollout.engine = {name!r}: known engines are auto, vllm and transformers")


def _finite(engine: RolloutEngine, model: ModelConfig) -> RolloutEngine:
    try:
        check_finite(engine.model, model.path)
    except ValueError:
        engine.close()
        raise
    return engine
