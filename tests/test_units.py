"""Units: where real networks are cut, and the law that units run one by one give what the whole graph gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from nets import NETS, Net, apply, head, images
from nets import prepared as prepare
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

import fxquant.regions
from fxquant import trace
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.errors import ConfigError
from fxquant.graph import fork
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes import PREPARE, InsertFakeQuant, InsertObservers
from fxquant.pipeline import Pipeline
from fxquant.placement import place
from fxquant.recipe import Recipe
from fxquant.units import GRANULARITIES, Unit, cut, extract, merge, on_student


def fold(model: nn.Module, size: int) -> GraphModule:
    return Pipeline([step() for step in PREPARE]).run(trace(model.eval(), torch.zeros(2, 3, size, size)))


@cache
def real(name: str) -> GraphModule:
    """Cutting only reads a graph, so tests can share it."""
    build, size, *_ = (NETWORKS | OTHERS)[name]
    return fold(build(), size)


@cache
def tiny(name: str) -> GraphModule:
    return prepare(name)


@cache
def student_of(teacher: GraphModule) -> GraphModule:
    recipe = Recipe(weight_range="minmax", activation_range="minmax")
    plan = place(teacher, 3, 4)
    observed, _ = apply(teacher, InsertObservers(plan))
    observed(images(4))
    return apply(observed, InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe)))[0]


def computed(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def weighted(gm: GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module" and kind(node) in WEIGHTED]


def learned(units: list[Unit]) -> list[str]:
    return [unit.name for unit in units if unit.layers]


@torch.no_grad()
def assert_law(gm: GraphModule, units: list[Unit], size: int = 16) -> None:
    """Every node is in one unit, units read what is there, and unit by unit gives each value of the whole graph, bit for bit."""
    assert sorted(name for unit in units for name in unit.nodes) == sorted(computed(gm))
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(weighted(gm))
    order = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = Interpreter(gm)
    whole.garbage_collect_values = False
    whole.run(x.clone())
    expected = {node.name: value for node, value in whole.env.items()}
    image = next(node.name for node in gm.graph.nodes if node.op == "placeholder")
    values: dict[str, Tensor] = {image: x.clone()}
    for unit in units:
        for part in (unit.nodes, unit.inputs, unit.outputs):
            assert list(part) == sorted(part, key=order.__getitem__)
        assert set(unit.outputs) <= set(unit.nodes) and not set(unit.inputs) & set(unit.nodes)
        part = extract(gm, unit)
        assert [node.name for node in part.graph.nodes if node.op == "placeholder"] == list(unit.inputs)
        assert all(len(values[name]) == len(x) for name in unit.inputs)
        given = part(*[values[name] for name in unit.inputs])
        for name, value in zip(unit.outputs, given if len(unit.outputs) != 1 else [given], strict=True):
            values[name] = value
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    returned = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
    assert {node.name for node in returned} <= set(values)


# Real networks


def numbered(pattern: str, counts: list[int]) -> list[str]:
    return [pattern.format(stage, block) for stage, count in enumerate(counts, 1) for block in range(count)]


def swin(depths: list[int]) -> list[str]:
    names = ["features.0.0"]
    for stage, depth in enumerate(depths):
        names += [f"features.{2 * stage}"] * (stage > 0) + [f"features.{2 * stage + 1}.{block}" for block in range(depth)]
    return [*names, "head"]


def densenet(depths: list[int]) -> list[str]:
    names = ["features.conv0"]
    for stage, depth in enumerate(depths, 1):
        names += [f"features.transition{stage - 1}.conv"] * (stage > 1)
        names += [f"features.denseblock{stage}.denselayer{layer}" for layer in range(1, depth + 1)]
    return [*names, "classifier"]


INCEPTIONS = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
VGG16 = [f"features.{index}" for index in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "resnet18": (zoo.resnet18, 64, ["conv1", *numbered("layer{}.{}", [2, 2, 2, 2]), "fc"]),
    "resnet50": (zoo.resnet50, 64, ["conv1", *numbered("layer{}.{}", [3, 4, 6, 3]), "fc"]),
    "mobilenet_v2": (zoo.mobilenet_v2, 64, [*[f"features.{index}" for index in range(19)], "classifier"]),
    "efficientnet_b0": (
        zoo.efficientnet_b0,
        64,
        ["features.0", *numbered("features.{}.{}", [1, 2, 2, 3, 3, 4, 1]), "features.8", "classifier"],
    ),
    "regnet_x_400mf": (zoo.regnet_x_400mf, 64, ["stem", *numbered("trunk_output.block{0}.block{0}-{1}", [1, 2, 7, 12]), "fc"]),
    "densenet121": (zoo.densenet121, 64, densenet([6, 12, 24, 16])),
    "googlenet": (
        lambda: zoo.googlenet(aux_logits=False, init_weights=False),
        64,
        ["conv1", "conv2", "conv3", *INCEPTIONS, "fc"],
    ),
    "vgg16_bn": (lambda: zoo.vgg16_bn(init_weights=False), 32, [*VGG16, "classifier.0", "classifier.3", "classifier.6"]),
    "shufflenet_v2": (
        zoo.shufflenet_v2_x0_5,
        64,
        ["conv1", *[f"stage{s + 1}.{b}" for s, d in ((1, 4), (2, 8), (3, 4)) for b in range(d)], "conv5", "fc"],
    ),
    "vit_b_16": (
        lambda: zoo.VisionTransformer(32, 16, 12, 4, 64, 128),
        32,
        ["conv_proj", *[f"encoder.layers.encoder_layer_{index}" for index in range(12)], "heads"],
    ),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
        32,
        ["patch_embed.proj", *[f"blocks.{index}" for index in range(12)], "head"],
    ),
    "swin_t": (zoo.swin_t, 64, swin([2, 2, 6, 2])),
    "convnext_tiny": (
        zoo.convnext_tiny,
        64,
        [name.removesuffix("head") or "classifier" for name in swin([3, 3, 9, 3])],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("vgg16_bn", "swin_t", "convnext_tiny"))) for name in NETWORKS]
)
def test_blocks_of_real_networks(name):
    _, size, expected = NETWORKS[name]
    gm = real(name)
    units = cut(gm)
    assert learned(units) == expected
    assert all(len(unit.layers) <= 12 for unit in units)
    assert_law(gm, units, size)


OTHERS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "inception_v3": (lambda: zoo.inception_v3(aux_logits=False, init_weights=False), 96, 17, 10),
    "regnet_y_400mf": (zoo.regnet_y_400mf, 64, 18, 6),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, 64, 15, 5),
    "swin_v2_t": (zoo.swin_v2_t, 64, 17, 4),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 64, 19, 5),
    "hrnet_w18_small": (lambda: timm.create_model("hrnet_w18_small"), 64, 54, 4),
    "dla34": (lambda: timm.create_model("dla34"), 64, 13, 10),
    "cspresnet50": (lambda: timm.create_model("cspresnet50"), 64, 30, 3),
    "mobilevit_xxs": (lambda: timm.create_model("mobilevit_xxs"), 64, 22, 17),
    "crossvit_tiny": (lambda: timm.create_model("crossvit_tiny_240"), 240, 37, 4),
}
"""Units with layers, and layers in the largest one. Transformers on windows folded into the batch (MobileViT) cannot be cut."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_counts_of_more_networks(name):
    _, size, count, largest = OTHERS[name]
    gm = real(name)
    units = cut(gm)
    assert (len(learned(units)), max(len(unit.layers) for unit in units)) == (count, largest)
    assert_law(gm, units, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2", "swin_t", "vit_b_16"])
@pytest.mark.parametrize("granularity", ["layer", "network"])
def test_other_granularities_of_real_networks(name, granularity):
    gm = real(name)
    assert_law(gm, cut(gm, granularity), NETWORKS[name][1])


def test_where_a_resnet_is_cut():
    units = cut(real("resnet18"))
    assert [unit.name for unit in units if not unit.layers] == ["maxpool", "avgpool .. flatten"]
    stem, block = units[0], units[2]
    assert stem == Unit("conv1", ("conv1", "relu"), ("x",), ("relu",), ("conv1",))
    assert block.nodes == ("layer1_0_conv1", "layer1_0_relu", "layer1_0_conv2", "add", "layer1_0_relu_1")
    assert (block.inputs, block.outputs) == (("maxpool",), ("layer1_0_relu_1",))


def test_where_a_dense_block_is_cut():
    units = {unit.name: unit for unit in cut(real("densenet121"))}
    third = units["features.denseblock1.denselayer3"]
    assert len(third.inputs) == 3 and len(third.layers) == 2
    assert [name.rpartition("_")[2] for name in units["features.transition1.conv"].nodes] == ["norm", "relu", "conv"]
    assert units["features.transition1.pool"].layers == ()


# Tiny networks


BLOCKS = {
    "chain": ["0", "4", "7.3"],
    "residual": ["stem.0", "layers.0", "layers.1", "fc.3"],
    "mobile": ["stem", "b.0", "b.3", "b.6", "c", "fc.3"],
    "squeeze_excite": ["stem", "reduce .. expand", "fc.3"],
    "dense": ["stem", "conv1", "conv2", "fc.3"],
    "shuffle": ["stem", "branch", "fc.3"],
    "transposed": ["0", "3", "6", "9.3"],
    "one_dimension": ["stem", "layers.0", "layers.3", "fc"],
    "linear_norm": ["0", "3", "6"],
    "pooled": ["0", "3", "6.3"],
    "Functional": ["weight_1", "head"],
    "in_place": ["conv1", "conv2", "fc.3"],
    "shared": ["stem", "conv", "conv_1", "fc.3"],
    "tied": ["0", "3", "6", "8.3"],
    "norm_act": ["0", "2", "4", "6.3"],
    "attention": ["patch", "mha", "fc"],
    "fused_attention": ["patch", "qkv .. proj", "fc"],
    "several_outputs": ["stem", "conv", "fc.3"],
}


def test_blocks_of_tiny_networks():
    assert {name: learned(cut(tiny(name))) for name in NETS} == BLOCKS


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NETS)
def test_unit_by_unit_is_the_whole(name, granularity):
    teacher = tiny(name)
    units = cut(teacher, granularity)
    assert_law(teacher, units)
    student = student_of(teacher)
    mapped = [on_student(unit, student) for unit in units]
    assert_law(student, mapped)
    assert [(unit.name, unit.layers, len(unit.inputs), len(unit.outputs)) for unit in mapped] == [
        (unit.name, unit.layers, len(unit.inputs), len(unit.outputs)) for unit in units
    ]
    for before, after in zip(units, mapped, strict=True):
        for old, new in zip([*before.inputs, *before.outputs], [*after.inputs, *after.outputs], strict=True):
            quantizer = next((node.name for node in student.graph.nodes if node.target == f"activations.{old}"), old)
            assert new == quantizer
    assert len(units) == 1 or granularity != "network"


