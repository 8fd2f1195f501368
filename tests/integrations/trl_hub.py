"""What TRL's tests load from Hugging Face's hub, made here: models of random weights with Qwen's vocabulary, whose ids
TRL's tests of tools spell out, and the data sets, which the scripts of a checkout of TRL make. Both lie under one
folder, HF_HOME of a process that runs offline."""

from __future__ import annotations

import base64
import importlib
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "intermediate_size": 32}  # fmt: skip
HEADS = {"head_dim": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, **HEADS}
MAMBA = {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 1,
         "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 32}  # fmt: skip
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
TEXT_MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": (CAUSAL, "qwen2", "qwen2_5", {}),
    "tiny-Qwen3ForCausalLM": (CAUSAL, "qwen3", "qwen3", HEADS),
    "tiny-Qwen3MoeForCausalLM": (CAUSAL, "qwen3_moe", "qwen3", {"num_experts": 4, **EXPERTS}),
    "tiny-LlamaForCausalLM-3.2": (CAUSAL, "llama", "qwen2_5", {}),
    "tiny-MistralForCausalLM-0.2": (CAUSAL, "mistral", "qwen2_5", {}),
    "tiny-Cohere2ForCausalLM": (CAUSAL, "cohere2", "qwen2_5", {"logit_scale": 1.0}),
    "tiny-Gemma2ForCausalLM": (CAUSAL, "gemma2", "qwen2_5", HEADS),
    "tiny-Glm4MoeForCausalLM": (CAUSAL, "glm4_moe", "qwen2_5", {"n_routed_experts": 4, **EXPERTS}),
    "tiny-GptOssForCausalLM": (CAUSAL, "gpt_oss", "qwen2_5", {"num_local_experts": 4, **EXPERTS}),
    "tiny-NemotronHForCausalLM-nano": (CAUSAL, "nemotron_h", "qwen2_5", {"n_routed_experts": 4, **EXPERTS, **MAMBA}),
    "tiny-RemoteForCausalLM": (CAUSAL, "llama", "qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": (CLASSIFIER, "qwen2", "qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": (CLASSIFIER, "qwen3", "qwen3", {"num_labels": 1, **HEADS}),
    "tiny-LlamaForSequenceClassification-3.2": (CLASSIFIER, "llama", "qwen2_5", {"num_labels": 1}),
}  # auto class, model type, TRL's chat template, what differs from SIZES
VISION = {**SIZES, "hidden_size": 16, "image_size": 28, "patch_size": 14, "vision_use_head": False}

QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
]  # in the order of their ids, behind the vocabulary; those in <|...|> are special


def make_hub(checkout: Path, vocabulary: str, home: Path, whole_for: str = "Qwen3") -> None:
    """All of it anew, with the lines "base64 rank" of qwen.tiktoken.

    TRL spells ids out for Qwen3 and, in two tests, for Qwen2; a short vocabulary saves the other models their time.
    """
    shutil.rmtree(home, ignore_errors=True)
    whole, short = qwen_tokenizer(vocabulary), qwen_tokenizer("\n".join(vocabulary.splitlines()[:2000]))
    for name in TEXT_MODELS:
        make_text_model(name, whole if whole_for in name else short, home)
    add_remote_code(snapshot(home, "tiny-RemoteForCausalLM"), checkout)
    make_vision_models(short, home)
    make_data_sets(checkout, home)


def snapshot(home: Path, name: str) -> Path:
    """Where `from_pretrained("trl-internal-testing/" + name)` looks offline."""
    folder = home / "hub" / f"models--trl-internal-testing--{name}"
    directory = folder / "snapshots" / ("0" * 40)
    directory.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(directory.name)
    return directory


def qwen_tokenizer(vocabulary: str) -> Qwen2Tokenizer:
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, vocabulary.splitlines())}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in ranks:  # by rank, as the file is
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks)
        merges += [(text(a), text(b)) for *_, a, b in known]
    ids = {text(token): rank for token, rank in ranks.items()}
    ids |= {token: len(ranks) + i for i, token in enumerate(QWEN_TOKENS)}  # before eos_token and pad_token take an id
    tokenizer = Qwen2Tokenizer(
        ids, merges,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, special=token[1] == "|", normalized=False) for token in QWEN_TOKENS])
    return tokenizer


def chat_template(name: str) -> str:
    return (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text()


def special_ids(tokenizer: Any) -> dict[str, Any]:
    return {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}


def make_text_model(name: str, tokenizer: Qwen2Tokenizer, home: Path) -> None:
    auto_class, model_type, template, own = TEXT_MODELS[name]
    sizes = {**SIZES, **own, "vocab_size": len(tokenizer), **special_ids(tokenizer)}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    tokenizer.chat_template = chat_template(template)
    save(auto_class, config, tokenizer, snapshot(home, name))


def save(auto_class: str, config: Any, processor: Any, directory: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config)
    for module in model.modules():  # larger than the default, whose gradients vanish beside a weight
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)


