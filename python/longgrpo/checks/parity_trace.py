"""What each operator of the engine and of the trainer makes of the tokens of one sequence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longgrpo.config.sampling import Sampling
from longgrpo.model.head import base_model
from longgrpo.model.packed_attention import PackedBatch, pack_sequences, packed_hidden
from longgrpo.rollout import vllm_private


class Seen(NamedTuple):
    """An operator at L positions of the sequence."""

    positions: Tensor  # [L] int64, rising, on the host
    inputs: tuple[Tensor, ...]  # [L, ...] each
    output: Tensor  # [L, W]

    def at(self, rows: Tensor) -> Seen:
        return Seen(self.positions[rows], tuple(x[rows] for x in self.inputs), self.output[rows])


Trace = dict[str, Seen]  # by the engine's module names, in the order in which they run


def rows_of(outputs: Any) -> Tensor:
    """[T, W], from what a module returns for T tokens: a tensor, or a tuple whose None are left out."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([part.flatten(1) for part in parts if isinstance(part, Tensor)], dim=1)


class EngineTrace:
    """The operators of vLLM's model while it runs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module = vllm_private.engine_module(engine.llm)

    def of(self, prompts: Sequence[Sequence[int]], sampled: int) -> tuple[Trace, list[int], list[float]]:
        """Greedy completions of `prompts`; the first one's trace, tokens and logprobs."""
        calls: dict[str, list[Seen]] = {}
        with self._hooks(calls):
            sampling = Sampling(max_tokens=sampled, ignore_eos=True, temperature=0.0)
            completion = self.engine.generate(prompts, sampling, range(len(prompts)))[0]
        tokens = torch.tensor([*prompts[0], *completion.token_ids])
        return (
            {name: _sequence(seen, tokens) for name, seen in calls.items()},
            completion.token_ids,
            completion.logprobs,
        )

    @contextmanager
    def _hooks(self, calls: dict[str, list[Seen]]) -> Iterator[None]:
        batch: dict[str, Tensor] = {}  # of the forward that runs
        inputs_before: dict[int, tuple[Tensor, ...]] = {}  # some operators write over their inputs
        names: dict[int, list[str]] = {}  # of an operator: the layers share their rotary embedding
        turn: dict[int, int] = {}  # which of its names is next

        def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
            batch.update({name: kwargs[name].to("cpu", copy=True) for name in ("input_ids", "positions")})
            turn.clear()

        def runs(module: nn.Module, args: Any, kwargs: Any) -> None:
            values = (*args, *kwargs.values())
            inputs_before[id(module)] = tuple(value.clone() for value in values if isinstance(value, Tensor))

        def ran(module: nn.Module, args: Any, output: Any) -> None:
            places = torch.stack((batch["positions"], batch["input_ids"]), 1)  # [T, 2]
            which = turn.get(id(module), 0)
            turn[id(module)] = which + 1
            seen = Seen(places, inputs_before.pop(id(module)), rows_of(output).clone())
            calls.setdefault(names[id(module)][which], []).append(seen)

        handles = [self.module.register_forward_pre_hook(begins, with_kwargs=True)]
        for name, operator in vllm_private.operators(self.module).items():
            if id(operator) not in names:
                handles.append(operator.register_forward_pre_hook(runs, with_kwargs=True))
                handles.append(operator.register_forward_hook(ran))
            names.setdefault(id(operator), []).append(name)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _sequence(calls: Sequence[Seen], tokens: Tensor) -> Seen:
    """Of all rows those of the sequence `tokens`, in its order: one that has its token at its position. A position at
    which another sequence has the same token is left out."""
    places = torch.cat([call.positions for call in calls])  # [T, 2]: position, token
    inside = places[:, 0] < len(tokens)
    own = inside & (places[:, 1] == tokens[places[:, 0].clamp(max=len(tokens) - 1)])
    counts = torch.bincount(places[own, 0], minlength=len(tokens))
    own &= counts[places[:, 0].clamp(max=len(tokens) - 1)] == 1
    rows = own.nonzero()[:, 0]
    rows = rows[places[rows, 0].argsort()]
    inputs = tuple(torch.cat(parts)[rows] for parts in zip(*(call.inputs for call in calls), strict=True))
    return Seen(places[rows, 0], inputs, torch.cat([call.output for call in calls])[rows])


