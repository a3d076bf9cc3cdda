"""AbsorbHighBias: exact where no value is below the moved part, small everywhere else, and refused where it would be neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import NETS, Net, apply, classes, images, make, prepared, scrambled
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import trace
from fxquant.channels import ChannelClamp
from fxquant.graph import called
from fxquant.passes.absorb_high_bias import AbsorbHighBias
from fxquant.passes.equalize_channels import EqualizeChannels
from fxquant.reconstruction.norms import NORMS

DOUBLE = torch.float64
RELUS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": lambda: nn.Hardtanh(0, 9)}


def pair(act: nn.Module, second: nn.Module | None = None, high: float = 4.0, bias: bool = True) -> GraphModule:
    """Return conv -> norm -> act -> conv, whose first channels are far above zero; the norm's statistics are those of the images."""
    conv, norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
    second = second or nn.Conv2d(6, 4, 1, bias=bias)
    net = scrambled(nn.Sequential(conv, norm, act, second)).double()
    with torch.no_grad():
        y = conv(images(64, DOUBLE))
        norm.running_mean.copy_(y.mean((0, 2, 3)))
        norm.running_var.copy_(y.var((0, 2, 3)))
        norm.weight.fill_(0.5)
        norm.bias.copy_(torch.tensor([high, high, high, 0.0, 1.0, -high]))
    return prepared(trace(net, images(dtype=DOUBLE)))


