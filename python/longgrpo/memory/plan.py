"""The predicted peak of each phase, term by term, from a config and a config.json: nothing is loaded.

Rows: N tokens of the longest packed micro-batch, K >= N rows of attention, in which each completion has its prompt
before it, M completion tokens. Widths: H hidden, Q = heads x head_dim, KV = key heads x head_dim, I of the MLP, V of
the vocabulary. Every formula of this module is in bytes and next to what it counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longgrpo.loss.linear import DEFAULT_WORKSPACE
from longgrpo.memory.cards import CONTEXT, GIB
from longgrpo.memory.internal import Target, attention_workspace, head_gradient, head_workspace, ring_bytes
from longgrpo.memory.limits import check, dtype_of, element_of, kv_bytes
from longgrpo.memory.phases import Phase, Plan, Rows
from longgrpo.memory.ranks import owned, sum_buffer
from longgrpo.memory.shape import ModelShape
from longgrpo.rollout.protocol import batched_tokens

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig

NF4_BYTES = 0.5 + 4 / 64  # a weight: 4 bits, and a float32 for each 64
FP32 = 4
MIN_RECORD = 1 << 20  # smaller layer inputs stay on the device (OffloadEngine's min_bytes)


def plan_memory(config: TrainConfig, shape: ModelShape, rows: Rows, target: Target, ranks: int = 1) -> Plan:
    """The peaks of a rank of a run of `config` whose longest micro-batch is `rows`.

    Raises ValueError for a config that contradicts itself: see `check`.
    """
    check(config, shape, rows)
    model = Formulas(config, shape, rows, target, ranks)
    return Plan(model.rollout(), model.scoring(), model.training(), rows)


class Formulas:
    """Attributes named as a width are one micro-batch's bytes of a tensor of that width."""

    def __init__(self, config: TrainConfig, shape: ModelShape, rows: Rows, target: Target, ranks: int = 1) -> None:
        self.config, self.shape, self.rows, self.target, self.ranks = config, shape, rows, target, ranks
        self.prompts = -(-config.train.prompts_per_step // ranks)  # a rank's
        self.full = config.lora is None
        self.tiled = config.memory.tiled_mlp
        self.group = min(config.memory.attention_heads or shape.kv_heads, shape.kv_heads)
        self.grouped = config.memory.attention_heads is not None
        self.quantized = config.model.quantization == "nf4"
        self.copies = rows.attention > rows.tokens
        self.element = element = element_of(config)
        n, k = rows.tokens, rows.attention
        self.h, self.i = element * shape.hidden * n, element * shape.mlp * n
        self.q, self.kv = element * shape.q_width * n, element * shape.kv_width * n
        self.q_rows, self.kv_rows = element * shape.q_width * k, element * shape.kv_width * k
        self.loss_rows = element * shape.hidden * rows.loss
        self.wide = FP32 * shape.hidden * n  # of H, in fp32

    # ---- what lives all along
    def resident(self) -> dict[str, int]:
        """Terms that every phase has."""
        shape, element = self.shape, self.element
        terms = {
            "linear weights": int(shape.linear_weights * (NF4_BYTES if self.quantized else element)),
            "embedding and head": shape.embeddings * element,
            "norms and biases": shape.other_weights * element,
        }
        if self.config.lora:
            terms["adapter"] = self.trained * FP32
        elif element < FP32:
            terms["float32 masters"] = FP32 * self.stepped
        if self.config.loss.beta and self.full:
            terms["reference"] = shape.parameters * element
        terms["optimizer"] = self.config.train.state_bytes * self.stepped
        return terms | self.beside_the_trainer()

    def beside_the_trainer(self) -> dict[str, int]:
        """The CUDA context and the engine's own copy of A and B, which a merge does without."""
        context = {"context": CONTEXT} if self.target.is_cuda else {}
        mode = self.config.lora.mode if self.config.lora else "merge"
        merged = mode == "merge" or (mode == "auto" and self.element == FP32)
        if merged or self.config.rollout.engine == "transformers":
            return context
        return context | {"engine's adapter": self.trained * self.element}

    @property
    def stepped(self) -> int:
        """Elements that the optimizer of a rank steps."""
        return owned(self.shape, self.ranks) if self.full and self.ranks > 1 else self.trained

    @property
    def trained(self) -> int:
        """Elements that have a gradient."""
        if self.full:
            return self.shape.parameters
        assert self.config.lora
        adapted = [linear for linear in self.shape.linears if self._adapted(linear.name)]
        return self.shape.layers * self.config.lora.rank * sum(x.inputs + x.outputs for x in adapted)

    @property
    def cache(self) -> dict[str, int]:
        """The rollout's key-value cache, if it stays while the model trains."""
        rollout = self.config.rollout
        if rollout.engine == "transformers" or rollout.release_kv_cache:
            return {}
        return {"KV cache": int(rollout.kv_cache_gib * GIB)}

    # ---- phases
    def rollout(self) -> Phase:
        rollout, shape = self.config.rollout, self.shape
        if rollout.engine == "transformers":
            batch = min(64, self.prompts * rollout.num_generations)
            cache = batch * kv_bytes(self.config, shape, self.rows.longest)
            # float32 scores, logp, its exponential and sum in float64, the forced choice
            logits = batch * shape.vocabulary * (3 * FP32 + 2 * 8)
            return Phase("rollout", self.resident() | {"KV cache": cache, "logits": logits})
        longest, live = self.rows.longest, self.prompts * rollout.num_generations
        if self.target.is_cuda:  # vLLM tries itself out with all that it was told to expect
            longest, live = rollout.max_model_len or shape.context, rollout.max_num_seqs
        forward = batched_tokens(longest) * self.element * (2 * shape.hidden + 3 * shape.mlp)
        live = min(rollout.max_num_seqs, live)
        logits = live * shape.vocabulary * 3 * FP32
        cache = int(rollout.kv_cache_gib * GIB)
        return Phase("rollout", self.resident() | {"KV cache": cache, "engine's forward and logits": forward + logits})

    def scoring(self) -> Phase:
        """A forward without gradients, if anything is scored before the updates."""
        terms = self.resident() | self.cache
        if self._moves:
            terms["offload's slots"] = self._slots
        if not (self.config.scores_reference or self.config.scores_policy):
            return Phase("scoring", terms)
        moments = {
            "a layer's forward": self._forward(),
            "hidden states and head": 2 * self.h + self.loss_rows + self._head(hidden_gradient=False),
        }
        return Phase("scoring", terms | _largest(moments))

    def training(self) -> Phase:
        terms = self.resident() | self.cache | {"gradients": self._gradients}
        kept, host = self._kept()
        moments: list[dict[str, int]] = [kept | {"hidden states and head": self._loss()}]
        below = self._below()
        moments += [below | {name: size} for name, size in self._backward().items()]
        slots = {"offload's slots": self._slots} if self._moves else {}
        moments.append(slots | {"embedding's backward": self._embedding_backward()})
        moments.append(slots | {"optimizer's temporaries": self._optimizer()})
        if self.ranks > 1 and not self._sharded:
            moments.append(slots | {"gradient's sum": sum_buffer(self.trained, self._largest)})
        peak = max(moments, key=lambda moment: sum(moment.values()))
        return Phase("training", terms | peak, {"layer inputs": host} if host else {})

    @property
    def _sharded(self) -> bool:
        return self.full and self.ranks > 1 and self.config.memory.shard_gradients

    @property
    def _gradients(self) -> int:
        """All, or those of a rank's own parameters, a layer's or a table's that wait, and one that is widened."""
        if not self._sharded:
            return FP32 * self.trained
        layer = sum(linear.inputs * linear.outputs for linear in self.shape.linears)
        widened = FP32 * self._largest if self.element < FP32 else 0
        return FP32 * self.stepped + self.element * max(layer, self._largest) + widened

    # ---- between the layers
    def _kept(self) -> tuple[dict[str, int], int]:
        """What the whole forward leaves on the device, and on the host."""
        layers, h = self.shape.layers, self.h
        first = 0 if self.full else h  # PEFT makes the embedding's output a leaf, which autograd holds
        if not self.config.memory.checkpointed:
            return {"saved activations": layers * self._saved() + (0 if self._input_kept else first)}, 0
        if not self._moves:
            return {"layer inputs": layers * h}, 0
        moved = layers - (first > 0)
        held = min(moved, self.config.memory.inputs_on_device) * h + self._slots + first
        newest = self.config.memory.depths["keep_last"]
        return {"layer inputs on the device": held}, max(0, moved - newest) * h

    def _below(self) -> dict[str, int]:
        """The same while the last layer's backward runs: its own activations are counted there."""
        kept, _ = self._kept()
        if not self.config.memory.checkpointed:
            kept["saved activations"] -= self._saved()
        if self.full and self.shape.tied:
            kept["head's gradient"] = self._head_gradient  # which waits for the embedding's
        return kept

    @property
    def _slots(self) -> int:
        """Nothing is brought back if all records are still there."""
        moved = self.shape.layers - (0 if self.full else 1)
        return ring_bytes(self.h) if moved > self.config.memory.inputs_on_device else 0

    @property
    def _moves(self) -> bool:
        """Whether layer inputs leave for the host."""
        return self.config.memory.offload and self.h >= MIN_RECORD

    @property
    def _input_kept(self) -> bool:
        """Whether a norm keeps its input itself: in half precision transformers' keeps an fp32 copy."""
        return self.tiled or self.element == FP32

    # ---- one layer
    def _adapted(self, name: str) -> bool:
        lora = self.config.lora
        return lora is not None and (lora.targets == "all-linear" or name in lora.targets)

    def _reads(self, *names: str) -> bool:
        """Whether a linear of these keeps its input for the gradient of its weight or adapter."""
        return self.full or any(self._adapted(name) for name in names)

    def _norm(self) -> int:
        """What an RMS norm over H keeps: its input, and before a trained weight the normalized one."""
        trained = self.h if self.full and not self.tiled else 0
        return (self.h if self._input_kept else self.wide) + trained

    def _downs(self, *names: str) -> int:
        """A x of the adapters, [N, r] each."""
        if self.config.lora is None:
            return 0
        return sum(self._adapted(name) for name in names) * self.element * self.config.lora.rank * self.rows.tokens

    def _attention_saved(self) -> int:
        shape, family = self.shape, self.shape.family
        inputs = ("q_proj", "k_proj", "v_proj", "qkv_proj")
        norm = self._norm()
        if self.config.memory.checkpointed and self._input_kept:
            norm -= self.h  # the checkpoint has it
        if self.grouped:  # its input, and o_proj's
            return norm + self.h + (self.q if self._reads("o_proj") else 0) + self._downs("o_proj")
        heads = self._head_norms()
        lse = FP32 * shape.heads * self.rows.attention
        qkv = self.q_rows + 2 * self.kv_rows
        if family.fused and not self.copies:
            qkv += self.q + self.kv  # v is a part of the one linear's output, which lives with it
        copied = self.copies or not self.target.is_cuda  # the output, gathered for o_proj
        output = self.q if copied and self._reads("o_proj") else 0
        return (
            norm + (self.h if self._reads(*inputs) else 0) + self._downs(*inputs, "o_proj")
            + heads + qkv + self.q_rows + lse + output
        )  # fmt: skip

    def _head_norms(self) -> int:
        """What the norms over head_dim keep, as _norm over H."""
        if not self.shape.family.head_norms:
            return 0
        per_width = (1 if self._input_kept else FP32 / self.element) + (self.full and not self.tiled)
        return int((self.q + self.kv) * per_width)

    def _of_group(self, size: int) -> int:
        """`size` bytes of all heads -> those of one group."""
        return size * self.group // self.shape.kv_heads

    def _grouped_backward(self, dweight: int, unpacked: int) -> dict[str, int]:
        """Moments of attention's backward by groups, o_proj's behind it: the layer's gradient, that of the output, and
        q, k and v, whose gradients take their place."""
        shape, h = self.shape, self.h
        q, kv = self.q_rows, self.kv_rows
        held = self._attention_saved() - (self.q if self._reads("o_proj") else 0) - self._downs("o_proj")
        held += h + 2 * self.q + 2 * self.kv
        lse = FP32 * shape.heads * self.rows.attention
        saved = self._head_norms() + q + kv * (2 if self.copies else 1) + q + lse
        heads = shape.heads * self.group // shape.kv_heads
        workspace = attention_workspace(
            self.target, self.rows.attention, heads, self.group, shape.head_dim, self.element
        )
        core = self._of_group(saved + 2 * q + 2 * kv) + workspace
        tile = self._tile(4 * h + 2 * self.q + 4 * self.kv)
        return {
            "attention's backward, a group": held + core,
            "projections' backward": held + h + tile + 4 * dweight + unpacked,
        }

    def _mlp_saved(self) -> int:
        norm = self._norm()
        if self.tiled:
            return norm + self.h
        names = ("gate_proj", "up_proj", "gate_up_proj")
        products = 4 if self._reads("down_proj") else 3  # gate, act(gate), up, and their product
        return norm + (self.h if self._reads(*names) else 0) + products * self.i + self._downs(*names, "down_proj")

    def _saved(self) -> int:
        return self._attention_saved() + self._mlp_saved()

    def _tile(self, size: int) -> int:
        """`size` bytes of the micro-batch -> those of one tile."""
        rows = self.config.memory.tile_rows or self.shape.hidden
        return min(size, size * rows // self.rows.tokens)

    def _backward(self) -> dict[str, int]:
        """The moments of a layer's backward, each with what it saved and has not given back yet. h: the gradient that
        comes in."""
        h, attention = self.h, self._attention_saved()
        largest = max(x.inputs * x.outputs for x in self.shape.linears)
        dweight = FP32 * largest if self.full else 0
        unpacked = self.element * largest if self.quantized else 0
        if self.tiled:
            mlp = self._mlp_saved() + 2 * h + self._tile(6 * self.i + 3 * h)
            mlp += 6 * FP32 * self.shape.hidden * self.shape.mlp if self.full else 0
            norm = self._norm() + 3 * h + self._tile(5 * self.wide)
        else:
            rest = self._mlp_saved() - (4 if self._reads("down_proj") else 3) * self.i
            mlp = rest + h + max(6 * self.i, 5 * self.i + dweight)
            # pow, its factor, the product, the mean's gradient and the other one, in fp32
            norm = self._norm() + h + 5 * self.wide
        moments = {
            "MLP's backward": attention + mlp + unpacked,
            "norm's backward": attention + norm,
            "output projection's backward": attention + h + 2 * self.q + dweight,
        }
        if self.grouped:
            return moments | self._grouped_backward(dweight, unpacked)
        gradients = self.q_rows + 2 * self.kv_rows + max(self.q_rows, self.q)  # of q, k, v and of the output
        workspace = attention_workspace(
            self.target, self.rows.attention, self.shape.heads, self.shape.kv_heads, self.shape.head_dim, self.element
        )
        return moments | {"attention's backward": attention + h + gradients + workspace}

    def _forward(self) -> int:
        """The largest moment of a layer's forward of which nothing is kept."""
        h, i = self.h, self.i
        norm = h + self._tile(2 * self.wide) + h if self.tiled else h + 2 * self.wide
        rotation = 2 * h + 4 * self.q + 2 * self.kv  # q, q cos, its rotation, that times sin
        copies = self.q_rows + 2 * self.kv_rows if self.copies else 0
        attention = 2 * h + self.q + 2 * self.kv + copies + self.q_rows + (0 if self.target.is_cuda else self.q)
        products = (4 if self.shape.family.fused else 3) * i
        mlp = 2 * h + (h + self._tile(products) if self.tiled else products)
        if self.grouped:  # q, k, v and the output whole, the rest of a group
            rotation = self._of_group(rotation - 2 * h) + 2 * h + 2 * self.q + 2 * self.kv
            attention = self._of_group(copies + 2 * self.q_rows + self.kv_rows) + 2 * h + 2 * self.q + 2 * self.kv
        return 2 * h + max(norm, rotation, attention, mlp)  # the embeddings and the layer's input are held throughout

    # ---- head and optimizer
    def _head(self, *, hidden_gradient: bool, weight_gradient: bool = False) -> int:
        exact = hidden_gradient and self.config.loss.exact_kl
        return head_workspace(
            self.target, self.rows.loss, self.shape.hidden, self.shape.vocabulary, dtype_of(self.config),
            hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, workspace=DEFAULT_WORKSPACE,
            reference=exact, beyond_logp=exact or (hidden_gradient and self.config.loss.has_entropy_bonus),
        )  # fmt: skip

    @property
    def _head_gradient(self) -> int:
        return head_gradient(self.target, self.shape.vocabulary, self.shape.hidden, dtype_of(self.config))

    @property
    def _dense(self) -> tuple[int, int]:
        """Bytes of a gradient of the embedding's size, and with the fp32 copy that goes to its master."""
        elements = self.shape.vocabulary * self.shape.hidden
        return self.element * elements, (self.element + FP32 * (self.element < FP32)) * elements

    def _embedding_backward(self) -> int:
        """A dense gradient; if the head is the embedding, the head's and their sum as well."""
        dense, handed_over = self._dense
        return max((3 if self.shape.tied else 1) * dense + self.h, handed_over) if self.full else 0

    def _loss(self) -> int:
        """The last norm, the loss's rows (an exact KL's reference too) and direction, a trained head's gradient."""
        rows = (3 if self.config.loss.exact_kl else 2) * self.loss_rows
        if self.full:
            backward = self._head(hidden_gradient=True, weight_gradient=True) + self._head_gradient
            return self._norm() + rows + max(backward, self.h + (0 if self.shape.tied else self._dense[1]))
        return self._norm() + self.h + rows + self._head(hidden_gradient=True)

    def _optimizer(self) -> int:
        """torch's AdamW: on a GPU all square roots at once, else two tensors of the largest parameter."""
        if self.target.is_cuda:
            return FP32 * self.stepped
        return 2 * FP32 * self._largest if self.full else 0

    @property
    def _largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.shape.vocabulary * self.shape.hidden, *(x.inputs * x.outputs for x in self.shape.linears))


def _largest(moments: dict[str, int]) -> dict[str, int]:
    name = max(moments, key=lambda name: moments[name])
    return {name: moments[name]}
