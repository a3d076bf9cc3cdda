"""ReparameterizeNorms: the function stays, one grid serves all channels, and what cannot take the scales is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import Net, apply, assert_equal, images, prepared, scrambled
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import Recipe, trace
from fxquant.execution import sweep
from fxquant.passes import PREPARE, ReparameterizeNorms
from fxquant.passes.reparameterize_norms import _is_over_the_last_axis
from fxquant.pipeline import PassLog, Pipeline
from fxquant.placement import place

BATCHES = [images(4, torch.float64), images(3, torch.float64)]


def uneven(size: int = 8) -> nn.LayerNorm:
    """A norm whose channels are far from alike."""
    norm = nn.LayerNorm(size)
    nn.init.normal_(norm.weight, std=2)
    nn.init.normal_(norm.bias, std=3)
    return norm


def transformer(between=lambda x: x, bias: bool = True, norm: nn.Module | None = None, body=None) -> nn.Module:
    def plain(s, x: Tensor) -> Tensor:
        x = s.patch(x).flatten(2).transpose(1, 2)
        y = s.proj(F.gelu(s.fc1(between(s.norm(x)))))
        return s.fc(y.reshape(x.shape[0], -1, 8).mean(1))

    torch.manual_seed(0)
    layers = {"fc1": nn.Linear(8, 12, bias=bias), "proj": nn.Linear(12, 8), "fc": nn.Linear(8, 5)}
    return Net(body or plain, patch=nn.Conv2d(3, 8, 4, 4), norm=uneven() if norm is None else norm, **layers)


def reparameterized(net: nn.Module, bits: int = 4, recipe: Recipe = Recipe.FAST) -> tuple[GraphModule, GraphModule, PassLog]:
    gm = Pipeline([step() for step in PREPARE]).run(trace(scrambled(net).double(), BATCHES[0]))
    new, log = apply(gm, ReparameterizeNorms(place(gm, bits, bits), BATCHES, recipe))
    return gm, new, log


def behind_norm(gm: GraphModule) -> Tensor:
    return next(torch.cat(values) for node, values in sweep(gm, BATCHES) if node.target == "norm").detach()


VIEWS = {
    "directly": lambda x: x,
    "rolled": lambda x: torch.roll(x, 3, 1),
    "in windows": lambda x: x.view(x.shape[0], 4, 4, 8).permute(0, 2, 1, 3).reshape(-1, 4, 8),
    "a part": lambda x: x[:, 2:10].contiguous(),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("view", VIEWS)
def test_the_function_stays(view, bits, bias):
    gm, new, log = reparameterized(transformer(VIEWS[view], bias), bits)
    assert (log.count, log.skipped) == (1, [])
    assert str(new.graph) == str(gm.graph)
    assert new.get_submodule("norm") is not gm.get_submodule("norm")
    for count in (1, 5):
        assert_equal(gm, new, images(count, torch.float64), steps=(1e-9, 1e-9))
    again, log = apply(new, ReparameterizeNorms(place(new, bits, bits), BATCHES, Recipe.FAST))
    assert again is new
    assert log.count == 0


def test_a_norm_that_is_a_function(untouched):
    net = transformer(body=functional, norm=Functional(8))
    gm, new, log = reparameterized(net)
    assert (log.count, log.skipped) == (1, [])
    assert str(new.graph) == str(gm.graph)
    assert not torch.equal(new.get_parameter("norm.weight"), gm.get_parameter("norm.weight"))
    assert torch.equal(gm.get_parameter("norm.weight"), net.norm.weight)
    assert_equal(gm, new, images(3, torch.float64), steps=(1e-9, 1e-9))
    with untouched(gm):
        apply(gm, ReparameterizeNorms(place(gm, 4, 4), BATCHES, Recipe.FAST))


@pytest.mark.parametrize("method", ["minmax", "lp", "percentile"])
def test_channels_get_one_range(method):
    gm, new, _ = reparameterized(transformer(), 4, Recipe(activation_range=method))
    widths = [x.flatten(0, 1).amax(0) - x.flatten(0, 1).amin(0) for x in map(behind_norm, (gm, new))]
    before, behind = (float(width.max() / width.min()) for width in widths)
    assert behind < 0.5 * before
    if method == "minmax":
        assert behind == pytest.approx(1)


def test_less_noise_at_equal_bits():
    """The quantized norm output, taken back to where it was, is nearer to the float one."""
    net = transformer()
    errors = {}
    for stages in (("ranges",), ("reparameterize", "ranges")):
        recipe = Recipe(stages=stages)
        qmodel = fxquant.quantize(net.eval().float(), [x.float() for x in BATCHES], None, 3, recipe=recipe, edges="same", progress=False)
        fc1 = torch.cat([torch.cat(v) for node, v in sweep(qmodel, [x.float() for x in BATCHES]) if node.target == "fc1"])
        wanted = torch.cat([torch.cat(v) for node, v in sweep(prepared(net), [x.float() for x in BATCHES]) if node.target == "fc1"])
        errors[stages] = float((fc1 - wanted).norm() / wanted.norm())
    assert errors["reparameterize", "ranges"] < 0.6 * errors[("ranges",)]


def residual(s, x: Tensor) -> Tensor:
    x = s.norm(s.patch(x).flatten(2).transpose(1, 2))
    return s.fc((x + s.proj(F.gelu(s.fc1(x)))).mean(1))


def activated(s, x: Tensor) -> Tensor:
    x = s.patch(x).flatten(2).transpose(1, 2)
    return s.fc((x + s.proj(s.fc1(F.relu(s.norm(x))))).mean(1))


def functional(s, x: Tensor) -> Tensor:
    x = s.norm(s.patch(x).flatten(2).transpose(1, 2))
    return s.fc(s.proj(F.gelu(s.fc1(x))).mean(1))


class ChannelsFirst(nn.LayerNorm):
    """A norm over the channels of images that turns them itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Functional(nn.Module):
    """F.layer_norm over parameters of its own, as timm's norms are traced."""

    def __init__(self, size: int):
        super().__init__()
        norm = uneven(size)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (len(self.weight),), self.weight, bias=self.bias)


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def over_pixels(s, x: Tensor) -> Tensor:
    return s.fc(s.proj(F.gelu(s.fc1(s.norm(s.patch(x)).flatten(2).transpose(1, 2)))).mean(1))


