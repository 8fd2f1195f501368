"""The engine under random graphs. The oracle is torch.utils.checkpoint without offload; every comparison is bitwise."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testing.offload import COLUMNS, ROWS, PoisonedEngine, gated, nested, residual, same, torch_checkpoint


def transposed(a, b, w):
    return (a.t().contiguous().t() @ w) * b[:, :1]


def views(a, b, w):
    return torch.cat([a[:, 2:], b[:, :2]], 1) @ w


def saved_output(a, b, w):
    return torch.exp(torch.tanh(a @ w)) - b.expand(1, *b.shape)[0]


FUNCTIONS = (residual, gated, transposed, views, saved_output)


graphs = st.fixed_dictionaries({
    "nodes": st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99), st.integers(0, 99), st.booleans()),
        min_size=1, max_size=7,
    ),
    "steps": st.integers(1, 2),
    "retain": st.booleans(),
    "partial": st.booleans(),
    "seed": st.integers(0, 1 << 20),
})  # fmt: skip
engines = st.fixed_dictionaries({
    "prefetch": st.integers(0, 2),
    "inflight": st.integers(1, 2),
    "keep_last": st.integers(0, 2),
    "min_bytes": st.sampled_from([0, 0, ROWS * COLUMNS * 4 + 1]),
    "host_bytes": st.sampled_from([1 << 20, 1 << 20, 600]),
    "on_full": st.sampled_from(["keep", "pageable"]),
    "schedule": st.one_of(st.sampled_from(["threaded", "lazy"]), st.integers(0, 999).map(lambda n: f"seeded:{n}")),
})  # fmt: skip


def forward(graph, ck, leaf, weights):
    nodes = [leaf * 1.0]
    for f, g, i, j, is_nested in graph["nodes"]:
        function = nested(ck, FUNCTIONS[f], FUNCTIONS[g]) if is_nested else FUNCTIONS[f]
        nodes.append(ck(function, nodes[-1 - i % len(nodes)], nodes[j % len(nodes)], weights[(i + j) % len(weights)]))
    return sum(node.square().mean() for node in nodes[1:])


def gradients(graph, ck):
    generator = torch.Generator().manual_seed(graph["seed"])
    leaf = torch.randn(ROWS, COLUMNS, generator=generator, requires_grad=True)
    weights = [(torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.3).requires_grad_() for _ in range(2)]
    out = []
    for _ in range(graph["steps"]):
        loss = forward(graph, ck, leaf, weights)
        out.append(loss.detach())
        if graph["partial"]:
            out += torch.autograd.grad(loss, weights[:1], retain_graph=True, allow_unused=True)
        if graph["retain"]:
            loss.backward(retain_graph=True)
        loss.backward()
        out += [tensor.grad for tensor in (leaf, *weights)]
    return out


@pytest.mark.long
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=graphs, options=engines)
def test_random_graphs_have_the_gradients_of_torch(graph, options):
    engine = PoisonedEngine(**options)
    assert same(gradients(graph, engine.checkpoint), gradients(graph, torch_checkpoint))
    engine.synchronize()
    assert engine.stats()["records"] == 0
    assert engine.stats()["host_live"] == 0


@settings(max_examples=100, deadline=None)
@given(graph=graphs, options=engines)
def test_hooks_around_whole_graphs(graph, options):
    """Everything autograd saves outside checkpoints goes through the engine as well."""
    engine = PoisonedEngine(**options)
    with engine.hooks():
        ours = gradients(graph, lambda f, *args: f(*args))
    assert same(ours, gradients(graph, lambda f, *args: f(*args)))


@settings(max_examples=30, deadline=None)
@given(first=graphs, second=graphs, options=engines, order=st.booleans())
def test_interleaved_graphs(first, second, options, order):
    engine = PoisonedEngine(**options)

    def run(ck):
        leaf = torch.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS).requires_grad_()
        weights = [torch.eye(COLUMNS).requires_grad_(), torch.ones(COLUMNS, COLUMNS).requires_grad_()]
        losses = [forward(graph, ck, leaf, weights) for graph in (first, second)]
        for loss in losses if order else losses[::-1]:
            loss.backward()
        return [tensor.grad for tensor in (leaf, *weights)]

    assert same(run(engine.checkpoint), run(torch_checkpoint))
