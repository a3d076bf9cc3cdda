"""Placement, node for node against the published one, and every word of the rule on a tiny net."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from nets import NETS, Net, apply, images, prepared
from torch import nn
from torch.fx import GraphModule, Node

from fxquant import trace
from fxquant.errors import ConfigError, ModelError
from fxquant.kinds import kind
from fxquant.passes import PREPARE, InsertObservers
from fxquant.pipeline import Pipeline
from fxquant.placement import MATMUL_SCALES, LayerPlan, Plan, TensorPlan, _way, is_global_pool, operands, place, source
from fxquant.recipe_values import WORDS


def fold(model: nn.Module, size: int = 64) -> GraphModule:
    return Pipeline([step() for step in PREPARE]).run(trace(model.eval(), torch.zeros(2, 3, size, size)))


def bits(plan: Plan) -> dict[str, int]:
    return {name: tensor.bits for name, tensor in plan.tensors.items()}


def producers(gm: GraphModule, plan: Plan) -> list[str]:
    """Name each quantized tensor by what made it: a module's path, or ``<block path>:add`` for a sum inside of a block."""
    return [_producer(node) for node in gm.graph.nodes if node.name in plan.tensors]


def _producer(node: Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta["nn_module_stack"].values())
    path = stack[-1][0] if isinstance(stack[-1], tuple) else list(node.meta["nn_module_stack"])[-1]
    return f"{path}:add"


def resnet(depths: list[int], relus: int) -> list[str]:
    """The stem's ReLU, and each of a block's ReLUs, which is one module called several times; the last one closes the addition."""
    calls = ["relu", *[f"relu_{call}" for call in range(1, relus)]]
    return ["relu", *[f"layer{stage}.{block}.{call}" for stage, depth in enumerate(depths, 1) for block in range(depth) for call in calls]]


def mobilenet_v2() -> list[str]:
    """Every ReLU6, and every block's output: the addition where there is one, else the linear projection."""
    expected, inputs = ["features.0.2"], 32
    expected += ["features.1.conv.0.2", "features.1.conv.1"]
    inputs, block = 16, 2
    for channels, count, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for step in range(count):
            adds = inputs == channels and (stride == 1 or step > 0)
            expected += [f"features.{block}.conv.0.2", f"features.{block}.conv.1.2"]
            expected.append(f"features.{block}:add" if adds else f"features.{block}.conv.2")
            inputs, block = channels, block + 1
    return [*expected, "features.18.2"]


def regnet(depths: list[int]) -> list[str]:
    blocks = [f"trunk_output.block{stage}.block{stage}-{block}" for stage, depth in enumerate(depths, 1) for block in range(depth)]
    return ["stem.2", *[f"{block}.{part}" for block in blocks for part in ("f.a.2", "f.b.2", "activation")]]


def mnasnet() -> list[str]:
    """Every ReLU, the linear end of the separable stem, and every block's output; only the first block of a stage has no addition."""
    expected = ["layers.2", "layers.5", "layers.6"]
    for stage, count in zip(range(8, 14), (3, 3, 3, 2, 4, 1), strict=True):
        for block in range(count):
            path = f"layers.{stage}.{block}"
            expected += [f"{path}.layers.2", f"{path}.layers.5", f"{path}:add" if block else f"{path}.layers.6"]
    return [*expected, "layers.16"]