REFUSALS = {
    "a sum reads it, too": (transformer(body=residual), "is read by 'add', too, which could not take the scales back"),
    "padded": (transformer(lambda x: F.pad(x, (0, 0, 0, 4))), "is read by 'pad'"),
    "no weight": (transformer(norm=nn.LayerNorm(8, elementwise_affine=False)), "has no weight and bias of its own to take the scales"),
    "no bias": (transformer(norm=nn.LayerNorm(8, bias=False)), "has no weight and bias of its own to take the scales"),
    "two axes": (transformer(norm=nn.LayerNorm((16, 8))), "does not normalize the last axis"),
    "channels turned around it": (transformer(body=over_pixels, norm=LayerNorm2d(8)), "is read by 'permute_1'"),
    "a function with weights of others": (transformer(body=functional, norm=Twice(8)), "shares its weight or bias"),
    "channels turned": (transformer(lambda x: x[:, :8].transpose(1, 2).contiguous()), "is read by 'transpose_1'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    net, reason = REFUSALS[name]
    gm, new, log = reparameterized(net)
    assert new is gm
    assert {where for where, _ in log.skipped} <= {"norm", "layer_norm", "layer_norm_1"}
    assert reason in log.skipped[-1][1]


@pytest.mark.parametrize(("norm", "fits"), [(uneven(), True), (ChannelsFirst(8), False), (nn.LayerNorm(3, eps=0.1), True)])
def test_norms_are_tried(norm, fits):
    assert _is_over_the_last_axis(norm) is fits


def test_what_is_not_quantized_is_left_alone():
    gm, new, log = reparameterized(transformer(body=activated))
    assert (new is gm, log.skipped) == (True, [])


def test_through_quantize_and_a_file(tmp_path, untouched):
    net = transformer(bias=False).eval()
    batches = [x.float() for x in BATCHES]
    with untouched(net):
        recipe = Recipe(stages=("reparameterize", "ranges", "bias"))
        qmodel = fxquant.quantize(net, batches, 4, 4, recipe=recipe, progress=False)
    assert "reparameterize_norms" in str(fxquant.report(qmodel))
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    again = fxquant.load(tmp_path / "q.safetensors", transformer(bias=False))
    assert torch.equal(again(batches[0]), qmodel(batches[0]))


def test_without_the_stage_nothing_changes():
    batches = [x.float() for x in BATCHES]
    qmodel = fxquant.quantize(transformer().eval(), batches, 4, 4, recipe="fast", progress=False)
    assert torch.equal(qmodel.get_submodule("norm").weight, transformer().norm.weight)
