"""Segmentation networks and the backbones of detectors: CAT is skipped and says so, the outputs keep their structure, files work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation

import fxquant
from fxquant.coverage import count_work, share_quantized, summary
from fxquant.tree import tensors_of


class Dense(nn.Module):
    """A backbone of two levels and a head for each, with a dict of maps inside of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.side, self.top = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, object]:
        fine = self.stem(x)
        coarse = self.body(fine)
        top = self.top(coarse)
        levels = OrderedDict(fine=self.side(fine) + F.interpolate(top, scale_factor=2.0), coarse=top)
        return OrderedDict(out=F.interpolate(levels["fine"], size=x.shape[-2:], mode="bilinear", align_corners=False), levels=levels)


def structure(output: object) -> object:
    """Return `output` with its tensors replaced by their shapes."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    assert isinstance(output, dict)
    return [(key, structure(value)) for key, value in output.items()]


def check(net: nn.Module, size: int, path) -> None:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    images = torch.randn(8, 3, size, size)
    with pytest.warns(fxquant.FxquantWarning, match=r"CAT skipped: the network returns a dict, not one tensor of logits \[N, C\]"):
        quantized = fxquant.quantize(net, [images], 8, 8, cat=True, recipe="fast", edges="integer", progress=False)
    assert "cat     none: the network returns a dict, not one tensor of logits" in str(fxquant.report(quantized))
    assert share_quantized(summary(count_work(quantized, images[:1]))) >= 0.99
    with torch.no_grad():
        wanted, got = net(images[:3]), quantized(images[:3])
        assert structure(got) == structure(wanted)
        for mine, theirs in zip(tensors_of(got), tensors_of(wanted), strict=True):
            assert F.cosine_similarity(mine.flatten(1), theirs.flatten(1)).mean() > 0.99
        fxquant.save(quantized, path)
        loaded = fxquant.load(path, net)
        assert structure(loaded(images[:3])) == structure(wanted)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(loaded(images[:3])), tensors_of(got), strict=True))


def test_a_small_one(tmp_path):
    check(Dense().eval(), 16, tmp_path / "network.safetensors")


def test_the_paper_s_cat_needs_logits():
    with pytest.raises(fxquant.CATError, match="returns a dict, not one tensor of logits"):
        fxquant.quantize(Dense().eval(), [torch.randn(8, 3, 16, 16)], cat="paper", recipe="fast", progress=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "deeplabv3_mobilenet_v3_large": (lambda: segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None), 64),
    "fcn_resnet50": (lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None), 64),
    "lraspp_mobilenet_v3_large": (lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), 64),
    "retinanet_resnet50_fpn": (lambda: detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_of_torchvision(name, tmp_path):
    build, size = NETWORKS[name]
    assert name in torchvision.models.list_models()
    torch.manual_seed(0)
    check(build().eval(), size, tmp_path / "network.safetensors")