def test_layers_stand_alone():
    gm = tiny("residual")
    units = [unit for unit in cut(gm, "layer") if unit.layers]
    assert [unit.layers for unit in units] == [(path,) for path in weighted(gm)]
    assert [len(unit.nodes) for unit in units] == [2, 2, 1, 2, 1, 1, 1]


def test_a_residual_sum_at_the_top_is_a_region(make_net):
    gm = prepare(make_net(depth=2))
    units = cut(gm)
    assert [(unit.layers, unit.nodes[-1]) for unit in units if unit.layers] == [
        (("conv1",), "act"),
        (("blocks.0.0.0", "blocks.0.2.0"), "act_1"),
        (("blocks.1.0.0", "blocks.1.2.0"), "act_2"),
        (("fc",), "fc"),
    ]
    assert_law(gm, units, 8)


def test_a_hand_written_activation_belongs_to_its_layer():
    gm = prepare(Net(lambda s, x: s.fc(_swish(s.conv(x))), conv=nn.Conv2d(3, 4, 3), fc=head(4)))
    assert [len(unit.nodes) for unit in cut(gm)] == [3, 2, 1]


def _swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def test_a_norm_in_front_belongs_to_the_layer_behind_but_not_at_the_input():
    def body(s, x):
        x = s.conv((x - 0.5) / 2)
        x = F.max_pool2d(x, 2)
        return s.fc(s.norm(x.flatten(2).transpose(1, 2))[:, 0])

    gm = prepare(Net(body, conv=nn.Conv2d(3, 4, 3), norm=nn.LayerNorm(4), fc=nn.Linear(4, 5)))
    assert [(unit.name, unit.layers, len(unit.nodes)) for unit in cut(gm)] == [
        ("sub .. truediv", (), 2),
        ("conv", ("conv",), 1),
        ("max_pool2d", (), 1),
        ("fc", ("fc",), 5),
    ]