def outputs(gm: GraphModule, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return gm(images(64, DOUBLE) if x is None else x)


@pytest.mark.parametrize("act", RELUS)
def test_closed_form(act, untouched):
    gm = pair(RELUS[act]())
    with untouched(gm):
        new, log = apply(gm, AbsorbHighBias())
    part = torch.tensor([2.5, 2.5, 2.5, 0, 0, 0], dtype=DOUBLE)  # 4 - 3 * 0.5
    torch.testing.assert_close(new.get_parameter("0.bias"), gm.get_parameter("0.bias") - part)
    torch.testing.assert_close(new.get_parameter("3.bias"), gm.get_parameter("3.bias") + gm.get_parameter("3.weight").sum((2, 3)) @ part)
    assert new.get_parameter("0.weight") is gm.get_parameter("0.weight")
    assert (log.count, log.notes) == (1, ["3 of 6 channels of these layers"])
    assert log.skipped == [("3", "its output is returned by the network")]
    if act != "relu":
        clamp = new.get_submodule("2")
        assert isinstance(clamp, ChannelClamp)
        torch.testing.assert_close(clamp.bound.flatten(), {"relu6": 6.0, "hardtanh": 9.0}[act] - part)


@pytest.mark.parametrize("act", RELUS)
def test_equal_wherever_no_value_is_below_the_part(act):
    gm = pair(RELUS[act]())
    new, _ = apply(gm, AbsorbHighBias())
    with torch.no_grad():
        pre = gm.get_submodule("0")(images(64, DOUBLE))
    above = (pre[:, :3] >= 2.5).all(1)
    assert 0.9 < above.double().mean() < 1
    a, b = outputs(gm).movedim(1, 3)[above], outputs(new).movedim(1, 3)[above]
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (outputs(gm) - outputs(new)).abs().mean() < 1e-2 * outputs(gm).abs().mean()


def test_a_part_beyond_the_bound_leaves_a_constant():
    gm = pair(nn.ReLU6(), high=20.0)
    new, _ = apply(gm, AbsorbHighBias())
    clamp = new.get_submodule("2")
    assert isinstance(clamp, ChannelClamp)
    assert clamp.bound.flatten()[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(outputs(gm), outputs(new), rtol=1e-9, atol=1e-9)


def test_a_second_run_changes_nothing():
    for act in RELUS.values():
        for steps in ([AbsorbHighBias()], [EqualizeChannels(), AbsorbHighBias()]):
            new, log = apply(pair(act()), *steps)
            assert log.count == 1
            assert not AbsorbHighBias()(new).modified


def test_images_instead_of_norms():
    gm = pair(nn.ReLU())
    batches = list(images(64, DOUBLE).split(16))
    by_norm, _ = apply(gm, AbsorbHighBias())
    by_images, log = apply(gm, AbsorbHighBias(batches))
    assert log.notes[0] == "moments over 64 images"
    moved, expected = (gm.get_parameter("0.bias") - new.get_parameter("0.bias") for new in (by_images, by_norm))
    with torch.no_grad():
        least = gm.get_submodule("0")(images(64, DOUBLE)).amin((0, 2, 3)).clamp_min(0)
    torch.testing.assert_close(moved, torch.minimum(expected, least), rtol=1e-3, atol=1e-3)
    assert (moved > 0).any() and (moved < expected - 0.1).any(), "the least value decides in some channels"
    assert not AbsorbHighBias(batches)(by_images).modified
    gm.meta.pop(NORMS)
    new, log = apply(gm, AbsorbHighBias())
    assert new is gm
    assert log.skipped[0] == (
        "0",
        "nothing is known of its outputs: no batch norm with statistics was folded into it, and there are no images",
    )


def test_a_norm_without_statistics_says_nothing_of_outputs():
    gm = pair(nn.ReLU())
    norm = gm.meta[NORMS]["0"]
    gm.meta[NORMS] = {"0": replace(norm, mean=torch.zeros_like(norm.mean), deviation=torch.ones_like(norm.deviation))}
    new, log = apply(gm, AbsorbHighBias())
    assert new is gm
    assert log.skipped[0][1].startswith("nothing is known of its outputs: no batch norm with statistics")


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("act", RELUS)
def test_outputs_for_the_images_stay_equal(act, equalized):
    gm = pair(RELUS[act]())
    batches = list(images(64, DOUBLE).split(16))
    new, log = apply(gm, *[EqualizeChannels()] * equalized, AbsorbHighBias(batches))
    assert log.count == 1
    torch.testing.assert_close(outputs(gm), outputs(new), rtol=1e-9, atol=1e-9)


def test_a_norm_may_remember_what_its_layer_does_not_do():
    gm = pair(nn.ReLU())
    norm = gm.meta[NORMS]["0"]
    gm.meta[NORMS] = {"0": replace(norm, shift=norm.shift + 5)}
    wrong, _ = apply(gm, AbsorbHighBias())
    right, _ = apply(gm, AbsorbHighBias(list(images(64, DOUBLE).split(16))))
    assert (outputs(gm) - outputs(wrong)).abs().max() > 1
    torch.testing.assert_close(outputs(gm), outputs(right), rtol=1e-9, atol=1e-9)


def test_more_deviations_move_less():
    gm = pair(nn.ReLU())
    parts = []
    for deviations in (1.0, 3.0, 6.0, 8.0):
        new, _ = apply(gm, AbsorbHighBias(deviations=deviations))
        parts.append((gm.get_parameter("0.bias") - new.get_parameter("0.bias"))[0].item())
    assert parts == pytest.approx([3.5, 2.5, 1.0, 0.0])


def test_after_equalizing_the_part_is_scaled_along():
    gm = pair(nn.ReLU())
    even, _ = apply(gm, EqualizeChannels())
    s = (gm.get_parameter("0.bias") / even.get_parameter("0.bias")).detach()
    first, second = (apply(graph, AbsorbHighBias())[0] for graph in (gm, even))
    torch.testing.assert_close(second.get_parameter("0.bias") * s, first.get_parameter("0.bias"))
    torch.testing.assert_close(outputs(first), outputs(second), rtol=1e-9, atol=1e-9)


def test_the_quantizer_gets_a_smaller_range():
    gm = pair(nn.ReLU())
    new, _ = apply(gm, AbsorbHighBias())
    with torch.no_grad():
        old, made = (graph.get_submodule("0")(images(64, DOUBLE)).relu().amax() for graph in (gm, new))
    assert made < 0.7 * old


def test_a_bias_is_made_and_groups_and_several_readers_work():
    convs = {"b": nn.Conv2d(6, 4, 1, groups=2, bias=False), "c": nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="replicate")}
    fork = Net(lambda s, x: s.b(x) + s.c(x)[:, :4], **convs)
    gm = pair(nn.ReLU(), fork)
    new, log = apply(gm, AbsorbHighBias(deviations=4.5))
    assert log.count == 1
    torch.testing.assert_close(outputs(gm), outputs(new), rtol=1e-4, atol=1e-4)
    assert new.get_parameter("3.b.bias").shape == (4,)


def test_linear_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    net = scrambled(net).double()
    with torch.no_grad():
        y = net[1](images(64, DOUBLE).flatten(1))
        net[2].running_mean.copy_(y.mean(0))
        net[2].running_var.copy_(y.var(0))
        net[2].bias.fill_(8)
    gm = prepared(trace(net, images(dtype=DOUBLE)))
    new, log = apply(gm, AbsorbHighBias(deviations=6))
    assert log.count == 1
    torch.testing.assert_close(outputs(gm), outputs(new), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("act", "second", "reason"),
    [
        (nn.LeakyReLU(), None, "leaky_relu between it and the next layer; only a ReLU may be"),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), None, "max_pool between it and the next layer; only a ReLU may be"),
        (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1)), None, "pad between it and the next layer; only a ReLU may be"),
        (nn.Identity(), None, "has no ReLU behind it"),
        (nn.GELU(), None, "goes to _2 (gelu), which is not homogeneous"),
        (nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), "3 pads with zeros, where the moved part would be missing"),
        (nn.ReLU(), nn.Conv2d(6, 4, 3, padding="same"), "3 pads with zeros, where the moved part would be missing"),
        (nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), "3 reads its inputs a different number of times at each position"),
    ],
)
def test_refusals(act, second, reason):
    gm = pair(act, second)
    new, log = apply(gm, AbsorbHighBias())
    assert new is gm
    assert log.skipped[0] == ("0", reason)


