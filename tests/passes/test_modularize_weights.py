"""ModularizeWeights: functional layers over stored parameters become modules under the names their author gave them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Net, apply, assert_equal, classes, images, ops, parameter, traced
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torchvision.models import SwinTransformer

from fxquant import trace
from fxquant.graph import called
from fxquant.passes import PREPARE, Canonicalize, ModularizeWeights
from fxquant.pipeline import Pipeline


def modularized(net: nn.Module):
    gm, _ = apply(traced(net), Canonicalize())
    new, log = apply(gm, ModularizeWeights())
    assert_equal(gm, new)
    return new, log


CONVS = [
    (lambda s, x: F.conv2d(x, s.w), (4, 3, 3, 3), "Conv2d"),
    (lambda s, x: F.conv2d(x, s.w, s.b, 2, 1, 1, 1), (4, 3, 3, 3), "Conv2d"),
    (lambda s, x: F.conv2d(input=x, weight=s.w, bias=s.b, padding="same", dilation=(2, 1)), (4, 3, 3, 3), "Conv2d"),
    (lambda s, x: F.conv2d(x, s.w, groups=3, stride=[2, 1], bias=s.b), (6, 1, 3, 3), "Conv2d"),
    (lambda s, x: torch.conv2d(x, s.w, s.b), (4, 3, 1, 1), "Conv2d"),
    (lambda s, x: F.conv1d(x.flatten(2), s.w, s.b, 2), (4, 3, 3), "Conv1d"),
    (lambda s, x: F.conv3d(x.unsqueeze(1), s.w, padding=1), (4, 1, 3, 3, 3), "Conv3d"),
    (lambda s, x: F.conv_transpose2d(x, s.w, None, 2, 1, 1, 3, 1), (3, 2, 3, 3), "ConvTranspose2d"),
    (lambda s, x: F.conv_transpose2d(x, s.w, stride=2, output_padding=1, dilation=2), (3, 4, 3, 3), "ConvTranspose2d"),
    (lambda s, x: F.conv_transpose1d(x.flatten(2), s.w, stride=2), (3, 4, 3), "ConvTranspose1d"),
    (lambda s, x: F.conv_transpose3d(x.unsqueeze(1), s.w), (1, 2, 2, 2, 2), "ConvTranspose3d"),
]


@pytest.mark.parametrize(("body", "shape", "wanted"), CONVS)
def test_convolutions(body, shape, wanted):
    outputs = shape[1] * (3 if wanted == "ConvTranspose2d" and shape[1] == 2 else 1) if "Transpose" in wanted else shape[0]
    net = Net(body, w=parameter(*shape), b=parameter(outputs))
    new, log = modularized(net)
    assert classes(new) == {wanted: 1}
    assert (log.count, log.skipped) == (1, [])
    ((_, module),) = called(new)
    assert module.weight is not None and torch.equal(module.weight, net.w)
    assert not any(node.op == "get_attr" for node in new.graph.nodes)
    rebuilt = type(module)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        groups=module.groups,
        dilation=module.dilation,
    )
    assert rebuilt.weight.shape == module.weight.shape


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    new, log = modularized(Net(lambda s, x: F.linear(x, s.w, s.b if bias else None), w=parameter(5, 16), b=parameter(5)))
    assert classes(new) == {"Linear": 1}
    ((node, module),) = called(new)
    assert (module.in_features, module.out_features, module.bias is not None, node.target) == (16, 5, bias, "w_1")
    assert log.count == 1


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (lambda s, x: F.batch_norm(x, s.mean, s.var), "BatchNorm2d"),
        (lambda s, x: F.batch_norm(x, s.mean, s.var, s.w, s.b, False, 0.1, 1e-2), "BatchNorm2d"),
        (lambda s, x: F.batch_norm(x, s.mean, s.var, weight=s.w, bias=s.b, eps=1e-2), "BatchNorm2d"),
        (lambda s, x: F.batch_norm(x.flatten(2), s.mean, s.var), "BatchNorm1d"),
        (lambda s, x: F.batch_norm(x.mean((2, 3)), s.mean, s.var), "BatchNorm1d"),
        (lambda s, x: F.batch_norm(x.unsqueeze(-1), s.mean, s.var), "BatchNorm3d"),
    ],
)
def test_batch_norm(body, wanted):
    net = Net(body, w=parameter(3), b=parameter(3))
    net.register_buffer("mean", torch.randn(3))
    net.register_buffer("var", torch.rand(3) + 0.5)
    new, log = modularized(net)
    assert classes(new) == {wanted: 1}
    assert log.count == 1


def test_functional_net():
    gm, _ = apply(traced("Functional"), Canonicalize())
    assert classes(gm) == {}
    before = ops(gm)
    new, log = apply(gm, ModularizeWeights())
    assert ops(new) == before
    assert classes(new) == {"Conv2d": 1, "BatchNorm2d": 1, "Linear": 1}
    assert log.count == 3
    assert [node.target for node, _ in called(new)][-1] == "head"


def test_the_layer_keeps_the_name_of_the_module_that_held_the_weight():
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(Conv2dSame(3, 4, 3, stride=2)))
    net.add_module("body", Conv2dSame(4, 4, 3, bias=False))
    new, log = modularized(net)
    assert [node.target for node, _ in called(new)] == ["stem.0", "body"]
    assert log.count == 2


def test_torchvision_swin_keeps_its_names():
    net = SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=5).eval()
    paths = {name for name, part in net.named_modules() if isinstance(part, nn.Linear)}
    gm, _ = apply(trace(net, images()), Canonicalize(), ModularizeWeights())
    assert {node.target for node, part in called(gm) if isinstance(part, nn.Linear)} == paths


REFUSALS = [
    (lambda s, x: F.conv2d(x, s.w * 2), "its weight is computed (mul), not stored; the layer stays float"),
    (lambda s, x: F.conv2d(x, s.w, s.b + 1), "its bias is computed (add), not stored; the layer stays float"),
    (lambda s, x: F.conv2d(x[:1], x.mean((0, 2, 3)).view(1, 3, 1, 1)), "its weight is computed (view), not stored; the layer stays float"),
    (lambda s, x: F.batch_norm(x, s.mean, s.var * 1), "normalizes with the statistics of the batch, not with stored ones"),
    (lambda s, x: F.batch_norm(x, None, None, training=True), "normalizes with the statistics of the batch, not with stored ones"),
    (lambda s, x: F.batch_norm(x, s.mean, s.var, s.v + 1, s.v), "its scale or shift is computed, not stored"),
    (lambda s, x: F.batch_norm(x, s.mean, s.var, s.v), "has a scale without a shift, or a shift without a scale"),
    (
        lambda s, x: F.conv2d(x, s.w, stride=(x.shape[0] + 2) // (x.shape[0] + 1)),
        "its stride or padding depends on the batch; the layer stays float",
    ),
    (lambda s, x: F.linear(x, s.one), "its weight has 1 axes"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSALS)
def test_refusals(body, reason):
    net = Net(body, w=parameter(4, 3, 1, 1), b=parameter(4), v=parameter(3), one=parameter(16))
    net.register_buffer("mean", torch.randn(3))
    net.register_buffer("var", torch.rand(3) + 0.5)
    gm, _ = apply(traced(net), Canonicalize())
    new, log = apply(gm, ModularizeWeights())
    assert new is gm
    assert [text for _, text in log.skipped] == [reason]


def test_weight_standardization_stays_functional_unless_it_is_folded():
    gm, _ = apply(traced(nn.Sequential(StdConv2d(3, 4, 3))), Canonicalize())
    new, log = apply(gm, ModularizeWeights())
    assert ops(new)["conv"] == 1 and classes(new) == {}
    assert any("its weight is computed" in text for _, text in log.skipped)


def test_two_calls_over_one_weight_become_two_modules():
    new, log = modularized(
        Net(lambda s, x: F.conv2d(x, s.p["weight"]) + F.conv2d(x * 2, s.p["weight"]), p=nn.ParameterDict({"weight": parameter(4, 3, 1, 1)}))
    )
    first, second = (node.target for node, _ in called(new))
    assert first != second
    assert log.count == 2
    assert new.get_submodule(first).weight is new.get_submodule(second).weight


def test_the_input_graph_keeps_its_parameters():
    gm, _ = apply(traced("Functional"), Canonicalize())
    state = copy.deepcopy(gm.state_dict())
    apply(gm, ModularizeWeights())
    assert state.keys() == gm.state_dict().keys()
    gm(images())


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_layer_whose_weight_is_computed_keeps_its_name(norm):
    """What computed the weight was folded; nothing of it is left but the layer."""
    compute = getattr(nn.utils.parametrizations, norm)
    net = nn.Sequential(nn.Sequential(compute(nn.Conv2d(3, 8, 3)), nn.ReLU()), compute(nn.Conv2d(8, 4, 1, bias=False))).eval()
    prepared = Pipeline([step() for step in PREPARE]).run(trace(net, images(2)))
    assert [str(node.target) for node in prepared.graph.nodes if node.op == "call_module"] == ["0.0", "0.1", "1"]
    torch.testing.assert_close(prepared(images(3)), net(images(3)))


def test_a_module_that_does_more_than_one_call_keeps_what_it_holds():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.kernel * 2) + F.conv2d(x, self.kernel * 3)

    net = nn.Sequential(Twice(), nn.ReLU()).eval()
    prepared = Pipeline([step() for step in PREPARE]).run(trace(net, images(2)))
    names = [str(node.target) for node in prepared.graph.nodes if node.op == "call_module"]
    assert len(set(names)) == 3 and "0" not in names
    torch.testing.assert_close(prepared(images(3)), net(images(3)))