class Stage(nn.Module):
    """A dense stage: every layer reads all before it."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4 * (1 + index), 4, 3, padding=1), nn.ReLU()) for index in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def test_a_class_with_one_long_member_is_opened_everywhere():
    def stages():
        return Net(
            lambda s, x: s.fc(s.b(s.c(s.a(s.stem(x))))), stem=nn.Conv2d(3, 4, 3), a=Stage(2), c=nn.Conv2d(12, 4, 1), b=Stage(3), fc=head(16)
        )

    gm = prepare(stages())
    assert learned(cut(gm)) == ["stem", "a", "c", "b", "fc.3"]
    short = cut(gm, longest=2)
    assert learned(short) == ["stem", "a.layers.0", "a.layers.1", "c", "b.layers.0", "b.layers.1", "b.layers.2", "fc.3"]
    assert_law(gm, short)


def test_layers_around_one_joining_module_are_a_block():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()

    class Separable(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.gate, self.point = nn.Conv2d(4, 4, 3, groups=4), Gate(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.point(self.gate(F.relu(self.wide(x))))

    gm = prepare(Net(lambda s, x: s.fc(s.block(s.stem(x))), stem=nn.Conv2d(3, 4, 3), block=Separable(), fc=head(4)))
    assert learned(cut(gm)) == ["stem", "block", "fc.3"]


# Where no cut is possible


def test_windows_in_the_batch_axis_are_not_cut():
    """`b` reads `windows` and what a layer made of `windows`: all three are one unit."""

    def body(s, x):
        x = s.stem(x)
        n, c, h, w = x.shape
        windows = x.reshape(n * 4, c // 4, h, w)
        y = s.conv(windows.reshape(n, c, h, w))
        windows = y.reshape(n * 4, c // 4, h, w) + windows
        return s.fc(windows.reshape(n, c, h, w))

    gm = prepare(Net(body, stem=nn.Conv2d(3, 8, 3), conv=nn.Conv2d(8, 8, 1), fc=head(8)))
    for granularity in GRANULARITIES:
        units = cut(gm, granularity)
        assert_law(gm, units)
    assert learned(cut(gm, "layer")) == ["stem", "conv", "fc.3"]
    assert len(next(unit for unit in cut(gm, "layer") if unit.name == "conv").nodes) > 5


def test_a_tuple_is_not_cut():
    units = cut(tiny("shuffle"), "layer")
    chunk = next(unit for unit in units if "chunk" in unit.nodes)
    assert {"chunk", "getitem", "getitem_1"} <= set(chunk.nodes) and "chunk" not in chunk.outputs


def test_a_write_through_a_view_stays_in_one_unit():
    def body(s, x):
        x = s.conv(x)
        x.flatten(1).mul_(2)
        return s.fc(s.act(x))

    gm = prepare(Net(body, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), fc=head(4)))
    assert "imul" in computed(gm)
    for granularity in GRANULARITIES:
        units = cut(gm, granularity)
        assert_law(gm, units)
        assert {"conv", "flatten", "imul", "act"} <= set(next(unit for unit in units if "imul" in unit.nodes).nodes)


def far_sizes() -> GraphModule:
    """The batch size of `shuffle`'s views is read from the network's input, far away."""
    gm = fork(tiny("shuffle"))
    image = next(node for node in gm.graph.nodes if node.op == "placeholder")
    for node in list(gm.graph.nodes):
        if node.target == "size":
            node.args = (image, 0)
            image.append(node)
    gm.recompile()
    return gm


def test_batch_sizes_from_far_away_are_computed_anew():
    gm = far_sizes()
    units = cut(gm)
    image = next(node.name for node in gm.graph.nodes if node.op == "placeholder")
    assert [unit.name for unit in units if image in unit.inputs] == ["stem"]
    assert_law(gm, units)


def test_a_truth_value_of_the_batch_size_is_no_number_to_compute_anew():
    image = next(node for node in far_sizes().graph.nodes if node.op == "placeholder")
    size = image.meta["val"].shape[0]
    with pytest.raises(NotImplementedError, match="a truth value that depends on the batch size"):
        fxquant.regions.rebuild((2, size > 3), image)


def test_numbers_that_cannot_be_computed_anew_keep_regions_together(monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    gm = far_sizes()
    monkeypatch.setattr(fxquant.regions, "rebuild", refuse)
    units = cut(gm)
    assert_law(gm, units)
    assert all(
        {reader.name for reader in node.users} <= set(unit.nodes)
        for unit in units
        for node in gm.graph.nodes
        if node.target == "size" and node.name in unit.nodes
    )


def test_values_of_constants_are_computed_where_they_are_needed():
    def body(s, x):
        bias = s.bias.exp()[None]
        x = s.a(x) + bias
        return s.fc(F.relu(s.b(x)) + bias)

    net = Net(body, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1), bias=nn.Parameter(torch.randn(4, 16, 16)), fc=head(4))
    gm = prepare(net)
    for granularity in GRANULARITIES:
        units = cut(gm, granularity)
        assert sum("exp" in unit.nodes for unit in units) == 1 and all("exp" not in unit.inputs for unit in units)
        assert_law(gm, units)


# Merging, extracting, errors


@pytest.mark.parametrize("name", ["residual", "dense", "shuffle", "attention", "several_outputs", "in_place"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_merged_units_give_the_same(name, granularity):
    gm = tiny(name)
    units = cut(gm, granularity)
    student = student_of(gm)
    for start in range(len(units)):
        for length in (1, 2, 3):
            merged = merge(gm, units[start : start + length])
            some = [*units[:start], merged, *units[start + length :]]
            assert merged.layers == tuple(layer for unit in units[start : start + length] for layer in unit.layers)
            assert_law(gm, some)
            assert on_student(merged, student) == merge(student, [on_student(unit, student) for unit in units[start : start + length]])
    assert merge(gm, units) == cut(gm, "network")[0]
    assert merge(gm, units[:1]) == units[0]


def test_units_with_a_gap_cannot_be_merged():
    gm = tiny("residual")
    units = cut(gm)
    with pytest.raises(ConfigError, match=r"^units: are not consecutive: .* Merge these as well\.$"):
        merge(gm, [units[0], units[2]])


def test_an_extracted_unit_shares_its_modules_and_leaves_the_graph_alone():
    gm = tiny("residual")
    before = str(gm.graph), gm.code
    part = extract(gm, cut(gm)[2])
    assert part.get_submodule("layers.0.conv1") is gm.get_submodule("layers.0.conv1")
    assert not part.training and not hasattr(part, "fc")
    assert (str(gm.graph), gm.code) == before


def test_several_outputs():
    gm = tiny("several_outputs")
    whole = cut(gm, "network")[0]
    assert len(whole.outputs) == 3
    x = images(5)
    expected = gm(x)
    given = extract(gm, whole)(x)
    assert isinstance(given, tuple)
    for value, other in zip(given, [*expected["features"], expected["logits"]], strict=True):
        assert torch.equal(value, other)


def test_a_network_without_layers_is_only_run():
    gm = trace(Net(lambda s, x: x.mean((2, 3)) * 2).eval(), images())
    for granularity in GRANULARITIES:
        units = cut(gm, granularity)
        assert [unit.layers for unit in units] == [()]
        assert_law(gm, units)


def test_an_unknown_granularity_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"granularity: 'blocks' is no granularity\. Use one of 'layer', 'block', 'network'; did you mean 'block'\?"
    ):
        cut(tiny("chain"), "blocks")