def add_remote_code(directory: Path, checkout: Path) -> None:
    """The Llama there becomes a model of the checkout's own class, which is not part of transformers."""
    for file in (checkout / "scripts/generate_tiny_models/for_causal_lm/_remote_code").glob("*_remote.py"):
        shutil.copy(file, directory)
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "configuration_remote.RemoteConfig", CAUSAL: "modeling_remote.RemoteForCausalLM"}
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))


# ---- models of images, whose processors get along without torchvision ----


def pil_processor(model_type: str, name: str, **options: Any) -> Any:
    module = importlib.import_module(f"transformers.models.{model_type}.image_processing_pil_{model_type}")
    return getattr(module, f"{name}ImageProcessorPil")(**options)


def processor_without_video() -> type:
    """Qwen2.5-VL's, whose processor of videos needs torchvision, without that one."""

    class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            for kind in ("image", "video"):
                setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
                setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
            transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return Qwen2_5_VLProcessor


def make_vision_models(tokenizer: Qwen2Tokenizer, home: Path) -> None:
    plain = home / "tokenizer"
    tokenizer.save_pretrained(plain)
    for make in (gemma3, llava_next, qwen2_5_vl):
        name, processor, config = make(plain)
        save("AutoModelForImageTextToText", config, processor, snapshot(home, f"tiny-{name}ForConditionalGeneration"))


def text_sizes(tokenizer: Any, **own: Any) -> dict[str, Any]:
    return {**SIZES, "hidden_size": 16, "head_dim": 4, "vocab_size": len(tokenizer), **special_ids(tokenizer), **own}


def gemma3(plain: Path) -> tuple[str, Any, Any]:
    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain, extra_special_tokens=tokens, bos_token="<|im_start|>")
    images = pil_processor("gemma3", "Gemma3", size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(
        images, tokenizer, chat_template=chat_template("gemma3"), image_seq_length=4
    )
    config = transformers.AutoConfig.for_model(
        "gemma3", text_config=text_sizes(tokenizer), vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return "Gemma3", processor, config


def llava_next(plain: Path) -> tuple[str, Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain, extra_special_tokens={"image_token": "<image>"})
    tiles = [[28, 56], [56, 28]]
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_grid_pinpoints": tiles}
    processor = transformers.LlavaNextProcessor(
        pil_processor("llava_next", "LlavaNext", **crop), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", chat_template=chat_template("llava_next"),
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "llava_next", text_config=text_sizes(tokenizer, model_type="mistral"),
        vision_config={**VISION, "model_type": "clip_vision_model"}, image_grid_pinpoints=tiles, image_seq_length=4,
        image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    return "LlavaNext", processor, config


def qwen2_5_vl(plain: Path) -> tuple[str, Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = pil_processor("qwen2_vl", "Qwen2VL", size=pixels)
    processor = processor_without_video()(images, tokenizer, chat_template=chat_template("qwen2_5_vl"))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    vision = {"hidden_size": 16, "num_heads": 4, "depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 16,
              "intermediate_size": 32}  # fmt: skip
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
              "vision_end": "<|vision_end|>"}  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "qwen2_5_vl", text_config=text_sizes(tokenizer, rope_parameters=rope), vision_config=vision,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
    )  # fmt: skip
    return "Qwen2_5_VL", processor, config


# ---- data sets ----


def make_data_sets(checkout: Path, home: Path) -> None:
    """The checkout's scripts make them and would push them to the hub."""
    import numpy
    from datasets import DatasetDict

    def keep(data: DatasetDict, repository: str, config_name: str) -> None:
        data.save_to_disk(home / repository / config_name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetDict, "push_to_hub", keep)
        for name in ("zen", "zen_image", "zen_multi_image"):
            numpy.random.seed(0)
            make = runpy.run_path(str(checkout / f"scripts/generate_{name}_dataset.py"))["main"]
            make(0.1, True, f"trl-internal-testing/{name.replace('_', '-')}")


def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
    """datasets.load_dataset for what `make_data_sets` left under HF_HOME."""
    from datasets import IterableDatasetDict, load_from_disk

    data = load_from_disk(Path(os.environ["HF_HOME"]) / path / name)
    if streaming:
        data = IterableDatasetDict({key: part.to_iterable_dataset() for key, part in data.items()})
    return data if split is None else data[split]
