"""FoldConstants: computed weights become stored ones, work on parameters alone is done once, all else stays."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from nets import Net, apply, assert_equal, classes, filled, images, ops, parameter, traced
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import fxquant
from fxquant.graph import called, fork
from fxquant.passes import PREPARE, Canonicalize, FoldConstants, ModularizeWeights


def folded(net: nn.Module):
    gm, _ = apply(traced(net), Canonicalize())
    new, log = apply(gm, FoldConstants())
    assert_equal(gm, new)
    return new, log


def layer_names(gm) -> list[str]:
    new, _ = apply(gm, ModularizeWeights())
    return [str(node.target) for node, _ in called(new)]


@pytest.mark.parametrize("layer", [StdConv2d, ScaledStdConv2d])
def test_standardized_weights_are_stored_under_their_name(layer):
    new, log = folded(nn.Sequential(layer(3, 4, 3, bias=True), nn.ReLU(), layer(4, 4, 3, bias=True)))
    assert (log.count, log.skipped) == (2, [])
    assert ops(new) == {"conv": 2, "relu": 1}
    assert set(fork(new).state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert layer_names(new) == ["0", "1", "2"]


def test_a_bias_put_together_of_parts():
    net = Net(lambda s, x: F.linear(x, s.w, torch.cat([s.a, torch.zeros_like(s.a), s.a])), w=parameter(6, 16), a=parameter(2))
    new, log = folded(net)
    assert (log.count, ops(new)["concat"]) == (1, 0)
    done, _ = apply(new, ModularizeWeights())
    assert classes(done) == {"Linear": 1}


def test_a_norm_whose_scale_is_computed():
    net = Net(lambda s, x: F.batch_norm(x, s.mean, s.var, s.w + 1, s.w), w=parameter(3), mean=parameter(3), var=nn.Parameter(torch.rand(3)))
    new, log = folded(net)
    assert log.count == 1
    assert classes(apply(new, ModularizeWeights())[0]) == {"BatchNorm2d": 1}


def test_layers_that_read_no_image():
    net = Net(lambda s, x: x + s.mlp(s.table).view(1, 3, 1, 16), mlp=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 16)))
    net.register_buffer("table", torch.randn(3, 2))
    new, log = folded(net)
    assert log.count == 1
    assert ops(new) == {"view": 1, "add": 1}, "the last layer's output is stored, what only moves it is not"
    assert [tuple(value.shape) for value in fork(new).state_dict().values()] == [(3, 16)]


def test_positions_that_are_computed_for_every_image():
    def body(s, x):
        ids = torch.arange(16).expand(x.shape[0], -1)
        return x + (F.one_hot(ids, 32).float() @ s.table)[:, None]

    new, log = folded(Net(body, table=parameter(32, 16)))
    assert log.count == 1
    assert ops(new)["matmul"] == 0 and ops(new)["view"] == 1
    assert [tuple(value.shape) for value in fork(new).state_dict().values()] == [(1, 16, 16)]
    for count in (1, 2, 5):
        assert torch.equal(new(images(count)), traced(Net(body, table=parameter(32, 16)))(images(count)))


def test_what_differs_between_the_images_of_a_batch_stays():
    new, log = folded(Net(lambda s, x: x + (torch.arange(x.shape[0]).float()[:, None] @ s.row)[:, None, None], row=parameter(1, 16)))
    assert (log.count, ops(new)["matmul"]) == (0, 1)


def test_a_product_of_parameters():
    new, log = folded(Net(lambda s, x: x * (s.a @ s.b).sum(), a=parameter(4, 4), b=parameter(4, 4)))
    assert (log.count, ops(new)["matmul"]) == (1, 0)


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: F.conv2d(x, s.w * x.mean()),
        lambda s, x: F.conv2d(x, s.w * x.shape[0]),
        lambda s, x: F.conv2d(x, s.w, s.b),
        lambda s, x: x + s.w.mean(),
        lambda s, x: x + s.table[s.index].view(1, 1, 4, 1).repeat(1, 1, 4, 1),
        lambda s, x: F.conv2d(x, F.dropout(s.w, 0.5, True)),
    ],
    ids=["reads the image", "reads the number of images", "stored", "no layer", "indexed table", "random"],
)
def test_what_stays(body):
    net = Net(body, w=parameter(4, 3, 1, 1), b=parameter(4), table=parameter(3))
    net.register_buffer("index", torch.tensor([0, 1, 2, 1]))
    gm, _ = apply(traced(net), Canonicalize())
    new, log = apply(gm, FoldConstants())
    assert new is gm and log.count == 0


def test_a_parameter_that_is_written_is_none():
    def body(s, x):
        table = torch.zeros_like(s.w)
        table[:1] = s.w[:1] + x.mean()
        return F.conv2d(x, table + s.w)

    gm, _ = apply(traced(Net(body, w=parameter(4, 3, 1, 1))), Canonicalize())
    new, _ = apply(gm, FoldConstants())
    assert_equal(gm, new)
    assert ops(new)["add"] == ops(gm)["add"]


def test_what_is_written_into_is_no_constant():
    def body(s, x):
        table = torch.zeros(x.shape[0], 4, 3)
        table[:, :2] = x.mean((2, 3))[:, None]
        return x.mean((2, 3))[:, None] + table @ s.w

    gm, _ = apply(traced(Net(body, w=parameter(3, 3))), Canonicalize())
    new, log = apply(gm, FoldConstants())
    assert_equal(gm, new)
    assert log.count == 0


def half_of_zeros(s, x):
    bias = s.b.clone()
    bias[2:].zero_()
    return F.conv2d(x, s.w, bias)


def chained(s, x):
    bias = (s.b * 2).sub_(s.b.flip(0)).clamp_(min=0)
    bias[1:3] = s.b[:2]
    bias[0].mul_(3).add_(1)
    return F.conv2d(x, s.w, bias.contiguous())


def twice(s, x):
    bias = s.b.clone()
    part = bias[:1]
    part.zero_()
    return F.conv2d(x, s.w, bias) + part


@pytest.mark.parametrize("body", [half_of_zeros, chained, twice])
def test_a_copy_that_is_written_into(body):
    net = Net(body, w=parameter(4, 3, 1, 1), b=parameter(4))
    before = copy.deepcopy(net.state_dict())
    new, log = folded(net)
    assert log.count >= 1
    assert len(layer_names(new)) == 1
    assert not any(str(node.target).endswith("_") or node.target is operator.setitem for node in new.graph.nodes)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not apply(new, FoldConstants())[1].count


def reads_before(s, x):
    bias = s.b.clone()
    y = F.conv2d(x, s.w, bias)
    bias.zero_()
    return y + bias.view(4, 1, 1)


def writes_the_image(s, x):
    bias = s.b.clone()
    bias[0] = x.mean()
    return F.conv2d(x, s.w, bias)


def writes_the_buffer(s, x):
    s.state.mul_(1)
    return F.conv2d(x, s.w, s.state)


def adds_the_image_later(s, x):
    bias = s.b.clone()
    bias[2:].zero_()
    bias += x.mean()
    return F.conv2d(x, s.w, bias)


def adds_the_image_to_a_view(s, x):
    bias = s.b.clone()
    bias[2:].zero_()
    first = bias[:1]
    first += x.mean()
    return F.conv2d(x, s.w, bias) + first


def copies_what_holds_the_image(s, x):
    other, bias = s.b.clone(), s.b.clone()
    other[0] = x.mean()
    bias.copy_(other)
    return F.conv2d(x, s.w, bias)


def rectifies_later(s, x):
    bias = s.b.clone()
    bias[2:].neg_()
    y = F.conv2d(x, s.w, bias)
    s.act(bias)
    return y + bias.view(4, 1, 1)


WRITES = [adds_the_image_later, adds_the_image_to_a_view, copies_what_holds_the_image, rectifies_later]


@pytest.mark.parametrize("body", [reads_before, writes_the_image, writes_the_buffer, *WRITES])
def test_a_write_that_cannot_be_folded(body):
    net = Net(body, w=parameter(4, 3, 1, 1), b=parameter(4), state=torch.ones(4), act=nn.LeakyReLU(inplace=True))
    gm, _ = apply(traced(net), Canonicalize())
    new, log = apply(gm, FoldConstants())
    for count in (1, 2, 3):  # what is left behind by one image shows at the next
        x = images(count)
        torch.testing.assert_close(new(x.clone()), net(x.clone()), rtol=0, atol=0)
    assert log.count == 0


def test_a_parameter_with_other_readers_keeps_its_value():
    net = Net(lambda s, x: F.conv2d(x, s.w * 2) + F.conv2d(x, s.w), w=parameter(4, 3, 1, 1))
    new, log = folded(net)
    assert log.count == 1
    assert torch.equal(new.w, net.w)
    assert len(layer_names(new)) == 2


def test_the_parameter_of_a_layer_that_is_called_too():
    net = Net(lambda s, x: s.conv(x) + F.conv2d(x, s.conv.weight * 2), conv=nn.Conv2d(3, 4, 1))
    gm, _ = apply(traced(net), Canonicalize())
    state = copy.deepcopy(gm.state_dict())
    new, log = apply(gm, FoldConstants())
    assert_equal(gm, new)
    assert log.count == 1
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in state.items())
    assert torch.equal(new.conv.weight, net.conv.weight)


def test_weights_may_differ_between_runs():
    """What a file is loaded into has the same graph, whatever its weights are."""
    net = nn.Sequential(StdConv2d(3, 4, 3), nn.ReLU())
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.zero_()
    graphs = []
    for each in (net, other):
        gm = traced(each)
        for step in PREPARE:
            gm, _ = apply(gm, step())
        graphs.append(str(gm.graph))
    assert graphs[0] == graphs[1]


def normed(s, x):
    """Weight normalization, written out: zeros give NaN."""
    return F.conv2d(x, s.g * s.v / s.v.norm(2, (1, 2, 3), keepdim=True), s.b)


def numbered(s, x):
    """A product that differs between the images of a batch, but for weights of zero or NaN."""
    return normed(s, x) + (torch.arange(x.shape[0]).float()[:, None] @ s.row)[:, None, None]


def placed(s, x):
    """Positions that are computed for every image, out of weights alone."""
    return normed(s, x) + (s.row.T.expand(x.shape[0], -1, -1) / s.row.norm() @ s.row)[:, None]


def counted(s, x):
    return F.conv2d(x, s.g * s.v * x.shape[0], s.b)


BODIES = {"weight norm": normed, "product by image": numbered, "product for each image": placed, "times the number of images": counted}


def weighted(body) -> nn.Module:
    members = {"g": parameter(8, 1, 1, 1), "v": parameter(8, 3, 3, 3), "b": parameter(8), "row": parameter(1, 14)}
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(Net(body, **members), head).eval()


def graph_of(net: nn.Module) -> str:
    gm = traced(net)
    for step in PREPARE:
        gm, _ = apply(gm, step())
    return str(gm.graph)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_folded_is_not_up_to_the_weights(body, value):
    assert graph_of(filled(weighted(body), value)) == graph_of(weighted(body))


@pytest.mark.parametrize("body", [normed, numbered, placed])
def test_loading_into_a_network_without_weights(body, tmp_path):
    net = weighted(body)
    quantized = fxquant.quantize(net, [images(8)], 8, 8, cat=False, recipe="fast", progress=False)
    fxquant.save(quantized, tmp_path / "network.safetensors")
    loaded = fxquant.load(tmp_path / "network.safetensors", filled(net, 0.0))
    assert torch.equal(loaded(images(3)), quantized(images(3)))


def test_what_a_parameter_has_a_share_in_is_one():
    net = Net(lambda s, x: x + (s.a @ s.b).sum() + (s.b @ s.b).sum() + s.mlp(s.b).sum(), a=parameter(4, 4), mlp=nn.Linear(4, 2))
    net.register_buffer("b", torch.randn(4, 4))
    new, log = folded(net)
    assert log.count == 3
    shared = {name: isinstance(value, nn.Parameter) for name, value in fork(new).state_dict(keep_vars=True).items()}
    assert sorted(shared.values()) == [False, True, True], shared


def test_sizes_that_two_axes_have():
    def body(s, x):
        ones = s.a.expand(x.shape[0], 1)
        return x.mean((2, 3)) + (ones @ ones.T).sum()

    _, log = folded(Net(body, a=parameter(1, 1)))
    assert log.count == 0
