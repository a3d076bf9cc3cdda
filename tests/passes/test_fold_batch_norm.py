"""FoldBatchNorm: every layer it knows, with and without everything, and every place it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net, apply, assert_equal, classes, images, names, ops, prepared, scrambled, traced
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from fxquant.graph import called, module_of
from fxquant.passes import PREPARE, FoldBatchNorm, UnshareModules
from fxquant.passes.fold_batch_norm import fold

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {
    **{(axes, False): conv for axes, conv in zip((1, 2, 3), (nn.Conv1d, nn.Conv2d, nn.Conv3d), strict=True)},
    **{(axes, True): conv for axes, conv in zip((1, 2, 3), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), strict=True)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("axes", "transpose"), CONVS)
def test_closed_form(axes, transpose, groups, bias, affine, dtype):
    torch.manual_seed(0)
    layer = CONVS[axes, transpose](4, 8, 3, groups=groups, bias=bias)
    norm = NORMS[axes](8, affine=affine)
    pair = scrambled(nn.Sequential(layer, norm)).to(dtype)
    folded = fold(layer, norm)
    x = torch.randn(2, 4, *[6] * axes, dtype=dtype)
    assert type(folded) is type(layer) and folded is not layer
    with torch.no_grad():
        close(folded(x), pair(x))
    if not (transpose and groups > 1):  # torch's own helper is wrong there
        weight, shift = fuse_conv_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transpose
        )
        close(folded.weight, weight)
        close(folded.bias, shift)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_closed_form_linear(bias, affine):
    layer, norm = nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4, affine=affine)
    pair = scrambled(nn.Sequential(layer, norm)).double()
    folded = fold(layer, norm)
    x = torch.randn(3, 6, dtype=torch.float64)
    close(folded(x), pair(x))
    if bias and affine:
        weight, shift = fuse_linear_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        close(folded.weight, weight)
        close(folded.bias, shift)


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-12 if a.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("chain", 2, 0),
        ("residual", 6, 0),
        ("mobile", 7, 0),
        ("transposed", 3, 0),
        ("one_dimension", 2, 0),
        ("linear_norm", 2, 0),
        ("Functional", 1, 0),
        ("shared", 2, 0),
        ("tied", 3, 0),
        ("dense", 3, 3),
        ("several_outputs", 2, 1),
    ],
)
def test_counts(name, before, after):
    gm = traced(name)
    assert ops(gm)["batch_norm"] == before
    gm, _ = apply(gm, *[step() for step in PREPARE[:-1]])
    new, log = apply(gm, FoldBatchNorm())
    assert ops(new) == ops(gm) - type(ops(gm))({"batch_norm": before - after})
    assert (log.count, len(log.skipped)) == (before - after, after)
    assert_equal(gm, new)


def test_three_axes_inside_a_network():
    layers = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, groups=2), nn.BatchNorm3d(2)
    gm = traced(Net(lambda s, x: s.layers(x.unsqueeze(1)), layers=nn.Sequential(*layers)))
    new, log = apply(gm, FoldBatchNorm())
    assert log.count == 2
    assert classes(new) == {"Conv3d": 1, "ReLU": 1, "ConvTranspose3d": 1}
    assert_equal(gm, new)


def test_names_and_gradients_are_kept():
    gm = traced("residual")
    new, _ = apply(gm, UnshareModules(), FoldBatchNorm())
    assert set(names(new)) < set(names(gm))
    folded = dict(new.named_parameters())
    assert "layers.1.downsample.0.bias" in folded and "layers.1.downsample.1.weight" not in folded
    assert all(value.requires_grad for value in folded.values())
    frozen = copy.deepcopy(gm).requires_grad_(False)
    assert not any(value.requires_grad for value in apply(frozen, UnshareModules(), FoldBatchNorm())[0].parameters())


def refusals(net: nn.Module) -> list[tuple[str, str]]:
    gm = traced(net)
    before, _ = apply(gm, *[step() for step in PREPARE[:-1]])
    new, log = apply(before, FoldBatchNorm())
    assert log.count == 0
    assert new is before
    return log.skipped


CONV, NORM = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    ("body", "norm", "reason"),
    [
        (lambda s, x: (y := s.conv(x), s.bn(y) + y)[1], NORM, "its input conv has 2 readers (bn, add)"),
        (lambda s, x: (y := s.conv(x), s.bn(y), y), NORM, "its input conv has 2 readers (bn, output)"),
        (lambda s, x: s.bn(s.conv(x).relu()), NORM, "its input relu is no convolution or linear layer"),
        (
            lambda s, x: s.bn(s.conv(x)),
            nn.BatchNorm2d(4, track_running_stats=False),
            "normalizes with the statistics of the batch, not with stored ones",
        ),
        (
            lambda s, x: s.bn(s.fc(x.flatten(2))),
            nn.BatchNorm1d(3),
            "normalizes axis 1 of fc, whose output channels are the last axis",
        ),
        (lambda s, x: s.bn(x), nn.BatchNorm2d(3), "its input x is no convolution or linear layer"),
    ],
)
def test_refusals(body, norm, reason):
    net = Net(body, conv=copy.deepcopy(CONV), fc=nn.Linear(256, 4), bn=copy.deepcopy(norm))
    assert refusals(net) == [("bn", reason)]


def test_functional_norm_over_computed_statistics_is_refused():
    body = lambda s, x: (y := s.conv(x), nn.functional.batch_norm(y, s.bn.running_mean + y.mean(), s.bn.running_var))[1]  # noqa: E731
    assert refusals(Net(body, conv=copy.deepcopy(CONV), bn=copy.deepcopy(NORM))) == [
        ("batch_norm", "a functional batch norm whose statistics are no buffers of the network")
    ]


def test_subclass_with_its_own_forward_is_no_batch_norm():
    class Absolute(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 1), Absolute(4)))
    new, log = apply(gm, FoldBatchNorm())
    assert log.count == 0
    assert_equal(gm, new)


def test_a_conv_shared_by_two_norms_folds_into_two_convs():
    gm = prepared("shared")
    assert [node.target for node, part in called(gm) if isinstance(part, nn.Conv2d)] == ["stem", "conv", "conv_1"]
    assert not torch.equal(gm.get_parameter("conv.weight"), gm.get_parameter("conv_1.weight"))
    assert_equal(traced("shared"), gm)


def test_frozen_statistics_of_a_norm_in_train_mode_are_not_used():
    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    norm = next(node for node in gm.graph.nodes if node.target == "1")
    module_of(norm).train()
    _, log = apply(gm, FoldBatchNorm())
    assert log.skipped == [("1", "normalizes with the statistics of the batch, not with stored ones")]
    assert module_of(norm).training
    gm(images())
