"""Small GGUF files, written by the gguf package as llama.cpp's converter does."""

import gguf
import numpy
import torch

CHARACTERS = [chr(code) for code in range(33, 127)]
DECODABLE = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits or kind.value < 2]


def write_gguf(path, model, architecture=None, raw=(), fields=(), **split):
    """`model` in float32, but for the tensors in `raw`: gguf name -> (bytes [rows, bytes], type)."""
    config = model.config
    architecture = architecture or config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture, **split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for key, value in fields:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    add_tokenizer(writer, config.vocab_size)
    raw = dict(raw)
    for name, tensor in gguf_tensors(model, architecture).items():
        data, kind = raw.pop(name, (tensor, gguf.GGMLQuantizationType.F32))
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, (data, kind) in raw.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_theta(config):
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)["rope_theta"]


def add_tokenizer(writer, size):
    tokens = ["<pad>", "<s>", "</s>", "ab", *CHARACTERS][:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, *[1] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def gguf_tensors(model, architecture):
    """The parameters as llama.cpp's converter changes them: q and k rows of Llama rotated, norms of Gemma plus one."""
    config = model.config
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if architecture == "llama" and "q_proj" in name:
            value = rotate(value, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            value = rotate(value, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return tensors


def rotate(weight, heads):
    shape = heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(kind, rows, columns, seed):
    """Bytes [rows, bytes] of type `kind`: any decode, but for the blocks whose scale is no number, which are zeroed."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = numpy.random.default_rng(seed).integers(0, 256, (rows * columns // block, size), dtype=numpy.uint8)
    with numpy.errstate(all="ignore"):
        values = gguf.dequantize(data.reshape(rows, -1), kind).reshape(-1, block)
    data[~numpy.isfinite(values).all(1)] = 0
    return data.reshape(rows, -1), kind


def decoded(data, kind):
    return torch.from_numpy(gguf.dequantize(data, kind).copy())
