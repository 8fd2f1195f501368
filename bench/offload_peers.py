"""Activation offload beside its peers, in one run on one model: bytes moved, peak device and host bytes, step time.

On a machine without a GPU the model's own memory plays the device: what a program keeps for the backward counts as
host memory, what it brings back as device memory, and every transfer is a real copy. Bytes are exact; times are those
of this CPU and say nothing about PCIe. A peak is that of live storages, weights apart. Peers' pinned memory is what
torch's allocator rounds it up to, by its rule: the next power of two for each block.

    python bench/offload_peers.py [--tokens 2048] [--layers 30] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from longgrpo import linear_logprob
from longgrpo.model.tiled_mlp import tile_mlp, untile_mlp
from longgrpo.offload import OffloadEngine
from longgrpo.offload.record import Offloaded

MIB = 1 << 20


@dataclass
class Row:
    program: str
    moved_out: float = 0.0  # MiB a step
    moved_in: float = 0.0
    device_peak: float = 0.0  # MiB beyond the weights
    host: float = 0.0  # MiB, exact
    host_pinned: float = 0.0  # MiB as the program's allocator reserves it
    seconds: float = 0.0
    ratio: float = 0.0  # to checkpointing without offload, median over rounds
    exact: bool = False  # gradients equal those of checkpointing bit for bit


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that ops return until they die, on the side that is `host` at the time."""

    def __init__(self, known: torch.nn.Module) -> None:
        super().__init__()
        self.seen = {p.untyped_storage()._cdata for p in known.parameters()}
        self.live = {False: 0, True: 0}
        self.peak = {False: 0, True: 0}
        self.host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, side, size = storage._cdata, self.host, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live[side] += size
        self.peak[side] = max(self.peak[side], self.live[side])
        weakref.finalize(storage, self.forget, key, side, size)

    def forget(self, key: int, side: bool, size: int) -> None:
        self.seen.discard(key)
        self.live[side] -= size


class SaveOnHost(torch.autograd.graph.saved_tensors_hooks):
    """torch.autograd.graph.save_on_cpu's rule for every saved tensor that is no weight, with a real copy each way."""

    moved_out = moved_in = rounded = peak_rounded = 0
    least = 0
    counter: LiveStorages | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(self.pack, self.unpack)

    @classmethod
    def side(cls, host: bool) -> None:
        if cls.counter is not None:
            cls.counter.host = host

    @classmethod
    def pack(cls, tensor: Tensor) -> Any:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter) or tensor.nbytes < cls.least:
            return tensor.detach()
        cls.side(True)
        out = tensor.detach().clone()
        cls.side(False)
        cls.moved_out += out.nbytes
        size = 1 << max(out.nbytes - 1, 0).bit_length()
        cls.rounded += size
        cls.peak_rounded = max(cls.peak_rounded, cls.rounded)
        return _Held(out, size)

    @classmethod
    def unpack(cls, held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        cls.moved_in += held.tensor.nbytes
        return held.tensor.clone()


class _Held:
    def __init__(self, tensor: Tensor, size: int) -> None:
        self.tensor, self.size = tensor, size

    def __del__(self) -> None:
        SaveOnHost.rounded -= self.size


def checkpointed(model: Any, **options: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **options)


Prepare = Callable[[Any], AbstractContextManager[Any]]


def plain(model: Any) -> AbstractContextManager[Any]:
    checkpointed(model)
    return nullcontext()


def save_on_cpu(model: Any) -> AbstractContextManager[Any]:
    checkpointed(model)
    return SaveOnHost()


def all_tensors(model: Any) -> AbstractContextManager[Any]:
    model.gradient_checkpointing_disable()
    SaveOnHost.least = 1024
    return SaveOnHost()


def transformers_offload(model: Any) -> AbstractContextManager[Any]:
    transformers.modeling_utils.save_on_cpu = SaveOnHost  # a real copy where there is no second device
    checkpointed(model, offload=True)
    return nullcontext()


PEERS: dict[str, Prepare] = {
    "checkpointing": plain,
    "torch save_on_cpu around checkpoints": save_on_cpu,
    "every saved tensor (TRL, torchtune)": all_tensors,
    "transformers offload=True": transformers_offload,
}
OURS = {"longgrpo": False, "longgrpo, selective": True}


def step(model: Any, ids: Tensor) -> None:
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]  # [T - 1, H]
    (-linear_logprob(hidden, inner.lm_head.weight, ids[0, 1:], workspace=32 << 20).logp.mean()).backward()


def run(name: str, model: Any, ids: Tensor, counter: LiveStorages | None, engines: dict[str, OffloadEngine]) -> float:
    SaveOnHost.moved_out = SaveOnHost.moved_in = SaveOnHost.peak_rounded = SaveOnHost.least = 0
    SaveOnHost.counter = counter
    if name in OURS:
        engines[name].install(model, selective=OURS[name])
        context: AbstractContextManager[Any] = nullcontext()
    else:
        context = PEERS[name](model)
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with counter or nullcontext(), context:
        step(model, ids)
    return time.perf_counter() - start