@pytest.mark.parametrize("second", [nn.Conv2d(6, 4, 3, padding="valid"), nn.Conv2d(6, 4, 1, padding="same"), nn.Conv2d(6, 4, 3, padding=0)])
def test_padding_that_adds_nothing_is_no_reason(second):
    assert apply(pair(nn.ReLU(), second), AbsorbHighBias())[1].count == 1


@pytest.mark.parametrize("name", NETS)
def test_every_net(name, untouched):
    gm = prepared(trace(make(name).double(), images(dtype=DOUBLE)))
    gm, _ = apply(gm, EqualizeChannels())
    for step in (AbsorbHighBias(), AbsorbHighBias([images(4, DOUBLE), images(3, DOUBLE)])):
        with untouched(gm):
            new, log = apply(gm, step)
        layers = [node for node, module in called(gm) if type(module).__name__.startswith(("Conv", "Linear"))]
        assert len(log.skipped) + log.count <= len(layers)
        leaves, _ = torch.utils._pytree.tree_flatten(new(images(3, DOUBLE)))
        assert all(bool(leaf.isfinite().all()) for leaf in leaves)
        assert all(value.dtype == DOUBLE for value in new.parameters())
        assert (new is gm) == (not log.count)
        if step.batches is None:
            assert not AbsorbHighBias()(new).modified


def test_mobile_blocks():
    """The depthwise convolutions pad, so only the pairs depthwise -> 1x1 are left."""
    gm = prepared("mobile")
    step = AbsorbHighBias(deviations=0.0)
    new, log = apply(gm, step)
    skipped = dict(log.skipped)
    assert skipped["b.0"] == "b.3 pads with zeros, where the moved part would be missing"
    assert "b.3" not in skipped and log.count
    assert classes(new)["ChannelClamp"] == log.count


def test_dead_channels_move_as_a_whole():
    gm = pair(nn.ReLU())
    norm = gm.meta[NORMS]["0"]
    norm.factor[3] = 0
    norm.shift[3] = 0.75
    with torch.no_grad():
        gm.get_parameter("0.weight")[3] = 0
        gm.get_parameter("0.bias")[3] = 0.75
    new, _ = apply(gm, AbsorbHighBias(deviations=6))
    assert new.get_parameter("0.bias")[3] == 0
    torch.testing.assert_close(outputs(gm), outputs(new), rtol=1e-9, atol=1e-9)
