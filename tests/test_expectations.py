"""Means that follow from batch norms, against numerical integration and against what networks give for normal inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import Net, conv_bn, head, prepared
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import trace
from fxquant.channels import ChannelClamp, Place
from fxquant.expectations import Expected, expectations, rectified_mean
from fxquant.graph import is_tensor
from fxquant.passes import PREPARE, EqualizeChannels
from fxquant.pipeline import Pipeline
from fxquant.reconstruction.norms import NORMS


def test_rectified_means_are_the_integrals():
    mean = torch.linspace(-4, 9, 40, dtype=torch.float64)[:, None]
    deviation = torch.tensor([0.01, 0.5, 2.0, 7.0], dtype=torch.float64)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / (2 * torch.pi) ** 0.5
    for bound in (None, 6.0, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)):
        got = rectified_mean(mean, deviation, bound)
        for row in (0, 7, 13, 39):
            for column in range(4):
                y = (mean[row] + deviation[column] * z).relu()
                if bound is not None:
                    y = y.clamp(max=bound if isinstance(bound, float) else bound[column].item())
                assert got[row, column] == pytest.approx(torch.trapezoid(y * density, z).item(), abs=1e-7)


def test_a_constant_channel_is_its_own_mean():
    mean = torch.tensor([-1.0, 0.0, 2.0, 8.0], dtype=torch.float64)
    assert rectified_mean(mean, torch.zeros_like(mean), 6.0).tolist() == [0, 0, 2, 6]


def exact(body, **members: nn.Module):
    """Return a prepared network of 1x1 layers whose norms hold the true statistics for normal images, and many such images."""
    torch.manual_seed(0)
    net = Net(body, **members)
    x = torch.randn(64, 3, 32, 32)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
            nn.init.uniform_(part.weight, 0.5, 4.0)
            nn.init.normal_(part.bias, 0.5)
    net.train()(x)
    return prepared_at(net.eval(), x[:2]), x


def prepared_at(net: nn.Module, x: Tensor) -> GraphModule:
    return Pipeline([step() for step in PREPARE]).run(trace(net, x))


BODIES = {
    "relu": lambda self, x: self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3))),
    "relu6": lambda self, x: self.fc(F.relu6(self.bn(self.conv(x))).mean((2, 3))),
    "pool": lambda self, x: self.fc(F.adaptive_avg_pool2d(self.bn(self.conv(x)), 1).flatten(1)),
    "sum": lambda self, x: self.fc((self.bn(self.conv(x)) + self.bn2(self.conv2(x))).mean((2, 3))),
    "map": lambda self, x: self.wide(F.avg_pool2d(F.relu(self.bn(self.conv(x))), 16).flatten(1)),
}


@pytest.mark.parametrize("name", BODIES)
def test_means_are_those_of_the_network(name):
    parts = {"conv": nn.Conv2d(3, 8, 1), "bn": nn.BatchNorm2d(8), "fc": nn.Linear(8, 4), "wide": nn.Linear(32, 4)}
    gm, x = exact(BODIES[name], **parts, conv2=nn.Conv2d(3, 8, 1), bn2=nn.BatchNorm2d(8))
    layer = next(node for node in gm.graph.nodes if node.target in ("fc", "wide"))
    known = expectations(gm)[layer.all_input_nodes[0]]
    assert isinstance(known, Expected)
    seen: list[Tensor] = []
    gm.get_submodule(str(layer.target)).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    gm(x)
    torch.testing.assert_close(known.mean.repeat_interleave(known.place.width).float(), seen[0].mean(0), rtol=0.02, atol=0.02)


def test_places_of_channels():
    gm, _ = exact(BODIES["map"], conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), wide=nn.Linear(32, 4))
    places = [known.place for known in expectations(gm).values() if isinstance(known, Expected)]
    assert Place(1) in places and Place(1, 4) in places


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda self, x: self.fc(self.conv(x).mean((2, 3))), "no batch norm was folded into conv"),
        (lambda self, x: self.fc(F.max_pool2d(self.bn(self.conv(x)), 32).flatten(1)), "max_pool2d (max_pool) changes the means by more"),
        (lambda self, x: self.fc(F.gelu(self.bn(self.conv(x))).mean((2, 3))), "gelu (gelu) changes the means by more"),
        (lambda self, x: self.fc(F.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x))).mean((2, 3))), "relu (relu) changes the means"),
        (lambda self, x: self.fc(torch.add(self.bn(self.conv(x)), self.bn2(self.conv2(x)), alpha=2).mean((2, 3))), "(add) changes the"),
        (lambda self, x: self.fc(F.avg_pool2d(self.bn(self.conv(x)), 32, divisor_override=1).flatten(1)), "(avg_pool) changes the means"),
        (lambda self, x: self.fc(F.relu6(self.bn(self.conv(x)).mean((2, 3)))), "(relu6) changes the means"),
        (lambda self, x: self.fc((self.bn(self.conv(x)) * 2).mean((2, 3))), "(mul) changes the means"),
        (lambda self, x: self.fc(torch.cat([x, x, x], 1).mean((2, 3))[:, :8]), "nothing is known of images"),
    ],
)
def test_reasons(body, why):
    parts = {"conv": nn.Conv2d(3, 8, 1), "bn": nn.BatchNorm2d(8), "conv2": nn.Conv2d(3, 8, 1), "bn2": nn.BatchNorm2d(8)}
    gm, _ = exact(body, **parts, fc=nn.Linear(8, 4))
    known = expectations(gm)[next(node for node in gm.graph.nodes if node.target == "fc").all_input_nodes[0]]
    assert isinstance(known, str) and why in known


def test_a_norm_without_statistics_tells_nothing():
    gm, _ = exact(BODIES["relu"], conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 4))
    norm = gm.meta[NORMS]["conv"]
    gm.meta[NORMS] = {"conv": replace(norm, mean=torch.zeros(8), deviation=torch.ones(8))}
    known = expectations(gm)[next(node for node in gm.graph.nodes if node.target == "fc").all_input_nodes[0]]
    assert isinstance(known, str) and known.startswith("the batch norm that was folded into conv has no statistics")


def test_a_bound_a_channel_behind_a_flattened_map():
    net = Net(lambda self, x: self.wide(F.relu6(self.bn(self.conv(x)).flatten(1))), conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8))
    net.wide = nn.Linear(8 * 16, 4)
    nn.init.normal_(net.bn.running_mean)
    gm = Pipeline([EqualizeChannels()]).run(prepared_at(net.eval(), torch.randn(2, 3, 4, 4)))
    assert any(isinstance(part, ChannelClamp) for part in gm.modules())
    known = expectations(gm)[next(node for node in gm.graph.nodes if node.target == "wide").all_input_nodes[0]]
    assert isinstance(known, Expected) and len(known.mean) == 8 and known.place == Place(1, 16)


def test_every_tensor_is_known_or_has_a_reason():
    gm = prepared(nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.MaxPool2d(2), head(8)).eval())
    known = expectations(gm)
    assert {type(value) for value in known.values()} == {str, Expected}
    assert list(known) == [node for node in gm.graph.nodes if is_tensor(node)]
