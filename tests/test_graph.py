"""The helpers on nodes, and the one word for what a node computes."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from nets import Net, assert_equal, images, names, prepared, traced
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxquant.graph import (
    argument,
    bypass,
    called,
    clean,
    constant_of,
    deep_copy,
    fingerprint,
    fork,
    free_path,
    insert_behind,
    is_impure,
    is_tensor,
    is_traced,
    module_of,
    put_constant,
    put_module,
    readers,
)
from fxquant.kinds import kind
from fxquant.quantizers.layers import QUANTIZED_LAYERS

ALIVE: list[GraphModule] = []
"""A graph holds its GraphModule weakly."""


def one(op: str, target, *args, **kwargs) -> Node:
    """Return a node in a graph of its own; a module is put at ``m``."""
    graph = Graph()
    x = graph.placeholder("x")
    if op != "call_module":
        return graph.create_node(op, target, (x, *args), kwargs)
    graph.output(graph.call_module("m", (x, *args), kwargs))
    root = nn.Module()
    root.m = target
    ALIVE.append(GraphModule(root, graph))
    return list(ALIVE[-1].graph.nodes)[1]


SPELLINGS = {
    "relu": [nn.ReLU(), nn.ReLU(True), F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"],
    "relu6": [nn.ReLU6(), F.relu6],
    "hardtanh": [nn.Hardtanh(), F.hardtanh, F.hardtanh_],
    "leaky_relu": [nn.LeakyReLU(), F.leaky_relu, F.leaky_relu_],
    "silu": [nn.SiLU(), F.silu],
    "gelu": [nn.GELU(), F.gelu],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "sigmoid": [nn.Sigmoid(), F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"],
    "tanh": [nn.Tanh(), F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"],
    "softmax": [nn.Softmax(1), F.softmax, torch.softmax, "softmax"],
    "add": [torch.add, operator.add, operator.iadd, "add", "add_"],
    "sub": [torch.sub, operator.sub, operator.isub, "sub", "sub_"],
    "mul": [torch.mul, operator.mul, operator.imul, "mul", "mul_"],
    "div": [torch.div, operator.truediv, operator.itruediv, "div", "div_"],
    "concat": [torch.cat, torch.concat, torch.concatenate],
    "matmul": [torch.matmul, operator.matmul, torch.bmm, torch.mm, torch.einsum, "matmul", "bmm", "mm"],
    "attention": [F.scaled_dot_product_attention],
    "conv": [nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1), F.conv1d, F.conv2d, F.conv3d, torch.conv2d],
    "conv_transpose": [nn.ConvTranspose1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1), F.conv_transpose2d],
    "linear": [nn.Linear(1, 1), F.linear],
    "batch_norm": [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1), F.batch_norm],
    "norm_act": [BatchNormAct2d(1)],
    "layer_norm": [nn.LayerNorm(1), F.layer_norm],
    "group_norm": [nn.GroupNorm(1, 1), F.group_norm],
    "identity": [nn.Identity()],
    "dropout": [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), F.dropout, F.dropout2d, F.alpha_dropout],
    "max_pool": [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1), F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d],
    "avg_pool": [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), F.avg_pool2d, F.adaptive_avg_pool2d],
    "mean": [torch.mean, "mean"],
    "view": [
        nn.Flatten(),
        torch.flatten,
        "flatten",
        "view",
        torch.reshape,
        "reshape",
        "permute",
        torch.chunk,
        "chunk",
        nn.PixelShuffle(1),
        "contiguous",
    ],
    "getitem": [operator.getitem],
    "pad": [nn.ZeroPad2d(1), F.pad],
    "interpolate": [nn.Upsample(2), F.interpolate],
    "size": ["size"],
    "other": [nn.Bilinear(1, 1, 1), torch.where, "frobnicate", torch.einsum.__class__],
}


@pytest.mark.parametrize(("word", "spelling"), [(word, spelling) for word, spellings in SPELLINGS.items() for spelling in spellings])
def test_every_spelling_is_one_word(word, spelling):
    op = "call_module" if isinstance(spelling, nn.Module) else "call_method" if isinstance(spelling, str) else "call_function"
    assert kind(one(op, spelling)) == word


def test_nodes_without_an_operation():
    gm = traced(Net(lambda s, x: x * s.scale, scale=nn.Parameter(torch.ones(1))))
    assert [kind(node) for node in gm.graph.nodes] == ["input", "constant", "mul", "output"]


def test_subclasses():
    class Same(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).abs()

    class Leaky(nn.ReLU):
        def forward(self, x):
            return x

    assert kind(one("call_module", Same(1, 1, 1))) == "conv"
    assert kind(one("call_module", Other(1, 1, 1))) == "other"
    assert kind(one("call_module", Leaky())) == "relu"
    for base, quantized in QUANTIZED_LAYERS.items():
        assert kind(one("call_module", quantized(1, 1, *[1] * (base is not nn.Linear)))) == kind(
            one("call_module", base(1, 1, *[1] * (base is not nn.Linear)))
        )


def test_argument_however_it_was_passed():
    assert argument(one("call_function", F.relu, True), 1, "inplace") is True
    assert argument(one("call_function", F.relu, inplace=True), 1, "inplace") is True
    assert argument(one("call_function", F.relu), 1, "inplace", "default") == "default"


def test_readers_come_in_graph_order():
    gm = prepared("residual")
    nodes = {node.name: node for node in gm.graph.nodes}
    assert readers(nodes["stem_3"]) == [nodes["layers_0_conv1"], nodes["add"]]
    assert readers(nodes["fc_3"]) == [nodes["output"]]
    assert readers(nodes["output"]) == []


def test_values():
    gm = traced("shuffle")
    nodes = {node.name: node for node in gm.graph.nodes}
    assert is_tensor(nodes["x"]) and not is_tensor(nodes["chunk"])
    assert is_traced(gm)
    assert not is_traced(nn.ReLU())
    assert not is_traced(torch.fx.symbolic_trace(nn.ReLU()))


def test_constant_of():
    gm = traced(
        Net(lambda s, x: x * s.p["scale"] + s.shift, p=nn.ParameterDict({"scale": torch.ones(1)}), shift=nn.Parameter(torch.ones(1)))
    )
    found = {node.target: constant_of(node) for node in gm.graph.nodes if node.op == "get_attr"}
    assert found["p.scale"] is gm.p.scale
    assert found["shift"] is gm.shift
    assert constant_of(next(iter(gm.graph.nodes))) is None


def test_fork_shares_leaves_and_isolates_edits():
    gm = traced("residual")
    code, graph, out = gm.code, str(gm.graph), gm(images())
    new = fork(gm)
    assert [part for _, part in called(new)] == [part for _, part in called(gm)]
    assert all(a is not b for a, b in zip(gm.graph.nodes, new.graph.nodes, strict=True))
    assert type(new).__name__ == type(gm).__name__
    put_module(new, "layers.0.conv1", nn.Identity())
    put_module(new, "layers.0.extra.deep", nn.ReLU())
    first = next(node for node, part in called(new) if isinstance(part, nn.ReLU))
    bypass(first, first.args[0])
    clean(new)
    assert (gm.code, str(gm.graph)) == (code, graph)
    assert isinstance(gm.layers.get_submodule("0.conv1"), nn.Conv2d)
    assert not hasattr(gm.layers.get_submodule("0"), "extra")
    assert torch.equal(gm(images()), out)


def test_deep_copy_shares_nothing_and_keeps_the_name():
    gm = traced("chain")
    new = deep_copy(gm)
    assert type(new).__name__ == type(gm).__name__ == "Sequential" and type(new) is not type(gm)
    mine, theirs = dict(gm.state_dict()), dict(new.state_dict())
    assert all(torch.equal(value, theirs[name]) and value.data_ptr() != theirs[name].data_ptr() for name, value in mine.items())
    assert str(new.graph) == str(gm.graph) and new.graph is not gm.graph


def test_fork_keeps_what_the_model_knows_about_itself():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    net.num_classes, net.pretrained_cfg = 4, {"mean": (0.5,)}
    new = copy.deepcopy(fork(fork(traced(net))))
    assert (new.num_classes, new.pretrained_cfg) == (4, {"mean": (0.5,)})
    assert not new.training


def test_put_module():
    gm = fork(traced("chain"))
    leaf = nn.ReLU()
    put_module(gm, "a.b.c", leaf)
    assert gm.get_submodule("a.b.c") is leaf
    put_module(gm, "a.b.c", nn.Identity())
    assert isinstance(gm.get_submodule("a.b.c"), nn.Identity)
    assert list(gm.a.b._modules) == ["c"]


def test_put_module_below_a_leaf_does_not_reach_other_graphs():
    gm = traced("chain")
    new = fork(gm)
    put_module(new, "0.inner", nn.ReLU())
    assert isinstance(new.get_submodule("0.inner"), nn.ReLU)
    assert not list(gm.get_submodule("0").children())
    assert new.get_parameter("0.weight") is gm.get_parameter("0.weight")


def test_put_constant():
    gm = fork(traced("chain"))
    put_constant(gm, "scale", nn.Parameter(torch.ones(1)))
    put_constant(gm, "new.place.shift", torch.ones(2))
    assert "scale" in dict(gm.named_parameters())
    assert torch.equal(gm.get_buffer("new.place.shift"), torch.ones(2))


def test_free_path():
    gm = fork(traced("chain"))
    assert free_path(gm, "new") == "new"
    assert free_path(gm, "0") == "0_1"
    assert free_path(gm, "7.3") == "7.3_1"
    assert free_path(gm, "training") == "training_1", "attributes count too"
    put_module(gm, "0_1", nn.ReLU())
    assert free_path(gm, "0") == "0_2"


def test_insert_behind():
    gm = fork(prepared("residual"))
    put_module(gm, "probe", nn.Identity())
    node = next(node for node in gm.graph.nodes if node.name == "stem_3")
    before = readers(node)
    new = insert_behind(node, "probe")
    assert readers(node) == [new]
    assert readers(new) == before
    assert new.meta["val"] is node.meta["val"]
    clean(gm)
    assert_equal(gm, prepared("residual"))


def test_insert_behind_a_node_that_is_read_twice_by_one_reader():
    gm = fork(traced(Net(lambda s, x: (y := x * 2, y + y)[1])))
    put_module(gm, "probe", nn.ReLU())
    node = next(node for node in gm.graph.nodes if node.name == "mul")
    new = insert_behind(node, "probe")
    assert readers(new)[0].args == (new, new)
    assert torch.equal(clean(gm)(images()), 2 * (2 * images()).relu())


@pytest.mark.parametrize(
    ("op", "target", "kwargs", "impure"),
    [
        ("call_method", "relu_", {}, True),
        ("call_method", "relu", {}, False),
        ("call_method", "__add__", {}, False),
        ("call_function", F.relu_, {}, True),
        ("call_function", F.relu, {"inplace": True}, True),
        ("call_function", F.relu, {}, False),
        ("call_function", operator.iadd, {}, True),
        ("call_function", operator.setitem, {}, True),
        ("call_function", torch._assert, {}, True),
        ("call_function", torch.add, {}, False),
        ("call_module", nn.ReLU(inplace=True), {}, True),
        ("call_module", nn.ReLU(), {}, False),
    ],
)
def test_is_impure(op, target, kwargs, impure):
    assert is_impure(one(op, target, **kwargs)) is impure


def test_clean_drops_what_nobody_reads():
    graph, root = Graph(), nn.Module()
    root.used, root.unused, root.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)
    x = graph.placeholder("x")
    y = graph.call_module("used", (x,))
    graph.call_module("unused", (x,))
    graph.call_module("act", (y,))
    graph.output(y)
    gm = clean(GraphModule(root, graph))
    assert names(gm) == ["x", "used", "act", "output"], "the write stays, although nobody reads its result"
    assert list(gm._modules) == ["used", "act"]


def test_module_of():
    gm = traced("chain")
    assert {module_of(node) for node, _ in called(gm)} == {part for _, part in called(gm)}


def test_fingerprint():
    a, b = fingerprint(traced("residual")), fingerprint(prepared("residual"))
    torch.manual_seed(5)
    assert a == fingerprint(traced("residual")), "weights do not count"
    assert a != b
    first, second = (fingerprint(traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=stride)))) for stride in (1, 2))
    assert [x == y for x, y in zip(first, second, strict=True)] == [True, True, False, True]
    assert all(len(line) == 8 for line in first)
