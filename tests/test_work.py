"""Multiply-adds are counted right, and each is said to be on quantized operands only where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import NETS, Net, make
from nets import images as some_images
from torch import Tensor, nn

import fxquant
from fxquant.coverage import Work, count_multiply_adds, count_work, describe_work, share_quantized, summary

RANGES = fxquant.Recipe(stages=("ranges",), weight_range="minmax", activation_range="minmax")


def work_of(net: nn.Module, edges: str = "integer", **settings) -> dict[str, Work]:
    images = some_images(4)
    model = fxquant.trace(net, images, leaf_modules=settings.pop("leaf_modules", ()))
    quantized = fxquant.quantize(model, [images], 8, 8, False, recipe=RANGES, edges=edges, progress=False, **settings)
    work = count_work(quantized, images[:1])
    assert sum(row.multiply_adds for row in work) == count_multiply_adds(net, images[:1])
    assert fxquant.report(quantized).record.work == summary(work)
    return {row.name: row for row in work}


def test_a_chain_counted_by_hand():
    work = work_of(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.Flatten(), nn.Linear(512, 5)).eval())
    assert {name: row.multiply_adds for name, row in work.items()} == {"0": 8 * 8 * 8 * 27, "2": 8 * 8 * 8 * 2, "4": 512 * 5}
    assert not any(row.float_because for row in work.values())
    assert share_quantized(summary(list(work.values()))) == 1.0


def test_images_that_stay_float():
    work = work_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval(), edges="8bit")
    assert [row.float_because for row in work.values()] == ["reads the images in float", ""]
    assert share_quantized(summary(list(work.values()))) == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("overrides", "reason"), [({"1": {"w": None}}, "its weight is float"), ({"1": {"a": None}}, "reads _0 in float")], ids=["w", "a"]
)
def test_overrides(overrides, reason):
    work = work_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval(), overrides=overrides)
    assert [row.float_because for row in work.values()] == ["", reason, ""]


FLOATS = {
    "computed weight": (lambda s, x: F.conv2d(s.conv(x), s.w * x.mean()), 4 * 4 * 256, "its weight is computed"),
    "constant operand": (lambda s, x: s.conv(x) @ s.m, 4 * 16 * 16 * 16, "reads a constant in float"),
    "unknown function": (lambda s, x: torch.baddbmm(s.conv(x)[:, 0], x[:, 0], x[:, 1]), 16**3, "other operation"),
    "recurrent": (lambda s, x: s.lstm(s.conv(x).flatten(2))[0], 4 * 4 * 8 * (256 + 8), "opaque"),
}


@pytest.mark.parametrize(("body", "count", "reason"), FLOATS.values(), ids=FLOATS)
def test_what_is_left_on_floats(body, count, reason):
    lstm = nn.LSTM(256, 8, batch_first=True)
    net = Net(body, conv=nn.Conv2d(3, 4, 1), w=nn.Parameter(torch.randn(4, 4, 1, 1)), m=nn.Parameter(torch.randn(16, 16)), lstm=lstm).eval()
    left = [row for row in work_of(net).values() if row.float_because]
    assert [(row.multiply_adds, row.float_because) for row in left] == [(count, reason)]


def test_work_that_cannot_be_counted_is_named():
    """Torch's counter knows no deformable convolution; a table that is looked up multiplies nothing."""
    members = {
        "conv": nn.Conv2d(3, 8, 3, padding=1),
        "offsets": nn.Conv2d(8, 18, 3, padding=1),
        "deformed": torchvision.ops.DeformConv2d(8, 4, 3, padding=1),
        "pairs": nn.Bilinear(4, 4, 5),
        "weight": nn.Parameter(torch.randn(5, 4, 4)),
        "table": nn.Embedding(2, 5),
    }

    def body(s: Any, x: Tensor) -> Tensor:
        x = s.conv(x).relu()
        means = s.deformed(x, s.offsets(x)).mean((2, 3))
        return s.pairs(means, means) + F.bilinear(means, means, s.weight) + s.table(torch.zeros(5, dtype=torch.long)).mean(0)

    net, images = Net(body, **members).eval(), some_images(4)
    quantized = fxquant.quantize(net, [images], 8, 8, False, recipe=RANGES, edges="integer", progress=False)
    left = [row for row in count_work(quantized, images[:1]) if row.float_because]
    assert [(row.name, row.multiply_adds) for row in left] == [("deform_conv2d", 0), ("pairs", 0), ("bilinear", 0)]
    text = describe_work(fxquant.report(quantized).record.work)
    unknown = "(has a weight, and multiply-adds that are not known)"
    assert text.endswith(f"100.00 % on quantized operands; float: deform_conv2d {unknown}, pairs {unknown}, bilinear {unknown}")


@pytest.mark.parametrize("listed", [False, True])
def test_all_operands_of_an_einsum_are_quantized(listed):
    layers = {name: nn.Linear(3, 3) for name in "qkv"}

    def body(s: Any, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        operands = s.q(x), s.k(x), s.v(x)
        equation = "bnc,bmc,bmd->bnd"
        y = torch.einsum(equation, list(operands)) if listed else torch.einsum(equation, *operands)
        return torch.einsum("bnc,bmc->bnm", y, y)

    work = work_of(Net(body, **layers).eval())
    assert not any(row.float_because for row in work.values())


class Inside(nn.Module):
    """Two layers that nobody sees from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_what_an_opaque_module_does_counts():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Inside(), nn.Conv2d(4, 4, 1)).eval()
    assert not any(row.float_because for row in work_of(net).values())
    work = work_of(net, leaf_modules=(Inside,))
    assert (work["1"].multiply_adds, work["1"].float_because) == (256 * 4 * (36 + 4), "opaque")
    assert share_quantized(summary(list(work.values()))) == pytest.approx((3 + 4) / (3 + 4 + 40))


def test_attention_counts():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = Net(lambda s, x: s.layer(s.conv(x).flatten(2).transpose(1, 2)), conv=nn.Conv2d(3, 16, 4, 4), layer=layer).eval()
    work = work_of(net)
    assert sum(row.multiply_adds for row in work.values()) == 16 * 16 * 48 + 16 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 16 * 16 * 16
    assert not any(row.float_because for row in work.values())


@pytest.mark.parametrize("name", NETS)
def test_the_zoo_agrees_with_eager_mode(name):
    net = make(name)
    gm = fxquant.trace(net, some_images())
    assert sum(row.multiply_adds for row in count_work(gm, some_images(1))) == count_multiply_adds(net, some_images(1))


def test_the_report_says_it(net, images):
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    line = describe_work(fxquant.report(quantized).record.work)
    assert " ".join(line.split()) in " ".join(str(fxquant.report(quantized)).split())
    assert "% on quantized operands; float: conv1 " in line and "(reads the images in float)" in line


def test_nothing_to_count():
    assert share_quantized(summary([])) == 1.0
    assert describe_work(summary([])) == "0.00 million multiply-adds an image, 100.00 % on quantized operands"
