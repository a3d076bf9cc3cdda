"""EqualizeChannels: what equalized means, where factors pass and where not, and that the output never changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import NETS, Net, apply, classes, images, make, ops, prepared, scrambled
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import quantize, trace
from fxquant.channels import ChannelClamp, Link, Shared, blocks, follow
from fxquant.errors import ConfigError
from fxquant.graph import called
from fxquant.kinds import WEIGHTED, kind
from fxquant.passes import PREPARE
from fxquant.passes.equalize_channels import EqualizeChannels
from fxquant.pipeline import Pipeline
from fxquant.placement import place
from fxquant.reconstruction.norms import NORMS

DOUBLE = torch.float64


def prepared_double(net: nn.Module | str) -> GraphModule:
    net = make(net) if isinstance(net, str) else scrambled(net)
    return prepared(trace(net.double(), images(dtype=DOUBLE)))


def same(a: GraphModule, b: GraphModule, tolerance: float = 1e-9) -> None:
    for count in (1, 3):
        x = images(count, next(a.parameters()).dtype)
        with torch.no_grad():
            torch.testing.assert_close(a(x.clone()), b(x.clone()), rtol=tolerance, atol=tolerance)


def ranges(gm: GraphModule, path: str) -> tuple[Tensor, Tensor]:
    """Return the largest absolute weight of each output and of each input of a layer."""
    layer = gm.get_submodule(path)
    sizes = blocks(layer, layer.weight.detach().abs())
    return sizes.amax((2, 3)).flatten(), sizes.amax((1, 3)).flatten()


def links(gm: GraphModule) -> list[tuple[str, list[str]]]:
    shared = Shared(gm)
    found = [follow(node, shared) for node, _ in called(gm) if kind(node) in WEIGHTED]
    return [(str(link.layer.target), [str(node.target) for node, _ in link.consumers]) for link in found if isinstance(link, Link)]


def assert_equalized(gm: GraphModule, tolerance: float = 1e-3) -> None:
    for layer, consumers in links(gm):
        mine = ranges(gm, layer)[0]
        theirs = torch.stack([ranges(gm, other)[1].view(len(mine), -1).amax(1) for other in consumers]).amax(0)
        torch.testing.assert_close(mine, theirs, rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("relu6", ["channels", "refuse"])
@pytest.mark.parametrize("name", NETS)
def test_equal_output_and_nothing_left_to_do(name, relu6, dtype, untouched):
    gm = prepared(trace(make(name).to(dtype), images(dtype=dtype)))
    with untouched(gm):
        new, log = apply(gm, EqualizeChannels(relu6))
    same(gm, new, 1e-9 if dtype == DOUBLE else 1e-4)
    again, second = apply(new, EqualizeChannels(relu6))
    assert (again is new, second.count) == (True, 0), second
    assert second.skipped == log.skipped
    assert log.count or new is gm
    if relu6 == "channels":
        assert_equalized(new)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("chain", [("0", ["4"]), ("4", ["7.3"])]),
        ("residual", [("layers.0.conv1", ["layers.0.conv2"]), ("layers.1.conv1", ["layers.1.conv2"])]),
        ("mobile", [("stem.0", ["b.0"]), ("b.0", ["b.3"]), ("b.3", ["b.6"]), ("c.0", ["c.3"]), ("c.3", ["c.6"])]),
        ("squeeze_excite", [("reduce", ["expand"])]),
        ("dense", []),
        ("shuffle", [("branch.0", ["branch.2"])]),
        ("transposed", [("0", ["3"]), ("3", ["6"]), ("6", ["9.3"])]),
        ("one_dimension", [("stem", ["layers.0"]), ("layers.0", ["layers.3"]), ("layers.3", ["fc"])]),
        ("linear_norm", [("0", ["3"]), ("3", ["6"])]),
        ("pooled", [("0", ["3"]), ("3", ["6.3"])]),
        ("Functional", [("", ["head"])]),
        ("shared", [("stem", ["conv"]), ("conv", ["conv_1"]), ("conv_1", ["fc.3"])]),
        ("attention", []),
        ("several_outputs", []),
    ],
)
def test_pairs(name, pairs):
    gm = prepared_double(name)
    if name != "Functional":
        assert links(gm) == pairs
    _, log = apply(gm, EqualizeChannels())
    assert log.count == sum(len(others) for _, others in pairs)


def test_closed_form_of_one_pair():
    gm = prepared_double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)))
    new, log = apply(gm, EqualizeChannels())
    a, b = ranges(gm, "0")[0], ranges(gm, "2")[1]
    s = (a / b).sqrt()
    torch.testing.assert_close(new.get_parameter("0.weight"), gm.get_parameter("0.weight") / s.view(-1, 1, 1, 1))
    torch.testing.assert_close(new.get_parameter("0.bias"), gm.get_parameter("0.bias") / s)
    torch.testing.assert_close(new.get_parameter("2.weight"), gm.get_parameter("2.weight") * s.view(1, -1, 1, 1))
    assert new.get_parameter("2.bias") is gm.get_parameter("2.bias")
    torch.testing.assert_close(ranges(new, "0")[0], (a * b).sqrt())
    torch.testing.assert_close(ranges(new, "2")[1], (a * b).sqrt())
    assert log.count == 1 and log.skipped == [("2", "its output is returned by the network")]
    assert log.notes[0] == "2 sweeps"
    worst = torch.maximum(a / b, b / a)
    mean = worst.log().mean().exp().item()
    told = f"the ranges of a channel in two layers differed {mean:.3g}-fold (at most {worst.max().item():.3g}), now 1-fold (at most 1)"
    assert log.notes[1] == told
    same(gm, new)


def test_a_depthwise_chain_is_swept_until_nothing_moves():
    layers = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    gm = prepared_double(nn.Sequential(*layers))
    with torch.no_grad():
        gm.get_parameter("2.weight").mul_(torch.logspace(-2, 2, 6, dtype=DOUBLE).view(-1, 1, 1, 1))
    new, log = apply(gm, EqualizeChannels(tolerance=1e-6))
    assert log.count == 2 and int(log.notes[0].split()[0]) > 2
    assert_equalized(new, 1e-6)
    # Three factors of one channel become their geometric mean: each layer has one weight row or column a channel here.
    mean = (ranges(gm, "0")[0] * ranges(gm, "2")[0] * ranges(gm, "4")[1]) ** (1 / 3)
    for path, side in (("0", 0), ("2", 0), ("4", 1)):
        torch.testing.assert_close(ranges(new, path)[side], mean, rtol=1e-5, atol=0)
    same(gm, new)


def test_too_few_sweeps_are_told_and_a_second_run_goes_on():
    layers = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    gm = prepared_double(nn.Sequential(*layers))
    new, log = apply(gm, EqualizeChannels(sweeps=1))
    assert log.notes[0] == "1 sweeps, which did not settle; it needs more than sweeps=1"
    same(gm, new)
    assert apply(new, EqualizeChannels())[1].count == 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups(conv, groups):
    gm = prepared_double(nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 4, 3, groups=groups), nn.PReLU(4), conv(4, 8, 1, groups=groups)))
    new, log = apply(gm, EqualizeChannels())
    assert log.count == 2
    assert_equalized(new)
    same(gm, new)


BEHIND = {
    "leaky_relu": lambda s, x: F.leaky_relu(x, 0.2),
    "prelu": lambda s, x: s.act(x),
    "max_pool": lambda s, x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda s, x: F.avg_pool2d(x.relu(), 3, 2, 1),
    "adaptive": lambda s, x: F.adaptive_avg_pool2d(x, 4),
    "pad": lambda s, x: F.pad(x, (1, 0, 2, 1)),
    "zero_pad": lambda s, x: s.zero(x),
    "negative pad": lambda s, x: F.pad(x, (-1, 0, 0, -1), value=0.0),
    "contiguous": lambda s, x: x.contiguous(),
    "squeezed": lambda s, x: x.unsqueeze(1).squeeze(1),
    "flattened and back": lambda s, x: x.flatten(2).unflatten(2, (x.shape[2], x.shape[3])),
    "relu6": lambda s, x: F.relu6(x),
    "hardtanh": lambda s, x: F.hardtanh(x, 0.0, 0.5).relu(),
    "two clamps": lambda s, x: F.hardtanh(F.relu6(x), 0, 0.3),
    "a size": lambda s, x: x.relu() if x.shape[1] == 6 and x.size(0) != 17 else x,
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_lies_between(name):
    net = Net(
        lambda s, x: s.b(BEHIND[name](s, s.a(x))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 4, 3),
        act=nn.PReLU(6),
        zero=nn.ZeroPad2d((1, 2, 0, 1)),
    )
    gm = prepared_double(net)
    new, log = apply(gm, EqualizeChannels())
    assert (log.count, [where for where, _ in log.skipped]) == (1, ["b"])
    assert_equalized(new)
    same(gm, new)
    assert not EqualizeChannels()(new).modified


HEADS = {
    "pooled and flattened": (lambda x: F.adaptive_avg_pool2d(x.relu(), 1).flatten(1), 6),
    "a flattened map": (lambda x: F.max_pool2d(x.relu(), 2).flatten(1), 6 * 49),
    "a viewed map": (lambda x: x.view(x.shape[0], -1), 6 * 14 * 14),
    "a map behind a ReLU6": (lambda x: F.relu6(x.reshape(-1, 6 * 14 * 14)), 6 * 14 * 14),
    "a mean": (lambda x: x.mean((2, 3)), 6),
    "a mean that keeps": (lambda x: x.mean((-1, -2), keepdim=True).flatten(1), 6),
    "squeezed": (lambda x: x.mean(3).mean(2, keepdim=True).squeeze(-1), 6),
    "rows": (lambda x: x.mean(3).flatten(1), 6 * 14),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_behind_a_map(name):
    head, features = HEADS[name]
    gm = prepared_double(Net(lambda s, x: s.fc(head(s.conv(x))), conv=nn.Conv2d(3, 6, 3), fc=nn.Linear(features, 5)))
    new, log = apply(gm, EqualizeChannels())
    assert log.count == 1
    assert_equalized(new)
    same(gm, new)


@pytest.mark.parametrize("ndim", [2, 3])
def test_linear_layers_of_tokens(ndim):
    layers = nn.Linear(256 if ndim == 2 else 16, 12), nn.ReLU(), nn.Linear(12, 5)
    start = 1 if ndim == 2 else 2
    gm = prepared_double(
        Net(lambda s, x: s.layers(x[:, :1].flatten(start) if ndim == 2 else x.flatten(1, 2)), layers=nn.Sequential(*layers))
    )
    new, log = apply(gm, EqualizeChannels())
    assert log.count == 1
    assert_equalized(new)
    same(gm, new)


def test_several_readers_share_a_factor():
    convs = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 4, 1), "c": nn.Conv2d(6, 4, 3, padding=1), "d": nn.Conv2d(6, 4, 1)}
    gm = prepared_double(Net(lambda s, x: (y := s.a(x), z := y.relu(), s.b(z) + s.c(z) + s.d(F.max_pool2d(y, 3, 1, 1)))[-1], **convs))
    with torch.no_grad():
        gm.get_parameter("c.weight").mul_(10)
    new, log = apply(gm, EqualizeChannels())
    assert [(layer, sorted(others)) for layer, others in links(gm)] == [("a", ["b", "c", "d"])]
    assert log.count == 3
    s = (ranges(gm, "a")[0] / ranges(gm, "c")[1]).sqrt()
    for name in "bcd":
        torch.testing.assert_close(new.get_parameter(f"{name}.weight"), gm.get_parameter(f"{name}.weight") * s.view(1, -1, 1, 1))
    same(gm, new)


def refused(body, **members: nn.Module) -> str:
    members = {"a": nn.Conv2d(3, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 1), **members}
    gm = prepared_double(Net(body, **members))
    new, log = apply(gm, EqualizeChannels())
    assert (new is gm, log.count) == (True, 0)
    return dict(log.skipped)["a"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda s, x: s.b(F.gelu(s.a(x))), "goes to gelu (gelu), which is not homogeneous"),
        (lambda s, x: s.b(F.silu(s.a(x))), "goes to silu (silu), which is not homogeneous"),
        (lambda s, x: s.b(F.hardswish(s.a(x))), "goes to hardswish (hardswish), which is not homogeneous"),
        (lambda s, x: s.b(F.hardtanh(s.a(x))), "goes to hardtanh (hardtanh), which is not homogeneous"),
        (lambda s, x: s.b(s.a(x).sigmoid()), "goes to sigmoid (sigmoid), which is not homogeneous"),
        (lambda s, x: (y := s.a(x).relu(), s.b(y) + y)[1], "goes to add (add), which does not commute with a scale a channel"),
        (lambda s, x: s.b(s.a(x) + 1), "goes to add (add), which does not commute with a scale a channel"),
        (lambda s, x: (y := s.a(x), s.b(y.relu()), y)[1:], "its output is returned by the network"),
        (lambda s, x: s.b(s.a(x).roll(1, 1)), "goes to roll (view), which does not commute with a scale a channel"),
        (lambda s, x: s.b(s.a(x).transpose(2, 3)), "goes to transpose (view), which does not commute with a scale a channel"),
        (lambda s, x: s.b(s.a(x).abs()), "goes to abs_1 (abs), which does not commute with a scale a channel"),
        (lambda s, x: s.b(F.pad(s.a(x), (1, 1), value=1.0)), "goes to pad (pad), which does not commute with a scale a channel"),
        (lambda s, x: s.b(F.pad(s.a(x), (0, 0, 0, 0, 1, -1))), "goes to pad (pad), which does not commute with a scale a channel"),
        (lambda s, x: s.b(s.norm(s.a(x))), "goes to norm (group_norm), which does not commute with a scale a channel"),
        (
            lambda s, x: s.b(s.a(x).mean(1, keepdim=True).expand(-1, 6, -1, -1)),
            "goes to mean (mean), which does not commute with a scale a channel",
        ),
        (lambda s, x: s.wide(s.a(x)), "wide reads its channels as positions"),
        (lambda s, x: s.wide(s.a(x).flatten(1, 2)), "wide reads its channels as positions"),
        (lambda s, x: s.grouped(s.a(x).flatten(1, 2)), "the 32 groups of grouped cut through its channels"),
    ],
)
def test_refusals(body, reason):
    members = {"norm": nn.GroupNorm(2, 6), "wide": nn.Linear(16, 4), "grouped": nn.Conv1d(96, 32, 1, groups=32)}
    assert refused(body, **members) == reason


def test_a_weight_that_is_used_twice_is_refused():
    gm = trace(Net(lambda s, x: s.c(s.b(s.b(s.a(x)))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1)).eval(), images())
    new, log = apply(gm, EqualizeChannels())
    assert new is gm
    assert dict(log.skipped) == {"a": "b is called 2 times", "b": "b is called 2 times", "c": "its output is returned by the network"}
    net = Net(lambda s, x: s.b(s.a(x)) * s.b.weight.mean(), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1))
    _, log = apply(trace(net.eval(), images()), EqualizeChannels())
    assert dict(log.skipped)["a"] == "the weight of b is also read outside of it"
    assert apply(prepared_double(net), EqualizeChannels())[1].count == 1


def test_a_quantized_network_is_left_alone():
    gm = quantize(prepared("chain"), [images(4)], w=4, a=None, cat=False, recipe="fast", edges="same", progress=False)
    new, log = apply(gm, EqualizeChannels())
    assert new is gm
    assert dict(log.skipped)["0"] == "the weight of 0 is quantized already"


def test_dead_channels_stay_as_they_are():
    gm = prepared_double(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 5, 1)))
    with torch.no_grad():
        first, second = gm.get_parameter("0.weight"), gm.get_parameter("2.weight")
        first[0] = 0  # makes a constant
        second[:, 1] = 0  # is not read
        first[2], second[:, 2] = 0, 0
        first[3] *= 1e-14  # all but constant
    new, log = apply(gm, EqualizeChannels())
    assert log.count == 1
    assert log.notes[0] == "4 channels have no weights to speak of in one of two layers and stay as they are"
    for path, axis in (("0.weight", 0), ("2.weight", 1), ("0.bias", 0)):
        old, made = gm.get_parameter(path).movedim(axis, 0), new.get_parameter(path).movedim(axis, 0)
        assert torch.equal(old[:4], made[:4]) and not torch.equal(old[4:], made[4:])
        assert bool(made.isfinite().all())
    assert new.get_submodule("1").bound.flatten()[:4].tolist() == [6.0] * 4
    same(gm, new)
    assert not EqualizeChannels()(new).modified


def test_all_channels_dead():
    gm = prepared_double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)))
    with torch.no_grad():
        gm.get_parameter("0.weight").zero_()
    new, log = apply(gm, EqualizeChannels())
    assert new is gm and log.count == 0


def test_a_channel_that_comes_within_the_limit_joins_in():
    """A second run sees the ranges that the first one left, so whatever it would include the first one must."""
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1)
    gm = prepared_double(nn.Sequential(*layers))
    with torch.no_grad():
        gm.get_parameter("0.weight").mul_(1e4)
        gm.get_parameter("4.weight")[:, 0].mul_(1e3)
    for limit in (3, 10, 30, 100):
        new, _ = apply(gm, EqualizeChannels(limit=limit))
        same(gm, new)
        assert not EqualizeChannels(limit=limit)(new).modified


def test_relu6_becomes_a_bound_a_channel():
    gm = prepared_double("mobile")
    new, log = apply(gm, EqualizeChannels())
    assert ops(gm)["relu6"] == 5 and ops(new)["relu6"] == 0
    assert classes(new)["ChannelClamp"] == 5
    clamp = new.get_submodule("b.2")
    assert isinstance(clamp, ChannelClamp)
    s = 6 / clamp.bound.flatten()
    torch.testing.assert_close(new.get_parameter("b.0.bias"), gm.get_parameter("b.0.bias") / s)
    kept, log = apply(gm, EqualizeChannels("refuse"))
    assert kept is gm and dict(log.skipped)["b.0"] == "goes to b_2 (relu6), which is not homogeneous"
    x = 30 * images(4, DOUBLE)  # far above 6
    with torch.no_grad():
        torch.testing.assert_close(gm(x), new(x), rtol=1e-9, atol=1e-9)


def test_a_relu6_module_that_is_called_twice():
    def body(s, x: Tensor) -> Tensor:
        return s.c(s.act(s.b(s.act(s.a(x)))))

    convs = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Conv2d(4, 2, 1)}
    gm = trace(Net(body, **convs, act=nn.ReLU6()).double().eval(), images(dtype=DOUBLE))
    new, log = apply(gm, EqualizeChannels())
    assert log.count == 2 and classes(new)["ChannelClamp"] == 2
    same(gm, new)


def test_channel_clamp():
    clamp = ChannelClamp(torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1))
    x = 3 * torch.randn(2, 3, 4, 4)
    expected = torch.stack([x[:, i].clamp(0, bound) for i, bound in enumerate((1.0, 2.0, 0.5))], 1)
    assert torch.equal(clamp(x), expected)
    assert repr(clamp) == "ChannelClamp(channels=3)"
    copied = copy.deepcopy(clamp)
    assert copied.bound is not clamp.bound and torch.equal(copied(x), expected)
    other = ChannelClamp(torch.zeros(3, 1, 1))
    other.load_state_dict(clamp.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(torch.export.export(clamp, (x,)).module()(x), expected)
    assert torch.equal(torch.compile(clamp, fullgraph=True, backend="eager")(x), expected)


def test_quantizers_stand_behind_the_clamp():
    gm = prepared("mobile")
    new, _ = apply(gm, EqualizeChannels())
    before, behind = place(gm, 4, 4), place(new, 4, 4)
    assert behind == before
    assert {"stem_2", "b_2", "b_5"} <= set(behind.tensors)
    q = quantize(new, [images(8)], w=8, a=8, cat=False, recipe="fast", progress=False)
    clamped = [node for node, module in called(q) if isinstance(module, ChannelClamp)]
    assert clamped and all(str(reader.target).startswith("activations.") for node in clamped for reader in node.users)
    with torch.no_grad():
        assert torch.isfinite(q(images(2))).all()
        torch.testing.assert_close(q(images(8)), gm(images(8)), rtol=0.2, atol=0.2)


def test_the_norms_that_were_folded_follow():
    gm = prepared_double("chain")
    new, _ = apply(gm, EqualizeChannels())
    old, norm = gm.meta[NORMS]["0"], new.meta[NORMS]["0"]
    s = ranges(gm, "0")[0] / ranges(new, "0")[0]
    torch.testing.assert_close(norm.factor, old.factor / s)
    torch.testing.assert_close(norm.shift, old.shift / s)
    assert norm.mean is old.mean and norm.deviation is old.deviation


def test_memory_format_and_gradients_are_kept():
    gm = prepared("chain").to(memory_format=torch.channels_last)
    gm.get_parameter("4.weight").requires_grad_(False)
    new, _ = apply(gm, EqualizeChannels())
    for path in ("0.weight", "4.weight"):
        old, made = gm.get_parameter(path), new.get_parameter(path)
        assert made.stride() == old.stride() and made.requires_grad == old.requires_grad
    same(gm, new, 1e-4)


def test_in_one_pipeline():
    gm = trace(make("mobile"), images())
    new = Pipeline([*(step() for step in PREPARE), EqualizeChannels()]).run(gm)
    same(gm, new, 1e-3)
    assert ops(new)["batch_norm"] == 0 and classes(new)["ChannelClamp"] == 5


@pytest.mark.parametrize(
    ("options", "text"), [({"relu6": "clip"}, "relu6: 'clip' is no way to treat ReLU6"), ({"limit": 1}, "limit: is 1")]
)
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        EqualizeChannels(**options)


def test_mobilenet_v2():
    """17 blocks are two pairs each (expand, or the stem, depthwise, project), three pairs lie between; ReLU6 becomes a bound a channel."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 3.0)
            nn.init.normal_(part.bias, 0.5)
    x = torch.randn(2, 3, 64, 64)
    gm = Pipeline([step() for step in PREPARE]).run(trace(net, x))
    step = EqualizeChannels()
    new = Pipeline([step]).run(gm)
    assert step.log.count == 17 * 2 + 3
    assert sum(isinstance(part, ChannelClamp) for part in new.modules()) >= 34
    with torch.no_grad():
        torch.testing.assert_close(new(x), gm(x), rtol=1e-4, atol=1e-4 * gm(x).abs().max().item())
