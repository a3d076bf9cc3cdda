"""The node-by-node sweep: same values, each computed once, dropped as soon as nobody needs it."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from nets import NETS, Net, images, prepared, traced
from torch import nn
from torch.fx import symbolic_trace

from fxquant import execution
from fxquant.execution import BATCH, bytes_per_image, images_at_once, last_readers, peak_bytes, sweep
from fxquant.graph import called, fork, put_module

BATCHES = [images(2), images(3)]


@pytest.mark.parametrize("name", NETS)
def test_same_values_as_the_forward(name):
    gm = prepared(name)
    visited = Counter()
    for node, values in sweep(gm, BATCHES):
        visited[node] += 1
        last = values
    assert list(visited) == list(gm.graph.nodes)
    assert set(visited.values()) == {1}
    assert len(last) == 2
    with torch.no_grad():
        for batch, value in zip(BATCHES, last, strict=True):
            torch.testing.assert_close(value, gm(batch), rtol=0, atol=0)


def test_every_module_runs_once_a_batch_and_without_gradients():
    gm = fork(prepared("residual"))
    calls = Counter()
    hooks = [part.register_forward_hook(lambda part, args, out: calls.update([part])) for _, part in called(gm)]
    grads = [value.requires_grad for node, values in sweep(gm, BATCHES) for value in values if isinstance(value, torch.Tensor)]
    for hook in hooks:
        hook.remove()
    assert set(calls.values()) == {len(BATCHES)}
    assert not any(grads)


def test_values_are_dropped_behind_their_last_reader():
    gm = prepared("residual")
    alive: dict[str, list[weakref.ref]] = {}
    for node, values in sweep(gm, [images() + 0 for _ in range(2)]):
        alive[node.name] = [weakref.ref(value) for value in values if isinstance(value, torch.Tensor)]
        last = {parent.name for parent, reader in last_readers(gm).items() if reader is node}
        held = {name for name, refs in alive.items() if name not in ("x", "fc_0") and any(ref() is not None for ref in refs)}
        waiting = {parent.name for parent, reader in last_readers(gm).items() if parent.name in alive and reader.name not in alive}
        assert held <= waiting | last | {node.name}, node.name  # fc_0 lives on in its view, fc_1
        del values


def test_what_the_caller_writes_is_what_later_nodes_read():
    gm = prepared("chain")
    for node, values in sweep(gm, BATCHES):
        if node.name == "_4":
            values[:] = [torch.zeros_like(value) for value in values]
        last = values
    bias = gm.get_submodule("7.3").bias
    assert all(torch.equal(value, bias.expand_as(value)) for value in last)


def test_a_module_may_be_replaced_before_its_node_is_reached():
    gm = fork(prepared("chain"))
    for node, values in sweep(gm, BATCHES):
        if node.name == "_4":
            put_module(gm, "6", nn.Tanh())
        if node.name == "_6":
            assert all(bool((value < 0).any()) for value in values)
    assert isinstance(gm.get_submodule("6"), nn.Tanh)


def test_two_sweeps_side_by_side():
    a, b = prepared("chain"), traced("chain")
    ends = [values for _, values in [*sweep(a, BATCHES)][-1:]] + [values for _, values in [*sweep(b, BATCHES)][-1:]]
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    pairs = list(zip(sweep(a, BATCHES), sweep(a, BATCHES), strict=True))
    assert all(x is y for (x, _), (y, _) in pairs)


def test_peak_bytes_of_a_net_by_hand():
    """x is 3*16*16 floats, the conv makes 4*16*16; at the sum x, conv and the sum itself are there."""
    layers = {"conv": nn.Conv2d(3, 3, 1), "fc": nn.Linear(3, 5)}
    gm = prepared(Net(lambda s, x: s.fc((s.conv(x) + x).mean((2, 3))), **layers))
    assert {node.name: bytes_per_image(node) for node in gm.graph.nodes} == {
        "x": 4 * 768,
        "conv": 4 * 768,
        "add": 4 * 768,
        "mean": 4 * 3,
        "fc": 4 * 5,
        "output": 0,
    }
    assert peak_bytes(gm) == 4 * 3 * 768
    chain = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()))
    assert peak_bytes(chain) == 4 * 2 * 4 * 256


def test_images_at_once_by_the_largest_value(monkeypatch):
    layers = {"conv": nn.Conv2d(3, 8, 1), "fc": nn.Linear(8, 5)}
    gm = prepared(Net(lambda s, x: s.fc(s.conv(x).mean((2, 3))), **layers))  # the largest value: 8*16*16 floats, 8 KiB an image
    assert images_at_once(gm.graph.nodes, torch.device("cpu")) == images_at_once(gm.graph.nodes, torch.device("cuda")) == BATCH
    assert images_at_once(gm.graph.nodes, torch.device("cpu"), 128) == 128
    for size, count in ((8 * 2**10, 1), (3 * 8 * 2**10 + 1, 3), (2**10, 1), (64 * 8 * 2**10, 64)):
        monkeypatch.setattr(execution, "LARGEST_VALUE", size)
        assert images_at_once(gm.graph.nodes, torch.device("cpu")) == count
        assert images_at_once(gm.graph.nodes, torch.device("cuda")) == BATCH


def test_constants_do_not_count_for_images_at_once(monkeypatch):
    gm = traced(Net(lambda s, x: x * s.table.mean(), table=nn.Parameter(torch.rand(10_000))))
    monkeypatch.setattr(execution, "LARGEST_VALUE", 5 * 4 * 768)
    assert images_at_once(gm.graph.nodes, torch.device("cpu")) == 5


def test_parts_take_as_much_as_what_is_computed_for_each(monkeypatch):
    gm = traced(Net(lambda s, x: x * 2))  # two values of 3 KiB an image
    monkeypatch.setattr(execution, "LARGEST_VALUE", 2 * 3072)
    for weights, count in ((0, 2), (3 * 6144, 3), (3 * 6144 + 1, 4), (1e9, BATCH)):
        assert images_at_once(gm.graph.nodes, torch.device("cpu"), weights=weights) == count


def test_images_at_once_of_a_graph_without_shapes():
    assert images_at_once(symbolic_trace(nn.Conv2d(3, 8, 1)).graph.nodes, torch.device("cpu")) == BATCH


def test_peak_counts_a_value_as_long_as_its_views():
    """The convolution's output is needed until the product, through its view; the first mean is not."""
    body = lambda s, x: (y := s.conv(x), v := y.flatten(2), z := s.conv(x.relu()).flatten(2), v * z)[-1]  # noqa: E731
    gm = prepared(Net(body, conv=nn.Conv2d(3, 3, 1)))
    assert [node.name for node in gm.graph.nodes] == ["x", "conv", "flatten", "relu", "conv_1", "flatten_1", "mul", "output"]
    # conv; x and relu, then relu and conv_1, then conv_1 and the product
    assert peak_bytes(gm) == 4 * 768 * 3


def test_views_and_constants_take_nothing():
    gm = traced(Net(lambda s, x: (x.flatten(1) * s.scale).chunk(2, 1)[0], scale=nn.Parameter(torch.ones(1))))
    sizes = {node.name: bytes_per_image(node) for node in gm.graph.nodes}
    assert sizes == {"x": 3072, "flatten": 0, "scale": 0, "mul": 3072, "chunk": 0, "getitem": 0, "output": 0}


def test_windows_in_the_batch_axis_count_per_image():
    gm = traced(Net(lambda s, x: x.reshape(-1, 3, 8, 8) * 2))
    assert bytes_per_image(next(node for node in gm.graph.nodes if node.name == "mul")) == 4 * 768