def measure(name: str, model: Any, ids: Tensor, engines: dict[str, OffloadEngine], reference: list[Tensor]) -> Row:
    if name in OURS:
        engines[name] = OffloadEngine(min_bytes=64 << 10)
    counter = LiveStorages(model)
    run(name, model, ids, counter, engines)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    row = Row(name, SaveOnHost.moved_out / MIB, SaveOnHost.moved_in / MIB, counter.peak[False] / MIB)
    row.host, row.host_pinned = counter.peak[True] / MIB, SaveOnHost.peak_rounded / MIB
    if name in OURS:
        engines[name].synchronize()
        s = engines[name].stats()
        row.moved_out, row.moved_in = s["bytes_out"] / MIB, s["bytes_in"] / MIB
        row.device_peak += s["device_live"] / MIB  # made inside an op, which the count does not see
        row.host, row.host_pinned = s["host_peak"] / MIB, s["host_committed"] / MIB
    if reference:
        row.exact = all(torch.equal(a, b) for a, b in zip(gradients, reference, strict=True))
    else:
        reference.extend(g.clone() for g in gradients)
        row.exact = True
    return row


def own_cost(model: Any, ids: Tensor) -> dict[str, float]:
    """What the engine itself costs a step, in seconds: hooks, ops, waits; and its copies, which other threads make."""
    engine = OffloadEngine(min_bytes=64 << 10)
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent += time.perf_counter() - start

        return call

    names = ("__init__", "unpack", "__del__")
    original = {name: getattr(Offloaded, name) for name in names}
    engine.install(model)
    step(model, ids)  # the first step makes the memory
    before = engine.stats()
    for name in names:
        setattr(Offloaded, name, timed(original[name]))
    start = time.perf_counter()
    step(model, ids)
    seconds = time.perf_counter() - start
    for name in names:
        setattr(Offloaded, name, original[name])
    after = engine.stats()
    return {
        "step": seconds,
        "on_the_compute_thread": spent,
        "copies_on_other_threads": sum(after[n] - before[n] for n in ("copy_out_s", "copy_in_s")),
        "stall": sum(after[n] - before[n] for n in ("stall_forward_s", "stall_backward_s")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="offload:")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(  # SmolLM2-135M
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=options.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=options.tokens,
    )  # fmt: skip
    lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()
    ids = torch.randint(0, config.vocab_size, (1, options.tokens))

    reference: list[Tensor] = []
    engines: dict[str, OffloadEngine] = {}
    rows = {name: measure(name, model, ids, engines, reference) for name in [*PEERS, *OURS]}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name in rows:
            times[name].append(run(name, model, ids, None, engines))
    for name, row in rows.items() if options.rounds else ():
        row.seconds = statistics.median(times[name])
        row.ratio = statistics.median(a / b for a, b in zip(times[name], times["checkpointing"], strict=True))

    print(f"SmolLM2-135M shape, LoRA 16, {options.layers} layers, {options.tokens} tokens, fp32, CPU; MiB")
    print(f"{'':38} {'out':>8} {'in':>8} {'device':>8} {'host':>8} {'pinned':>8} {'s/step':>8} {'ratio':>7}  exact")
    for row in rows.values():
        print(
            f"{row.program:38} {row.moved_out:8.1f} {row.moved_in:8.1f} {row.device_peak:8.1f} {row.host:8.1f} "
            f"{row.host_pinned:8.1f} {row.seconds:8.2f} {row.ratio:7.3f}  {'yes' if row.exact else 'no'}"
        )
    cost = own_cost(model, ids)
    share = 100 * cost["on_the_compute_thread"] / cost["step"]
    compute, stall = 1e3 * cost["on_the_compute_thread"], 1e3 * cost["stall"]
    print(
        f"longgrpo's cost in a step of {cost['step']:.2f} s: {compute:.2f} ms ({share:.3f} %) on the compute thread, "
        f"{stall:.2f} ms of it stalls; {1e3 * cost['copies_on_other_threads']:.1f} ms of copies on other threads"
    )
    checkpointed(model)
    whole, tiled = LiveStorages(model), LiveStorages(model)
    run("longgrpo", model, ids, whole, engines)
    tile_mlp(model)
    run("longgrpo", model, ids, tiled, engines)
    untile_mlp(model)
    print(f"with the tiled MLP: device peak {tiled.peak[False] / MIB:.1f} MiB, without {whole.peak[False] / MIB:.1f}")
    if options.json:
        result = {"rows": [asdict(row) for row in rows.values()], "cost": cost, "options": vars(options)}
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
