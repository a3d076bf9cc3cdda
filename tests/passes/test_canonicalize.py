"""Canonicalize: what does nothing is gone, what writes in place does not, and views are left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from nets import Net, apply, assert_equal, classes, images, names, ops, traced
from timm.layers import DropPath
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.graph import called, module_of
from fxquant.passes import Canonicalize


def canonical(body, **members):
    gm = traced(Net(body, **members))
    new, log = apply(gm, Canonicalize())
    assert_equal(gm, new)
    return new, log


def test_identities_and_dropout_vanish():
    layers = [nn.Conv2d(3, 4, 1), nn.Identity(), nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d(0.1, inplace=True), DropPath(0.3)]
    gm = traced(nn.Sequential(*layers))
    assert ops(gm) == {"conv": 1, "identity": 1, "dropout": 2, "relu": 1}  # the tracer looks into timm's DropPath, and finds nothing
    new, log = apply(gm, Canonicalize())
    assert ops(new) == {"conv": 1, "relu": 1}
    assert (log.count, log.skipped) == (3, [])
    assert_equal(gm, new)
    assert "1" not in new._modules


@pytest.mark.parametrize(
    "dropout",
    [
        lambda s, x: F.dropout(x, 0.5, False),
        lambda s, x: F.dropout(x, p=0.5, training=s.training),
        lambda s, x: F.dropout2d(x, 0.5, training=s.training),
        lambda s, x: F.alpha_dropout(x, 0.5),
        lambda s, x: F.feature_alpha_dropout(x, 0.5, s.training),
        lambda s, x: s.drop(input=x),
        lambda s, x: s.same(input=x),
    ],
)
def test_spellings_of_nothing(dropout):
    new, log = canonical(lambda s, x: dropout(s, x).abs(), drop=nn.Dropout(), same=nn.Identity())
    assert names(new) == ["x", "abs_1", "output"]
    assert log.count >= 1


def test_dropout_that_stays_on_is_kept():
    gm = traced(Net(lambda s, x: F.dropout(x, 0.5, True)))
    _, log = apply(gm, Canonicalize())
    assert log.count == 0


@pytest.mark.parametrize(
    ("write", "module"),
    [
        (lambda s, x: s.act(x), nn.ReLU(inplace=True)),
        (lambda s, x: s.act(x), nn.Hardswish(inplace=True)),
        (lambda s, x: s.act(x), nn.LeakyReLU(0.3, inplace=True)),
        (lambda s, x: F.relu(x, True), None),
        (lambda s, x: F.relu(x, inplace=True), None),
        (lambda s, x: F.leaky_relu(x, 0.2, True), None),
        (lambda s, x: F.hardtanh(x, -0.5, 0.5, True), None),
        (lambda s, x: F.silu(x, inplace=True), None),
        (lambda s, x: F.relu_(x), None),
        (lambda s, x: torch.relu_(x), None),
        (lambda s, x: x.relu_(), None),
        (lambda s, x: x.mul_(2), None),
        (lambda s, x: x.clamp_(-0.1, 0.2), None),
    ],
)
def test_writes_become_plain(write, module):
    """The later reader of the overwritten tensor is told to read what was written."""

    def body(s, x):
        x = s.conv(x)
        y = write(s, x)
        return y + 2 * x

    members = {"act": module} if module else {}
    new, log = canonical(body, conv=nn.Conv2d(3, 4, 1), **members)
    assert log.skipped == []
    nodes = {node.name: node for node in new.graph.nodes}
    assert len(nodes["conv"].users) == 1
    assert not any(getattr(part, "inplace", False) for _, part in called(new))
    x = images(1)
    held = nodes["conv"].target, new.get_submodule("conv")(x)
    before = held[1].clone()
    run = torch.fx.Interpreter(new)
    run.run(x, initial_env={nodes["conv"]: held[1], nodes["x"]: x})
    assert torch.equal(held[1], before), "the input of the operation was overwritten"


def test_a_write_whose_result_nobody_reads_survives():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    graph.call_method("add_", (y, 1))
    graph.output(y)
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(1)
    gm = GraphModule(nn.Module(), graph)
    new, log = apply(gm, Canonicalize())
    assert log.count == 1
    assert [node.target for node in new.graph.nodes] == ["x", torch.mul, "add", "output"]
    assert_equal(gm, new)


def test_in_place_chain_on_one_tensor():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    a = graph.call_function(F.relu, (y, True))
    b = graph.call_method("add_", (y, 1))
    c = graph.call_method("mul_", (a, 3))
    graph.output((y, a, b, c))
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(1)
    gm = GraphModule(nn.Module(), graph)
    new, _ = apply(gm, Canonicalize())
    for before, after in zip(gm(images()), new(images()), strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("body", "where", "reason"),
    [
        (
            lambda s, x: (x := s.conv(x), x[:, :2].relu_(), x)[2],
            "relu_",
            "in-place, but getitem may be a view of another tensor; kept in place",
        ),
        (
            lambda s, x: (x := s.conv(x), v := x.flatten(1), F.relu_(x), v)[3],
            "relu_",
            "in-place, but conv is viewed by flatten; kept in place",
        ),
        (
            lambda s, x: (x := s.conv(x), v := s.flat(x), v.relu_(), x)[3],
            "relu_",
            "in-place, but flat may be a view of another tensor; kept in place",
        ),
        (
            lambda s, x: (x := s.conv(x), v := s.act(x[:, :2]), v.add_(1), x)[3],
            "add_",
            "in-place, but act is written in place itself; kept in place",
        ),
    ],
)
def test_writes_seen_through_views_are_left_alone(body, where, reason):
    gm = traced(Net(body, conv=nn.Conv2d(3, 4, 1), flat=nn.Flatten(), act=nn.ReLU(inplace=True)))
    new, log = apply(gm, Canonicalize())
    assert_equal(gm, new)
    assert [text for name, text in log.skipped if name == where][-1:] in ([reason], [])


def test_view_of_flattened_module_output():
    """By hand, so that nothing of the tracer helps: writing into the output of nn.Flatten writes into its input."""
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    flat = graph.call_module("flat", (y,))
    graph.call_method("relu_", (flat,))
    graph.output(y)
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(1)
    root = nn.Module()
    root.flat = nn.Flatten()
    gm = GraphModule(root, graph)
    new, log = apply(gm, Canonicalize())
    assert_equal(gm, new)
    assert log.skipped == [("relu_", "in-place, but flat may be a view of another tensor; kept in place")]


def test_write_into_a_tensor_that_is_written_in_place_itself():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    view = graph.call_method("flatten", (y,))
    kept = graph.call_function(F.relu_, (view,))
    graph.call_method("add_", (kept, 1))
    graph.output(y)
    for node in graph.nodes:
        node.meta["val"] = torch.zeros(1)
    gm = GraphModule(nn.Module(), graph)
    new, log = apply(gm, Canonicalize())
    assert_equal(gm, new)
    assert [reason for _, reason in log.skipped] == [
        "in-place, but flatten may be a view of another tensor; kept in place",
        "in-place, but relu_ is written in place itself; kept in place",
    ]


def test_the_module_of_the_input_graph_stays_in_place():
    gm = traced("residual")
    before = Counter(id(part) for _, part in called(gm))
    new, _ = apply(gm, Canonicalize())
    assert all(part.inplace for _, part in called(gm) if isinstance(part, nn.ReLU))
    assert not any(part.inplace for _, part in called(new) if isinstance(part, nn.ReLU))
    assert Counter(id(part) for _, part in called(gm)) == before
    assert classes(new)["ReLU"] == classes(gm)["ReLU"] == 5


def test_names_of_what_stays_are_kept():
    gm = traced("chain")
    new, _ = apply(gm, Canonicalize())
    assert [name for name in names(gm) if name in names(new)] == names(new)
    assert {node.name: node.target for node in new.graph.nodes}.items() <= {node.name: node.target for node in gm.graph.nodes}.items()
    assert all(module_of(node) is gm.get_submodule(node.target) for node, part in called(new) if not hasattr(part, "inplace"))


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(x.dtype),
        lambda x: x.type(torch.float32),
        lambda x: x.type_as(x),
        lambda x: x.to(x.device),
    ],
)
def test_casts_to_the_same_type_vanish(cast):
    new, log = canonical(lambda s, x: cast(x.abs()) + 1)
    assert names(new) == ["x", "abs_1", "add", "output"]
    assert log.count == 1


@pytest.mark.parametrize("cast", [lambda x: x.double(), lambda x: x.to(torch.int32), lambda x: x.to(memory_format=torch.channels_last)])
def test_casts_to_another_type_or_layout_stay(cast):
    gm = traced(Net(lambda s, x: cast(x)))
    _, log = apply(gm, Canonicalize())
    assert log.count == 0
