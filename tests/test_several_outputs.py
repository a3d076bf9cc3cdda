"""Segmentation networks and the backbones of detectors: CAT is skipped and says so, the outputs keep their structure, files work."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation

import fxquant
from fxquant import inspection
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


@dataclasses.dataclass
class Found:
    scores: Tensor
    classes: Tensor


class Head(nn.Module):
    """Scores with what is worked out from them, in the form that `form` gives."""

    def __init__(self, form: Callable[[Tensor], object]):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.form = form

    def forward(self, x: Tensor) -> object:
        return self.form(self.head(self.body(x)))


FORMS: dict[str, Callable[[Tensor], object]] = {
    "classes": lambda y: (y, y.argmax(1)),
    "mask": lambda y: {"scores": y, "above": y > 0},
    "dataclass": lambda y: Found(y, y.argmax(1)),
    "size": lambda y: (y, y.argmax(1), y.shape[0]),
    "in front": lambda y: (y, y.argmax(1), y.t()),  # no row for each image
}
RECIPES = [
    fxquant.Recipe.FAST,
    fxquant.Recipe.STANDARD.replace(finish_iterations=3, finish_checks=1),
    fxquant.Recipe.QDROP.replace(unit_iterations=3),
    fxquant.Recipe.PDQUANT.replace(unit_iterations=3, unit_correction_iterations=2),
    fxquant.Recipe.OUTPUT_KL.replace(output_kl_iterations=3),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_outputs_that_are_no_floats_and_dataclasses(form, recipe, tmp_path):
    """Classes and masks have no error that could be learned from; a dataclass is made anew in every call."""
    torch.manual_seed(0)
    net, images = Head(FORMS[form]).eval(), torch.randn(16, 3, 16, 16)
    quantized = fxquant.quantize(net, [images], 8, 8, cat=False, recipe=recipe, progress=False)
    with torch.no_grad():
        wanted, got = net(images), quantized(images)
    assert type(got) is type(wanted)
    for mine, theirs in zip(tensors_of(got), tensors_of(wanted), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    assert F.cosine_similarity(tensors_of(got)[0], tensors_of(wanted)[0]).mean() > 0.99
    assert (tensors_of(got)[1] == tensors_of(wanted)[1]).double().mean() > 0.9
    fxquant.save(quantized, tmp_path / "network.safetensors")
    loaded = fxquant.load(tmp_path / "network.safetensors", net)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(loaded(images)), tensors_of(got), strict=True))


@pytest.mark.parametrize("form", [lambda y: y.argmax(1), lambda y: y > 0], ids=["classes", "mask"])
def test_nothing_to_learn_from(form):
    net, images = Head(form).eval(), torch.randn(8, 3, 16, 16)
    with pytest.raises(fxquant.ConfigError, match=r"'standard': learns, and the network returns no floats to learn from\. Use recipe="):
        fxquant.quantize(net, [images], 8, 8, progress=False)
    with pytest.warns(fxquant.FxquantWarning, match="CAT skipped: the network returns"):
        quantized = fxquant.quantize(net, [images], 8, 8, recipe="fast", progress=False)
    assert (quantized(images) == net(images)).double().mean() > 0.9


def test_a_dataclass_that_no_call_makes():
    net = Head(lambda y: Late(y)).eval()
    with pytest.raises(fxquant.TraceError, match="Late has fields that it does not take when it is made"):
        fxquant.quantize(net, [torch.randn(4, 3, 16, 16)], 8, 8, recipe="fast", progress=False)


@dataclasses.dataclass
class Late:
    scores: Tensor
    best: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.best = self.scores.amax(1)


class Named(OrderedDict[str, Tensor]):
    """A dict whose entries are attributes, too, as that of Hugging Face's networks."""

    @property
    def scores(self) -> Tensor:
        return self["scores"]


def test_a_dict_of_a_class_of_its_own_becomes_a_plain_one():
    net, images = Head(lambda y: Named(scores=y)).eval(), torch.randn(4, 3, 16, 16)
    with pytest.warns(fxquant.FxquantWarning, match=r"returns a Named, its graph a dict: read output\['name'\], not output\.name"):
        quantized = fxquant.quantize(net, [images], 8, 8, cat=False, recipe="fast", progress=False)
    assert F.cosine_similarity(quantized(images)["scores"], net(images).scores).mean() > 0.99


def test_a_graph_whose_dataclass_differs_is_refused(monkeypatch):
    net, images = Head(FORMS["dataclass"]).eval(), torch.randn(4, 3, 16, 16)
    graph = fxquant.trace(net, images)
    graph.get_submodule("head.2").bias.data += 1
    monkeypatch.setattr(inspection, "trace", lambda *given: graph)
    with pytest.raises(fxquant.TraceError, match="its graph gives other outputs"):
        fxquant.quantize(net, [images], 8, 8, recipe="fast", progress=False)


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
