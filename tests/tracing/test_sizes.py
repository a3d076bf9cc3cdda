"""Images of another size: computed where the graph holds for them, refused by name where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

import fxquant
from fxquant import ModelError, trace
from fxquant.graph import fork
from fxquant.passes import PREPARE
from fxquant.pipeline import Pipeline

SMALL, LARGE, WIDE = torch.randn(3, 3, 16, 16), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 24)
WORDS = r"^images: are of shape \[3, 32, 32\], and the graph holds for \[3, 16, 16\] alone: .*\. Resize them, or quantize the network built"


class Net(nn.Module):
    def __init__(self, body: Any):
        super().__init__()
        self.conv, self.fc, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 10), body
        self.register_buffer("embedding", torch.randn(4, 16, 16))

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(self, self.conv(images))
        return self.fc(x.mean((2, 3))) if x.shape[1] == 4 else x


def pyramid(self: Any, x: Tensor) -> Tensor:
    return x + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)


FREE = {
    "convolutions": lambda self, x: x.relu(),
    "pooled": lambda self, x: F.adaptive_avg_pool2d(x, 4),
    "by a factor": pyramid,
    "flattened": lambda self, x: x.flatten(2).softmax(-1).unsqueeze(-1),
    "rest of a view": lambda self, x: x.view(x.shape[0], 4, -1, 1),
}
FIXED = {
    "embedding": lambda self, x: x + self.embedding,
    "to the size of the input": lambda self, x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:]),
    "a view by numbers": lambda self, x: x.view(x.shape[0], 4, x.shape[2] * x.shape[3], 1),
    "number of pixels": lambda self, x: x * (x.shape[2] * x.shape[3]) ** -0.5,
    "constant of that size": lambda self, x: x + torch.linspace(0, 1, x.shape[3]),
    "python": lambda self, x: x.relu() if x.shape[2] > 16 else x,
    "a constant of a number": lambda self, x: x * torch.tensor(1.0 / x.shape[2]),
    "filled with a number": lambda self, x: x + torch.full((4, 1, 1), float(x.shape[3])),
    "same padding": lambda self, x: F.max_pool2d(F.pad(x, (0, -(x.shape[3] + 1) % 2, 0, -(x.shape[2] + 1) % 2)), 3, 2),
    "padded to a multiple": lambda self, x: F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)),
    "aspect": lambda self, x: x * (x.shape[2] / x.shape[3]),
    "squares": lambda self, x: x.relu() if x.shape[2] == x.shape[3] else x,
    "a window": lambda self, x: F.avg_pool2d(x, x.shape[-1]),
    "a map as the result": lambda self, x: F.interpolate(F.conv2d(x, torch.ones(5, 4, 1, 1), stride=2), size=x.shape[-2:]),
}


@pytest.mark.parametrize("body", FREE.values(), ids=FREE)
def test_any_size(body: Any) -> None:
    net = Net(body).eval()
    gm = trace(net, SMALL)
    assert "check_image_size" not in gm.code
    for images in (SMALL, LARGE, WIDE):
        torch.testing.assert_close(gm(images), net(images), rtol=0, atol=0)


@pytest.mark.parametrize("body", FIXED.values(), ids=FIXED)
def test_one_size(body: Any) -> None:
    net = Net(body).eval()
    gm = trace(net, SMALL)
    torch.testing.assert_close(gm(SMALL[:2]), net(SMALL[:2]), rtol=0, atol=0)
    with pytest.raises(ModelError, match=WORDS):
        gm(LARGE)
    with pytest.raises(ModelError, match=r"shape \[3, 16, 24\]"):
        gm(WIDE)


def transformer(size: int = 16) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=10).eval()


@pytest.mark.parametrize("copied", [copy.deepcopy, fork, Pipeline([step() for step in PREPARE]).run, lambda gm: gm.double().float()])
def test_copies_refuse_as_well(copied: Any) -> None:
    gm = copied(trace(transformer(), SMALL))
    assert gm(SMALL).shape == (3, 10)
    with pytest.raises(ModelError, match=WORDS):
        gm(LARGE)


def test_a_quantized_transformer_at_a_second_size(tmp_path: Any) -> None:
    net = transformer()
    qmodel = fxquant.quantize(net, [torch.randn(16, 3, 16, 16)], 8, 8, recipe="fast", progress=False)
    fxquant.save(qmodel, tmp_path / "vit.safetensors")
    loaded = fxquant.load(tmp_path / "vit.safetensors", transformer())
    for network in (qmodel, loaded, fxquant.lower(qmodel)):
        assert network(SMALL).shape == (3, 10)
        with pytest.raises(ModelError, match=WORDS):
            network(LARGE)


def test_calibration_images_of_a_second_size() -> None:
    with pytest.raises(fxquant.CalibrationError):
        fxquant.quantize(transformer(), [SMALL, LARGE], 8, 8, recipe="fast", progress=False)
    with pytest.raises(fxquant.CalibrationError, match=r"32, 32"):
        fxquant.quantize(transformer(), [LARGE], 8, 8, recipe="fast", progress=False)


def test_torch_takes_the_check() -> None:
    gm = trace(transformer(), SMALL)
    assert len(torch.fx.symbolic_trace(gm).graph.nodes) > 10
    assert torch.export.export(gm, (SMALL,)).module()(SMALL).shape == (3, 10)
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    assert compiled(SMALL).shape == (3, 10)
    with pytest.raises(Exception, match=r"holds for .3, 16, 16. alone"):
        compiled(LARGE)


def test_resnet_has_no_size() -> None:
    assert "check_image_size" not in trace(resnet18().eval(), torch.randn(1, 3, 64, 64)).code