class TrainerTrace:
    """The operators of the model in training, under the engine's names."""

    def __init__(self, model: Any, names: Sequence[str], packed: dict[str, list[str]]) -> None:
        """names: the engine's operators; packed: its fused linears and their parts."""
        self.model, self.base = model, base_model(model)
        self.names, self.packed = names, packed

    def module(self, name: str) -> nn.Module:
        return self.base.get_submodule(name)

    def parts(self, name: str) -> list[nn.Module]:
        """The trainer's linears that the engine has as the one called `name`."""
        parent, _, leaf = name.rpartition(".")
        own = [f"{parent}.{part}" for part in self.packed.get(leaf, [leaf])]
        return [self.base.get_submodule(part) for part in own]

    @torch.no_grad()
    def hidden(self, sequences: Sequence[Sequence[int]], prefix: Sequence[int] | None = None) -> Tensor:
        """[N, H] of the packed sequences. prefix: of each, the one that it goes on from (-1: none)."""
        return packed_hidden(self.model, self._batch(sequences, prefix))

    @staticmethod
    def _batch(sequences: Sequence[Sequence[int]], prefix: Sequence[int] | None) -> PackedBatch:
        bounds = [0]
        positions: list[int] = []
        for i, tokens in enumerate(sequences):
            before = len(sequences[prefix[i]]) if prefix and prefix[i] >= 0 else 0
            positions += range(before, before + len(tokens))
            bounds.append(bounds[-1] + len(tokens))
        ids = torch.tensor([token for tokens in sequences for token in tokens])
        return pack_sequences(ids, torch.tensor(positions), bounds, prefix)

    def of(self, tokens: Sequence[int]) -> Trace:
        """The trace of one sequence by itself: each operator's output, or what the operator after it reads."""
        rows: dict[str, dict[int, Tensor]] = {}

        def keep(name: str, part: int, tensor: Tensor) -> None:
            if tensor.ndim == 4 and tensor.shape[1] != len(tokens):  # [1, heads, L, D]: Gemma's norm of queries
                tensor = tensor.transpose(1, 2)
            rows.setdefault(name, {}).setdefault(part, tensor.detach().reshape(len(tokens), -1).clone())

        def kept(name: str, part: int) -> Callable[..., None]:
            return lambda module, args, output: keep(name, part, output)

        def read_by(name: str) -> Callable[..., None]:
            return lambda module, args: keep(name, 0, args[0])

        def looked_up(name: str) -> Callable[..., None]:
            return lambda module, args: keep(name, 0, _rows_of_table(module, args[0]))

        handles = []
        for name in self.names:
            kind = kind_of(name)
            if kind == "attn":
                after = self.module(f"{name.rpartition('.')[0]}.o_proj")
                handles.append(after.register_forward_pre_hook(read_by(name)))
            elif kind == "act_fn":
                after = self.module(f"{name.rpartition('.')[0]}.down_proj")
                handles.append(after.register_forward_pre_hook(read_by(name)))
            elif kind == "embed_tokens":
                handles.append(self.module(name).register_forward_pre_hook(looked_up(name)))
            elif kind != "rotary_emb":
                for part, module in enumerate(self.parts(name)):
                    handles.append(module.register_forward_hook(kept(name, part)))
        try:
            self.hidden([tokens])
        finally:
            for handle in handles:
                handle.remove()
        positions = torch.arange(len(tokens))
        return {
            name: Seen(positions, (), torch.cat([rows[name][part] for part in sorted(rows[name])], 1))
            for name in self.names
            if name in rows
        }

    @torch.no_grad()
    def on(self, name: str, inputs: Sequence[Tensor]) -> Tensor:
        """[T, W]: the trainer's operator on the engine's inputs."""
        kind = kind_of(name)
        owner = name.rpartition(".")[0]
        if kind == "attn":
            return self._attention(self.module(owner), *inputs[:3])
        if kind == "act_fn":
            return self._gated(self.module(owner), inputs[0])
        if kind == "embed_tokens":
            return _rows_of_table(self.module(name), inputs[0])
        if kind == "rotary_emb":
            return self._rotated(self.module(owner), *inputs[:3])
        if len(inputs) == 2:  # a norm that adds the residual first
            inputs = [inputs[0] + inputs[1]]
            return torch.cat((self.module(name)(inputs[0]), inputs[0]), 1)
        return rows_of(tuple(part(inputs[0]) for part in self.parts(name)))

    def _gated(self, mlp: Any, gate_up: Tensor) -> Tensor:
        """What the MLP gives its last linear, if its first ones give it this."""
        parts = [gate_up] if hasattr(mlp, "gate_up_proj") else list(gate_up.chunk(2, -1))
        linears = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        read: list[Tensor] = []
        handles = [mlp.down_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))]
        for linear, part in zip(linears, parts, strict=True):
            given = part.contiguous()[None]
            handles.append(linear.register_forward_hook(lambda module, args, output, given=given: given))
        try:
            width = self.base.config.get_text_config().hidden_size
            mlp(torch.zeros(1, len(gate_up), width, dtype=gate_up.dtype, device=gate_up.device))
        finally:
            for handle in handles:
                handle.remove()
        return read[0][0]

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from transformers import AttentionInterface

        attention: Any = AttentionInterface()[self.base.config._attn_implementation]
        length = len(query)
        heads = [x.view(1, length, -1, module.head_dim).transpose(1, 2) for x in (query, key, value)]
        bounds = torch.tensor([0, length], dtype=torch.int32, device=query.device)
        out, _ = attention(
            module, *heads, None, scaling=module.scaling, cu_seq_lens_q=bounds, max_length_q=length, lengths=[length],
            own_lengths=[length],
        )  # fmt: skip
        return torch.as_tensor(out.reshape(length, -1))

    def _rotated(self, module: Any, positions: Tensor, query: Tensor, key: Tensor) -> Tensor:
        length = len(query)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        rotary: Any = next(m for n, m in self.base.named_modules() if n.endswith("rotary_emb"))
        kinds = {"layer_type": module.layer_type} if hasattr(rotary, "layer_types") else {}
        cos, sin = rotary(query, positions[None], **kinds)
        heads = [x.view(1, length, -1, module.head_dim).transpose(1, 2) for x in (query, key)]
        return rows_of(tuple(x.transpose(1, 2)[0] for x in rotate(*heads, cos, sin)))


def _rows_of_table(embedding: Any, tokens: Tensor) -> Tensor:
    """An embedding before it is scaled: Gemma's scales in itself, vLLM's model after it."""
    return nn.functional.embedding(tokens, embedding.weight)


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]
