"""Run by tests/model/test_gguf.py: python -m testing.gguf_memory DIRECTORY.

Bounds the memory of converting and of loading by counting it.
"""

import os
import sys
import threading
from pathlib import Path

import torch

from testing.gguf_files import write_gguf
from testing.models import random_model

WIDTH = 2048  # a square matrix of 16 MiB
TENSOR = WIDTH * WIDTH * 4
SLACK = 12 << 20  # of the interpreter's and the libraries' own, and a chunk being decoded


class Peak:
    """The largest anonymous memory of the process while the context lasts, above what it was at the start: mapped
    pages of files are the kernel's to drop."""

    def __enter__(self):
        self.start = self.peak = anonymous()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.grown = max(self.peak, anonymous()) - self.start


def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write(directory):
    sizes = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=WIDTH // 8, num_key_value_heads=2)
    model = random_model("llama", **sizes)
    write_gguf(directory / "large.gguf", model)
    return sum(p.nbytes for p in model.parameters())


def main(directory):
    os.environ["LONGGRPO_CACHE"] = str(directory / "cache")
    if os.fork() == 0:  # the model that is written is another process's
        write(directory)
        os._exit(0)
    os.wait()
    from longgrpo.model.load import load_model, resolve_model

    small = random_model("llama")
    write_gguf(directory / "small.gguf", small)
    load_model(resolve_model(str(directory / "small.gguf")))  # whatever is imported and made once
    with Peak() as converting:
        converted = resolve_model(str(directory / "large.gguf"))
    with Peak() as loading:
        model = load_model(converted, "bfloat16")
    size = sum(p.nbytes for p in model.parameters())
    print(
        f"converting {converting.grown / 2**20:.0f} MiB, loading {loading.grown / 2**20:.0f} of {size / 2**20:.0f} MiB"
    )
    assert size > 5 * TENSOR
    assert converting.grown <= 2 * TENSOR + SLACK
    assert loading.grown <= size + TENSOR + SLACK


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
