"""The statistics of folded batch norms, against the norms themselves in the network that was not folded."""

from __future__ import annotations

import pytest
import torch
from nets import Net, images, prepared, scrambled
from torch import Tensor, nn

from fxquant import trace
from fxquant.passes import PREPARE
from fxquant.pipeline import Pipeline
from fxquant.reconstruction.norms import NORMS, FoldedNorm, norm_distance


def both(layer: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, FoldedNorm]:
    """Return what the norm reads in the float network, what the folded layer gives, and the norm as it was folded."""
    net = scrambled(Net(lambda s, x: s.norm(s.layer(x)), layer=layer, norm=norm))
    folded = Pipeline([step() for step in PREPARE]).run(trace(net, x[:2]))
    with torch.no_grad():
        return net.layer(x), folded(x), folded.meta[NORMS]["layer"]


def pdquant(y: Tensor, norm: nn.Module) -> Tensor:
    """Return PD-Quant's distance for the input ``[N, C, ...]`` of a batch norm, by loops over images and channels."""
    total = 0.0
    for image in y.double():
        for c, channel in enumerate(image):
            mean, variance = norm.running_mean[c].double(), norm.running_var[c].double()
            total += (channel.mean() - mean).square()
            if channel.numel() > 1:
                total += ((channel.var() + 1e-6).sqrt() - (variance + norm.eps).sqrt()).square()
    return total / len(y)


LAYERS = {
    "conv": (lambda: (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), (4, 3, 7, 6)),
    "no bias": (lambda: (nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-2)), (4, 3, 7, 6)),
    "not affine": (lambda: (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)), (4, 4, 5, 5)),
    "transposed": (lambda: (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)), (4, 4, 3, 3)),
    "linear": (lambda: (nn.Linear(7, 5), nn.BatchNorm1d(5)), (4, 7)),
    "one dimension": (lambda: (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (4, 3, 9)),
    "one dimension, as long as wide": (lambda: (nn.Conv1d(3, 5, 3, padding=1), nn.BatchNorm1d(5)), (4, 3, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_distance_is_that_at_the_input_of_the_norm(case):
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer, norm = make()
    before, after, folded = both(layer, norm, torch.randn(shape))
    torch.testing.assert_close(after, norm(before), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm_distance(after, folded).double(), pdquant(before, norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", LAYERS)
def test_what_is_stored_is_the_norm(case):
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer, norm = make()
    before, after, folded = both(layer, norm, torch.randn(shape))
    assert torch.equal(folded.mean, norm.running_mean) and folded.mean is not norm.running_mean
    torch.testing.assert_close(folded.deviation, (norm.running_var + norm.eps).sqrt())
    spread = [-1, *[1] * (before.ndim - 2)]
    torch.testing.assert_close(folded.factor.view(spread) * before + folded.shift.view(spread), after, rtol=1e-4, atol=1e-5)


def test_images_with_the_stored_statistics_are_at_no_distance():
    channels, size = 4, 6
    mean, deviation = torch.randn(channels), torch.rand(channels) + 0.5
    factor, shift = torch.tensor([0.5, -2.0, 1.0, 0.3]), torch.randn(channels)
    y = torch.randn(3, channels, size * size)
    y = (y - y.mean(2, True)) / y.std(2, keepdim=True) * deviation[:, None] + mean[:, None]
    norm = FoldedNorm(mean, deviation, factor, shift)
    out = (factor[:, None] * y + shift[:, None]).view(3, channels, size, size)
    assert norm_distance(out, norm) < 1e-9
    assert norm_distance(out + factor.view(-1, 1, 1), norm).item() == pytest.approx(channels, rel=1e-4)  # each mean is off by one


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [([0.0, 0.0], [1.0, 1.0], False), ([0.0], [1.0], False), ([0.0, 0.1], [1.0, 1.0], True), ([0.0, 0.0], [1.0, 1.1], True)],
)
def test_a_norm_that_was_never_trained_or_folded_before_has_no_statistics(mean, deviation, expected):
    norm = FoldedNorm(torch.tensor(mean), torch.tensor(deviation), torch.rand(len(mean)), torch.rand(len(mean)))
    assert norm.has_statistics is expected


def test_channels_that_the_norm_multiplies_by_zero_do_not_count():
    norm = FoldedNorm(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]), torch.zeros(2))
    out = torch.randn(3, 2, 4, 4)
    rest = FoldedNorm(torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1))
    assert norm_distance(out, norm) == norm_distance(out[:, 1:], rest)


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (3, 2)])
def test_with_one_position_only_the_mean_counts(shape):
    norm = FoldedNorm(torch.tensor([1.0, 2.0]), torch.ones(2), torch.ones(2), torch.zeros(2))
    assert norm_distance(torch.zeros(shape), norm).item() == 5


def test_the_distance_has_finite_gradients_where_a_channel_is_constant():
    out = torch.zeros(2, 3, 4, 4, requires_grad=True)
    norm_distance(out, FoldedNorm(torch.ones(3), torch.ones(3), torch.ones(3), torch.zeros(3))).backward()
    torch.testing.assert_close(out.grad, torch.full_like(out, -2 / 16 / 2))  # of the means alone


def test_every_folded_norm_is_kept_and_no_other():
    for name in ("mobile", "transposed", "norm_act", "Functional", "tied"):
        gm = prepared(name)
        for path, norm in gm.meta.get(NORMS, {}).items():
            out = torch.fx.Interpreter(gm)
            out.garbage_collect_values = False
            out.run(images())
            node = next(node for node in gm.graph.nodes if node.op == "call_module" and node.target == path)
            assert len(norm.factor) == out.env[node].shape[1] == len(norm.mean)
            assert torch.isfinite(norm_distance(out.env[node].detach(), norm))
    assert set(prepared("residual").meta[NORMS]) == {
        "stem.0", "layers.0.conv1", "layers.0.conv2", "layers.1.conv1", "layers.1.conv2", "layers.1.downsample.0",
    }  # fmt: skip
    assert not prepared("attention").meta.get(NORMS)


def test_two_norms_in_a_row_keep_the_last():
    torch.manual_seed(0)
    first, last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    net = scrambled(Net(lambda s, x: s.last(s.first(s.layer(x))), layer=nn.Conv2d(3, 4, 3), first=first, last=last))
    folded = Pipeline([step() for step in PREPARE]).run(trace(net, images()))
    with torch.no_grad():
        y = first(net.layer(images()))
    found = norm_distance(folded(images()).detach(), folded.meta[NORMS]["layer"])
    torch.testing.assert_close(found.double(), pdquant(y, last), rtol=1e-3, atol=1e-5)