NETWORKS = {
    "resnet18": (resnet([2, 2, 2, 2], 2), "conv1", ["layer1.0.conv1"], "fc"),
    "resnet50": (resnet([3, 4, 6, 3], 3), "conv1", ["layer1.0.conv1", "layer1.0.downsample.0"], "fc"),
    "mobilenet_v2": (mobilenet_v2(), "features.0.0", ["features.1.conv.0.0"], "classifier.1"),
    "regnet_x_400mf": (
        regnet([1, 2, 7, 12]),
        "stem.0",
        ["trunk_output.block1.block1-0.proj.0", "trunk_output.block1.block1-0.f.a.0"],
        "fc",
    ),
    "mnasnet1_0": (mnasnet(), "layers.0", ["layers.3"], "classifier.1"),
}
"""What makes each quantized tensor, the first layer, the layers that read its output, the last layer."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet50")) for name in NETWORKS])
def test_published_placement(name):
    expected, first, second, last = NETWORKS[name]
    with torch.random.fork_rng():
        gm = fold(getattr(zoo, name)())
    plan = place(gm, 2, 3)
    assert producers(gm, plan) == expected
    assert list(bits(plan).values()) == [3] * (len(expected) - 1) + [8], "only what the classifier reads has 8 bits"
    convs = [path for path, part in gm.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert sorted(plan.layers) == sorted(convs)
    assert {path: layer.w for path, layer in plan.layers.items()} == {path: 8 if path in (first, last) else 2 for path in convs}
    read = {path: None if path == first else 8 if path == last else 3 for path in convs}
    assert {path: layer.a for path, layer in plan.layers.items()} == read, "the first layer reads the network's input, which is float"
    assert [layer.name for layer in plan.layers.values() if layer.edge] == [first, last]
    brecq = place(gm, 2, 3, edges="brecq")
    assert list(bits(brecq).values()) == [8] + [3] * (len(expected) - 2) + [8], "and the stem's output"
    assert brecq.layers == plan.layers | {path: replace(plan.layers[path], a=8) for path in second}
    assert set(bits(place(gm, 2, 3, edges="same")).values()) == {3}


def test_edges():
    gm = prepared("residual")
    first, *middle, last = place(gm, 2, 3).layers
    assert middle[0] == "layers.0.conv1", "which reads the stem's output"
    for edges, outer, stem, end in (("8bit", 8, 3, 8), ("brecq", 8, 8, 8), ("same", 2, 3, 3), ("float", None, 3, None)):
        plan = place(gm, 2, 3, edges)
        assert [plan.layers[name].w for name in (first, *middle, last)] == [outer, *[2] * len(middle), outer]
        assert [plan.layers[name].a for name in (first, *middle, last)] == [None, stem, *[3] * (len(middle) - 1), end]
        inner = {"layers_0_relu": 3, "layers_0_relu_1": 3, "layers_1_relu": 3}
        assert bits(plan) == {"stem_2": stem, **inner, **({"layers_1_relu_1": end} if end else {})}
    assert [plan.layers[name].edge for name in (first, *middle, last)] == ["first", *[""] * len(middle), "last"]


def test_a_network_of_one_layer_is_first_and_last():
    plan = place(prepared(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))), 2, 2)
    assert plan.layers == {"1": LayerPlan("1", "linear", 8, None, "first, last")}
    assert plan.tensors == {}, "the network's input is not quantized"


def test_float_weights_or_activations():
    gm = prepared("chain")
    assert {layer.w for layer in place(gm, None, 4).layers.values()} == {None}
    assert place(gm, None, 4).tensors == place(gm, 4, 4).tensors
    plan = place(gm, 4, None)
    assert (plan.tensors, [layer.w for layer in plan.layers.values()]) == ({}, [8, 4, 8])


def test_overrides():
    gm = prepared("residual")
    plan = place(gm, 2, 2, overrides={"layers.*": {"w": 4, "a": 4}, "layers.1.conv2": {"w": 5}, "stem.0": {"w": 3}, "fc.*": {"a": None}})
    assert {name: layer.w for name, layer in plan.layers.items()} == {
        "stem.0": 3,  # wins over the edge
        "layers.0.conv1": 4,
        "layers.0.conv2": 4,
        "layers.1.conv1": 4,
        "layers.1.conv2": 5,  # the later glob wins
        "layers.1.downsample.0": 4,
        "fc.3": 8,
    }
    assert bits(plan) == {"stem_2": 4, "layers_0_relu": 4, "layers_0_relu_1": 4, "layers_1_relu": 4}
    assert {name: layer.a for name, layer in plan.layers.items()} == {
        "stem.0": None,  # reads the network's input
        "layers.0.conv1": 4,
        "layers.0.conv2": 4,
        "layers.1.conv1": 4,
        "layers.1.conv2": 4,
        "layers.1.downsample.0": 4,
        "fc.3": None,
    }
    order = place(gm, 2, 2, overrides={"layers.1.conv2": {"w": 5}, "layers.*": {"w": 4}})
    assert order.layers["layers.1.conv2"].w == 4


def test_overrides_win_over_the_rule_of_brecq():
    gm = prepared("residual")
    base = place(gm, 2, 2, "brecq")
    assert (base.tensors["stem_2"].bits, base.layers["layers.0.conv1"].a) == (8, 8)
    plan = place(gm, 2, 2, "brecq", {"layers.0.conv1": {"a": 4}})
    assert plan.tensors["stem_2"] == TensorPlan("stem_2", 4, ("layers.0.conv1",))
    assert plan.layers == base.layers | {"layers.0.conv1": LayerPlan("layers.0.conv1", "conv", 2, 4, "")}
    assert plan.tensors == base.tensors | {"stem_2": plan.tensors["stem_2"]}


def test_no_override_makes_the_first_layer_read_less_than_the_input():
    plan = place(prepared("residual"), 2, 2, overrides={"stem.0": {"a": 4}})
    assert plan.layers["stem.0"].a is None
    assert plan.tensors == place(prepared("residual"), 2, 2).tensors


@pytest.mark.parametrize(
    "arguments",
    [
        {"overrides": {"*": {"w": None, "a": None}}},
        {"a": None, "overrides": {"*": {"w": None}}},
        {"w": None, "overrides": {"3": {"a": None}}},
        {"edges": "float"},
    ],
)
def test_nothing_left_to_quantize(arguments):
    gm = prepared(nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.ReLU(), nn.Linear(4, 5)))
    with pytest.raises(
        ConfigError, match=r"^edges and overrides: leave every weight and activation float\. Give bits to one layer at least\.$"
    ):
        place(gm, **{"w": 2, "a": 2, **arguments})


def test_a_tensor_with_several_readers_gets_the_most_bits():
    gm = prepared("residual")
    plan = place(gm, 2, 2, overrides={"layers.1.downsample.0": {"a": 6}})
    assert plan.tensors["layers_0_relu_1"] == TensorPlan("layers_0_relu_1", 6, ("layers.1.conv1", "layers.1.downsample.0"))
    assert [plan.layers[name].a for name in ("layers.1.conv1", "layers.1.downsample.0")] == [6, 6], "what they get to read"
    assert plan.tensors["layers_0_relu"].bits == 2
    plan = place(gm, 2, 2, overrides={"layers.1.downsample.0": {"a": None}})
    assert plan.tensors["layers_0_relu_1"].readers == ("layers.1.conv1",)
    assert plan.layers["layers.1.downsample.0"].a == 2, "it asked for float, but the tensor is quantized for another reader"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": 1}, "^w: 1 bits are not supported. Use a whole number from 2 to 8, or None for float.$"),
        ({"w": 9}, "^w: 9 bits"),
        ({"a": True}, "^a: True bits"),
        ({"a": 2.5}, "^a: 2.5 bits"),
        ({"a": "4"}, "^a: '4' bits"),
        ({"edges": "8bits"}, "^edges: '8bits' is no rule. Use one of '8bit', 'brecq', 'same', 'float', 'integer'; did you mean '8bit'\\?$"),
        ({"edges": ["8bit"]}, r"^edges: \['8bit'\] is no rule. Use one of '8bit', 'brecq', 'same', 'float'"),
        ({"overrides": ["layers.1.conv1"]}, r'^overrides: is a list. Write a dict such as {"layer4.\*": {"w": 4}}.$'),
        (
            {"overrides": {"layers.1.conv1": {"bits": 4}}},
            r"^overrides\['layers.1.conv1'\]: {'bits': 4} is not a dict with the keys 'w' and 'a'",
        ),
        ({"overrides": {"layers.1.conv1": 4}}, r"^overrides\['layers.1.conv1'\]: 4 is not a dict"),
        ({"overrides": {"stem.0": {"w": 1}}}, r"^overrides\['stem.0'\]\['w'\]: 1 bits"),
        (
            {"overrides": {"layer.1.conv1": {"w": 4}}},
            r"^overrides\['layer.1.conv1'\]: matches no layer. Did you mean 'layers.1.conv1'\? Layers are named",
        ),
        ({"overrides": {"layer1.*": {"w": 4}}}, r"matches no layer. Did you mean 'layers.1.\*'\? "),
        (
            {"overrides": {"zzz": {"w": 4}}},
            r"matches no layer. Layers are named 'stem.0', 'layers.0.conv1', 'layers.0.conv2', 'layers.1.conv1' and 3 more\.$",
        ),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    with pytest.raises(ConfigError, match=message):
        place(prepared("residual"), **{"w": 2, "a": 2, **arguments})


def test_a_network_without_layers():
    gm = prepared(Net(lambda s, x: (x @ x.transpose(-1, -2)).relu()))
    with pytest.raises(ModelError, match=r"^Net: has no convolution or linear layer with stored weights, so there is nothing to quantize"):
        place(gm, 2, 2)


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_round_trip_through_json(name):
    plan = place(prepared(name), 2, 3, "brecq")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_every_reader_of_a_quantized_tensor_reads_the_quantized_value():
    gm = prepared("mobile")
    plan = place(gm, 2, 2)
    new, _ = apply(gm, InsertObservers(plan))
    add = next(node for node in new.graph.nodes if node.name == "add")
    assert [parent.name for parent in add.args] == ["activations_b_6", "c_6"]
    assert "c_6" not in plan.tensors, "what only enters a sum is not quantized"


STEM = {"stem": nn.Conv2d(3, 4, 1), "act": nn.ReLU(), "conv": nn.Conv2d(4, 4, 1), "wide": nn.Conv2d(8, 4, 1), "fc": nn.Linear(4, 5)}
STEM |= {"channel": nn.Conv2d(1, 4, 1), "row": nn.Linear(16, 5)}
STEM |= {"nearest": nn.Upsample(scale_factor=2.0), "bilinear": nn.Upsample(scale_factor=2.0, mode="bilinear")}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(lambda s, x: s.fc(s.act(s.stem(x)).mean((2, 3))), ["act"], id="global mean: in front"),
        pytest.param(
            lambda s, x: s.fc(nn.functional.adaptive_avg_pool2d(s.act(s.stem(x)), 1).flatten(1)), ["act"], id="global pool: in front"
        ),
        pytest.param(
            lambda s, x: s.fc(nn.functional.avg_pool2d(s.act(s.stem(x)), 16).flatten(1)), ["act"], id="pool as large as the map: in front"
        ),
        pytest.param(lambda s, x: s.conv(nn.functional.avg_pool2d(s.act(s.stem(x)), 2)), ["avg_pool2d"], id="local average: behind"),
        pytest.param(lambda s, x: s.conv(nn.functional.max_pool2d(s.act(s.stem(x)), 2)), ["act"], id="maximum: in front"),
        pytest.param(lambda s, x: s.conv(s.stem(x).chunk(2, 1)[0].repeat(1, 2, 1, 1)), ["stem"], id="chunk: the tensor it is a part of"),
        pytest.param(lambda s, x: s.wide(torch.cat([s.act(s.stem(x)), s.stem(x)], 1)), ["cat"], id="concatenation: behind"),
        pytest.param(
            lambda s, x: s.conv(s.stem(x) * s.stem(x).mean((2, 3), keepdim=True).sigmoid()), ["mul"], id="squeeze-excite: the product"
        ),
        pytest.param(lambda s, x: s.conv(nn.functional.pad(s.act(s.stem(x)), (1, 1))), ["act"], id="padding: in front"),
        pytest.param(lambda s, x: s.conv(nn.functional.interpolate(s.act(s.stem(x)), scale_factor=2.0)), ["act"], id="nearest: in front"),
        pytest.param(
            lambda s, x: s.conv(nn.functional.interpolate(s.act(s.stem(x)), scale_factor=2.0, mode="bilinear")),
            ["interpolate"],
            id="bilinear: behind",
        ),
        pytest.param(lambda s, x: s.conv(s.nearest(s.act(s.stem(x)))), ["act"], id="nearest, as a module: in front"),
        pytest.param(lambda s, x: s.conv(s.bilinear(s.act(s.stem(x)))), ["bilinear"], id="bilinear, as a module: behind"),
        pytest.param(
            lambda s, x: s.conv(nn.functional.interpolate(s.act(s.stem(x)), None, 2.0, "bilinear")),
            ["interpolate"],
            id="bilinear, by position: behind",
        ),
        pytest.param(
            lambda s, x: s.channel(s.act(s.stem(x)).mean(1, keepdim=True)), ["mean"], id="mean over channels, a map of one: behind"
        ),
        pytest.param(lambda s, x: s.row(s.act(s.stem(x)).mean(1)), ["mean"], id="mean over channels: behind"),
        pytest.param(lambda s, x: s.conv(s.stem(x)) + s.stem(x), ["stem"], id="a sum at the end is float"),
        pytest.param(
            lambda s, x: torch.matmul(s.act(s.stem(x)), other=s.conv(x[:, :1].expand(-1, 4, -1, -1))), ["act", "conv"], id="matmul: both"
        ),
        pytest.param(lambda s, x: torch.einsum("bchw,bcwk->bchk", s.act(s.stem(x)), s.stem(x)), ["act", "stem_1"], id="einsum: both"),
    ],
)
def test_where_a_quantizer_goes(body, expected):
    gm = prepared(Net(body, **STEM))
    assert list(place(gm, 2, 2).tensors) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), True),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 2), False),
        (lambda x: x.mean((2, 3)), True),
        (lambda x: x.mean((2, 3), keepdim=True), True),
        (lambda x: x.flatten(2).mean(2), True),
        (lambda x: x.flatten(2).mean(1), True),
        (lambda x: x.mean(1), False),
        (lambda x: x.mean(3), False),
        (lambda x: x.mean(1, keepdim=True), False),
    ],
)
def test_global_pools(body, expected):
    node = next(node for node in reversed(prepared(Net(lambda s, x: body(x))).graph.nodes) if node.op != "output")
    assert kind(node) in ("avg_pool", "mean")
    assert is_global_pool(node) is expected


def test_source_stops_at_the_input():
    gm = prepared(Net(lambda s, x: s.fc(x.flatten(2).transpose(1, 2)[..., :3].mean(1)), fc=nn.Linear(3, 5)))
    fc = next(node for node in gm.graph.nodes if node.name == "fc")
    assert source(fc.args[0]).op == "placeholder"


def test_shuffle_and_dense():
    shuffle = place(prepared("shuffle"), 2, 3)
    assert shuffle.tensors["stem_2"].readers == ("branch.0",)
    assert list(shuffle.tensors) == ["stem_2", "branch_0", "cat"]
    assert bits(place(prepared("dense"), 2, 3)) == {"relu": 3, "relu_1": 3, "relu_2": 8}


def test_attention():
    plan = place(prepared("attention"), 2, 3)
    assert {name: tensor.readers for name, tensor in plan.tensors.items()} == {
        "norm": ("mha.in_proj",),
        "getitem_1": ("matmul",),
        "getitem_2": ("matmul_1",),
        "mul": ("matmul",),
        "softmax": ("matmul_1",),
        "matmul_1": ("mha.out_proj",),
        "add": ("matmul_2", "matmul_3"),
        "softmax_1": ("matmul_3",),
        "add_1": ("fc",),
    }
    assert plan.layers["matmul"] == LayerPlan("matmul", "matmul", None, 3, "")


def test_the_given_graph_is_only_read():
    gm = prepared("residual")
    before = str(gm.graph), gm.code
    out = gm(images())
    place(gm, 2, 2, overrides={"*": {"w": 4}})
    assert (str(gm.graph), gm.code) == before
    assert torch.equal(out, gm(images()))


@pytest.mark.parametrize("name", ["chain", "residual", "mobile", "attention"])
def test_integer_edges_quantize_the_images(name):
    gm = prepared(name)
    plan, usual = place(gm, 2, 3, "integer"), place(gm, 2, 3)
    (images,) = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert plan.tensors[images].bits == 8
    shortcuts = {"layers_1_downsample_0": TensorPlan("layers_1_downsample_0", 8, ("add_1",))} if name == "residual" else {}
    assert {node: tensor for node, tensor in plan.tensors.items() if node != images} == usual.tensors | shortcuts
    assert {layer.a for layer in plan.layers.values() if "first" in layer.edge} == {8}
    assert images not in place(gm, 2, None, "integer").tensors


@pytest.mark.parametrize(
    ("body", "found"),
    [
        pytest.param(lambda s, x: s.d(F.relu6(s.b(s.a(x)) + s.c(s.a(x)))), ["c"], id="alike: the later one"),
        pytest.param(lambda s, x: (lambda y: s.d(s.b(y) + s.c(y.relu())))(s.a(x)), ["b"], id="the one that reads what others read"),
        pytest.param(lambda s, x: (lambda y: s.d(s.b(y) + y))(s.a(x)), [], id="one of them is quantized"),
        pytest.param(lambda s, x: s.d((s.b(s.a(x)) + s.c(s.a(x))).sigmoid()), [], id="no quantizer behind the sum"),
        pytest.param(lambda s, x: s.d(s.b(s.a(x)) * s.c(s.a(x))), [], id="a product"),
        pytest.param(lambda s, x: s.d(s.b(s.a(x)) + s.c(s.a(x)).mean((2, 3), True)), [], id="a sum with means"),
        pytest.param(lambda s, x: s.d(s.b(s.a(x)) + s.c(s.a(x.mean((2, 3), True)))), [], id="a sum of two shapes"),
        pytest.param(lambda s, x: s.d(torch.add(s.b(s.a(x)), s.c(s.a(x)), alpha=2)), [], id="a sum with a factor"),
        pytest.param(lambda s, x: s.d(s.b(s.a(x)) + s.c(s.a(x)) + s.b(s.a(x))), [], id="a sum of three"),
    ],
)
def test_integer_edges_quantize_one_of_two_layers_that_are_added(body, found):
    gm = prepared(Net(body, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1), d=nn.Conv2d(4, 4, 1)))
    plan, usual = place(gm, 2, 3, "integer"), place(gm, 2, 3)
    (images,) = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert sorted({*plan.tensors} - {*usual.tensors, images}) == found
    assert {plan.tensors[name].bits for name in found} <= {8}
    for given in ({"w": 2, "a": None}, {"w": None, "a": 3}, {"w": 2, "a": 3, "overrides": {"[bc]": {"w": None}}}):
        assert not {*place(gm, edges="integer", **given).tensors} & {"b", "c"}


def test_integer_edges_leave_sums_of_one_dimension_alone():
    """They are not lowered."""
    parts = {name: nn.Conv1d(3 if name == "a" else 4, 4, 1) for name in "abcd"}
    gm = prepared(Net(lambda s, x: s.d((s.b(s.a(x.flatten(2))) + s.c(s.a(x.flatten(2)))).relu()), **parts))
    assert not {*place(gm, 2, 3, "integer").tensors} & {"b", "c"}


def operands_of(gm: GraphModule, plan: Plan) -> dict[str, list[str]]:
    """Return, for each product, the planned tensor that each operand comes from, the nearest on the way."""
    found: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        if kind(node) in ("matmul", "attention"):
            ways = [[step.name for step in _way(operand)] for operand in operands(node)]
            found[node.name] = [next((name for name in way if name in plan.tensors), "") for way in ways]
    return found


def assert_nothing_is_quantized_twice(gm: GraphModule, plan: Plan) -> None:
    """No value passes two quantizers without an operation between."""
    for node in gm.graph.nodes:
        if node.name in plan.tensors:
            assert not [step.name for step in _way(node)[1:] if step.name in plan.tensors], node.name


class Split(nn.Module):
    """Attention over one projection; `of` splits it into q, k and v ``[N, heads, L, d]``, `more` reads the parts besides."""

    def __init__(self, of: Callable[[torch.Tensor], Any], more: Callable[..., Any] | None = None):
        super().__init__()
        self.patch, self.qkv, self.fc, self.conv = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 5), nn.Conv2d(2, 2, 1)
        self.of, self.more = of, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.of(self.qkv(self.patch(x).flatten(2).transpose(1, 2)))
        y = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        if self.more is not None:
            y = y + self.more(self, q, k, v)
        return self.fc(y.transpose(1, 2).flatten(2).mean(1))


def unbound(x: torch.Tensor) -> Any:
    return x.reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)


def indexed(x: torch.Tensor) -> Any:
    x = x.reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return x[0], x[1], x[2]


def chunked(x: torch.Tensor) -> Any:
    return tuple(part.reshape(-1, 16, 2, 4).transpose(1, 2) for part in x.chunk(3, -1))


def sliced(x: torch.Tensor) -> Any:
    return tuple(part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (x[..., :8], x[..., 8:16], x[..., 16:]))


def stacked(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)


def selected(x: torch.Tensor) -> Any:
    return tuple(stacked(x).select(0, part) for part in range(3))


def selected_by_function(x: torch.Tensor) -> Any:
    return tuple(torch.select(stacked(x), 0, part) for part in range(3))


def narrowed(x: torch.Tensor) -> Any:
    return tuple(x.narrow(-1, start, 8).unflatten(-1, (2, 4)).transpose(1, 2) for start in (0, 8, 16))


def narrowed_by_function(x: torch.Tensor) -> Any:
    return tuple(torch.narrow(x, -1, start, 8).unflatten(-1, (2, 4)).transpose(1, 2) for start in (0, 8, 16))


SPLITS = [unbound, indexed, chunked, sliced, selected, selected_by_function, narrowed, narrowed_by_function]


@pytest.mark.parametrize("of", SPLITS)
def test_each_part_of_a_projection_has_a_quantizer_of_its_own(of):
    gm = prepared(Split(of))
    plan = place(gm, 2, 3)
    assert "qkv" not in plan.tensors
    (q, k), (p, v) = operands_of(gm, plan).values()
    kinds = {node.name: kind(node) for node in gm.graph.nodes}
    picked = "getitem" if of in (unbound, indexed, chunked, sliced) else "view"
    assert [kinds[name] for name in (q, k, p, v)] == ["mul", picked, "softmax", picked]
    assert k != v and plan.tensors[p].softmax
    assert [plan.tensors[name].readers for name in (q, k, p, v)] == [("matmul",), ("matmul",), ("matmul_1",), ("matmul_1",)]
    assert_nothing_is_quantized_twice(gm, plan)


@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("of", SPLITS)
def test_a_whole_that_a_layer_reads_is_quantized_once(of, scales):
    """The convolution over v wants the projection behind v quantized, so k and v are on its grid already."""
    gm = prepared(Split(of, more=lambda s, q, k, v: s.conv(v)))
    plan = place(gm, 2, 3, matmul_scales=scales)
    assert plan.tensors["qkv"] == TensorPlan("qkv", 3, ("matmul", "matmul_1", "conv"))
    assert [names[1] for names in operands_of(gm, plan).values()] == ["qkv", "qkv"]
    assert_nothing_is_quantized_twice(gm, plan)
    floating = place(gm, 2, 3, overrides={"conv": {"a": None}}, matmul_scales=scales)
    assert "qkv" not in floating.tensors and floating.layers["conv"].a == 3, "it reads v, which is quantized for the product"
    assert_nothing_is_quantized_twice(gm, floating)


def test_a_part_that_two_products_read_is_quantized_once():
    gm = prepared(Split(unbound, more=lambda s, q, k, v: (k @ k.transpose(-2, -1)) @ v + q @ k[:, :, :4].transpose(-2, -1)))
    for scales in ("tensor", "head"):
        plan = place(gm, 2, 3, matmul_scales=scales)
        assert_nothing_is_quantized_twice(gm, plan)
        assert all(all(names) for names in operands_of(gm, plan).values())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("edges", ["same", "integer"])
def test_nothing_is_quantized_twice(name, scales, edges):
    gm = prepared(name)
    plan = place(gm, 2, 3, edges, matmul_scales=scales)
    assert_nothing_is_quantized_twice(gm, plan)
    new, _ = apply(gm, InsertObservers(plan))
    assert all(isinstance(node.meta.get("val"), torch.Tensor) for node in new.graph.nodes if str(node.target).startswith("activations."))


def test_a_scale_a_head():
    gm = prepared("fused_attention")
    plan = place(gm, 2, 3, matmul_scales="head")
    assert operands_of(gm, plan) == {"matmul": ["mul", "transpose_2"], "matmul_1": ["softmax", "getitem_2"]}
    assert {name: tensor.axis for name, tensor in plan.tensors.items()} == {
        "norm": None,
        "mul": 1,
        "transpose_2": 1,
        "softmax": 1,
        "getitem_2": 1,
        "matmul_1": None,
        "add": None,
    }
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert place(prepared("attention"), 2, 3, matmul_scales="head").tensors["add"].axis is None, "[N, L, d] has no heads"
    assert {tensor.axis for tensor in place(gm, 2, 3).tensors.values()} == {None}


def test_an_axis_as_long_as_the_batch_is_no_heads():
    def body(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.stem(x).transpose(0, 1)
        return (x @ x.transpose(-2, -1)).transpose(0, 1)

    plan = place(prepared(Net(body, stem=nn.Conv2d(3, 4, 1))), 2, 3, matmul_scales="head")
    assert {name: tensor.axis for name, tensor in plan.tensors.items()} == {"stem": None}


def test_a_recipe_takes_the_same_words():
    assert WORDS["matmul_scales"] is MATMUL_SCALES


def test_a_plan_of_an_older_file_has_one_scale_a_tensor():
    old = {"layers": [], "tensors": [{"node": "relu", "bits": 3, "readers": ["conv"]}]}
    assert Plan.from_dict(old).tensors == {"relu": TensorPlan("relu", 3, ("conv",))}


def test_other_words_for_scales():
    with pytest.raises(ConfigError, match=r"^matmul_scales: 'heads' is not known. Use one of 'tensor', 'head'; did you mean 'head'\?$"):
        place(prepared("attention"), 2, 2, matmul_scales="heads")
