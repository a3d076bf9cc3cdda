"""LowerInteger: which layers compute on bytes, what stays, and that the numbers are those of the simulation."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Net, classes, conv_bn, head, images, make
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.deploy import cpu
from fxquant.deploy.bytes import Dequantize, Quantize
from fxquant.deploy.cpu import CpuBackend, CpuIntegerLayer
from fxquant.deploy.integers import Grid, IntegerLayer
from fxquant.errors import ConfigError
from fxquant.graph import called
from fxquant.kinds import kind
from fxquant.passes import LowerInteger
from fxquant.pipeline import PassLog

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@functools.cache
def simulated(name: str, w: int, a: int) -> GraphModule:
    return quantize(make(name), w, a)


def quantize(net: nn.Module, w: int = 4, a: int = 4, **more) -> GraphModule:
    return fxquant.quantize(net.eval(), [images(8)], w, a, False, **{"recipe": "fast", "progress": False, **more})


def lowered(gm: GraphModule) -> tuple[GraphModule, PassLog]:
    step = LowerInteger(CpuBackend())
    return step(gm).graph_module, step.log


def leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
def assert_same(gm: GraphModule, new: GraphModule, x: Tensor) -> None:
    """Equal up to the rounding of what is summed in floats: logits, and means over maps."""
    for mine, theirs in zip(leaves(new(x.clone())), leaves(gm(x.clone())), strict=True):
        assert mine.dtype == theirs.dtype
        difference = (mine - theirs).abs().flatten(1).amax(1) / theirs.abs().max()
        assert (difference < 1e-5).all(), difference


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8)], ids="W{0[0]}A{0[1]}".format)
@pytest.mark.parametrize("name", NETS)
def test_every_net(name, bits, untouched):
    gm = simulated(name, *bits)
    with untouched(gm):
        new, log = lowered(gm)
        assert_same(gm, new, images(16))
        for count in (1, 3):
            assert [leaf.shape for leaf in leaves(new(images(count)))] == [leaf.shape for leaf in leaves(gm(images(count)))]
        again, second = lowered(new)
    assert again is new
    assert second.count == 0
    layers = {row.name for row in fxquant.report(gm).record.layers}
    assert log.count + sum(where in layers for where, _ in log.skipped) == len(layers)
    assert all(reason for _, reason in log.skipped)


def operations(gm: GraphModule) -> list[str]:
    """Return what the graph calls, in order: classes of modules, names of the rest."""
    named = {node: type(module).__name__ for node, module in called(gm)}
    return [
        named.get(node, getattr(node.target, "__name__", str(node.target)))
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output")
    ]


def test_chain():
    """The stem reads floats; all else is one call a layer, and the classifier reads the means of bytes."""
    new, log = lowered(simulated("chain", 2, 2))
    assert operations(new) == ["ToFloat32", "QuantizedConv2d", "ReLU", "Quantize", "CpuIntegerLayer", "PooledIntegerLayer"]
    assert (log.count, log.skipped) == (2, [("0", "reads input_1, which is not quantized")])


def test_residual():
    """A block whose identity is bytes is two calls; one with a downsampling convolution adds floats. Pools move bytes."""
    new, log = lowered(simulated("residual", 2, 2))
    assert operations(new) == [
        *("ToFloat32", "QuantizedConv2d", "ReLU", "Quantize", "ByteMaxPool2d"),
        *("CpuIntegerLayer", "CpuIntegerLayer"),
        *("CpuIntegerLayer", "CpuIntegerLayer", "CpuIntegerLayer", "add", "ReLU", "Quantize"),
        "PooledIntegerLayer",
    ]
    layers = [module for _, module in called(new) if isinstance(module, CpuIntegerLayer)]
    assert [layer.residual is not None for layer in layers] == [False, True, False, False, False]
    assert [layer.output is None for layer in layers] == [False, False, False, True, True]
    assert log.count == 6


def test_the_cut_of_an_activation_is_in_the_grid():
    net = Net(
        lambda s, x: s.c(F.hardtanh(s.b(F.relu6(s.a(x))), -0.5, 0.25)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 3)
    )
    gm = quantize(net, 8, 8, edges="same")
    new, _ = lowered(gm)
    (layer,) = [module for _, module in called(new) if isinstance(module, CpuIntegerLayer) and module.output]
    values = [layer.output.scale * (end - layer.output.zero_point) for end in (layer.output.low, layer.output.high)]
    assert values == pytest.approx([-0.5, 0.25], abs=layer.output.scale)
    assert_same(gm, new, images(8))


def test_two_readers_keep_the_floats():
    """A value that something reads in front of its quantizer is made as a float, and quantized behind."""
    net = Net(lambda s, x: s.c(s.b(F.relu(s.a(x)))) + s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1))

    def body(s, x):
        y = s.b(F.relu(s.a(x)))
        return s.c(F.relu(y)) + y

    net.body = body
    gm = quantize(net)
    new, _ = lowered(gm)
    assert operations(new).count("CpuIntegerLayer") == 2
    assert_same(gm, new, images(8))


@pytest.mark.parametrize("name", NETS)
def test_bytes_know_their_shape(name):
    new, _ = lowered(simulated(name, 4, 4))
    run = torch.fx.Interpreter(new)
    run.garbage_collect_values = False
    with torch.no_grad():
        run.run(images(4))
    found = [(node, run.env[node]) for node in new.graph.nodes if node.op in ("call_module", "call_function", "call_method")]
    codes = [(node, value) for node, value in found if isinstance(value, Tensor) and value.dtype == torch.uint8]
    assert codes or name == "one_dimension"
    for node, value in codes:
        traced = node.meta["val"]
        assert (traced.dtype, traced.shape[1:]) == (torch.uint8, value.shape[1:]), node


@functools.cache
def residuals_read_twice() -> GraphModule:
    def body(s, x):
        y = F.relu(s.a(x))
        z = F.relu(s.b(y) + y)  # y is what the layer reads and what is added to it
        u = F.relu(s.c(z) + y)  # and is read again
        return s.head(F.relu(s.d(u)) + z)

    parts = {name: nn.Sequential(*conv_bn(4, 4)) for name in "bcd"}
    return quantize(Net(body, a=nn.Sequential(*conv_bn(3, 4)), head=head(4), **parts))


def test_a_residual_that_is_read_later_and_one_that_is_the_input():
    gm = residuals_read_twice()
    new, _ = lowered(gm)
    assert sum(isinstance(module, CpuIntegerLayer) and module.residual is not None for module in new.modules()) == 2
    assert_same(gm, new, images(16))


@pytest.mark.slow
def test_a_residual_that_is_read_later_compiled():
    new, _ = lowered(residuals_read_twice())
    compiled = fxquant.compile(new)
    with torch.no_grad():
        assert torch.allclose(compiled(images(8)), new(images(8)), atol=1e-5)


def test_concatenations_join_bytes():
    """The quantizer behind them goes in front, through concatenations of concatenations; a part on another grid is quantized anew."""

    def body(s, x):
        y = F.relu(s.a(x))
        inner = torch.cat([F.relu(s.b(y)), s.c(y), F.max_pool2d(y, 3, 1, 1)], dim=1)
        z = s.c(y).sigmoid()
        return s.d(torch.cat((inner, z, z, y), 1)) + z.mean()

    gm = quantize(Net(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 2, 1), d=nn.Conv2d(18, 4, 1)))
    new, log = lowered(gm)
    assert log.count == 4
    assert operations(new) == [
        *("ToFloat32", "QuantizedConv2d", "relu", "Quantize", "Dequantize", "Quantize"),
        *("CpuIntegerLayer", "CpuIntegerLayer", "ByteMaxPool2d", "Dequantize", "Quantize", "cat"),
        *("CpuIntegerLayer", "sigmoid", "Quantize", "cat"),
        *("CpuIntegerLayer", "mean", "add"),
    ]
    assert_same(gm, new, images(8))


def test_a_concatenation_that_something_else_reads_stays_float():
    def body(s, x):
        y = F.relu(s.a(x))
        return s.d(torch.cat([s.b(y), s.b(y)], 1))

    gm = quantize(Net(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1), d=nn.Conv2d(8, 4, 1)))
    (concat,) = (node for node in gm.graph.nodes if kind(node) == "concat")
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.add, (output.args[0], gm.graph.call_function(torch.mean, (concat,)))),)
    gm.recompile()
    new, log = lowered(gm)
    assert operations(new)[4:8] == ["CpuIntegerLayer", "CpuIntegerLayer", "cat", "Quantize"]
    assert (concat.name, "joins b_2, which is not quantized") in log.skipped
    assert_same(gm, new, images(8))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("residual", "2 relu (stem.2, layers.1.relu_1)"),
        ("squeeze_excite", "1 hardswish (stem.2), 1 mul (mul), 1 relu (relu), 1 sigmoid (sigmoid)"),
        ("dense", "3 batch_norm (bn1, bn2, last), 3 relu (relu, relu_1, relu_2)"),
        ("shuffle", "1 relu (stem.2)"),
    ],
)
def test_what_computes_on_floats_is_noted(name, note):
    assert lowered(simulated(name, 4, 4))[1].notes == [f"computed in floats: {note}"]


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("residual", [("add", "adds layers_1_conv2_1, which is not quantized")]),
        ("dense", [("concat", "joins stem, which is not quantized"), ("concat", "joins cat, which is not quantized")]),
        ("pooled", [("avg_pool", "its means lie between bytes; those of whole maps are exact in the layer that reads them")]),
    ],
)
def test_sums_concatenations_and_pools_that_stay_floats_are_named_with_a_reason(name, reasons):
    gm = simulated(name, 4, 4)
    kinds = {str(node.target) if node.op == "call_module" else node.name: kind(node) for node in gm.graph.nodes}
    found = [(kinds[where], why) for where, why in lowered(gm)[1].skipped if kinds.get(where) in ("add", "concat", "avg_pool")]
    assert found == reasons


def test_notes_name_functions_and_modules_and_leave_out_what_is_skipped_and_what_is_no_float():
    def body(s, x):
        y = s.act(torch.exp(s.b(F.relu(s.a(x)))))
        y = y * (y > 0.5)
        return s.c(y.softmax(1) @ y)

    net = Net(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1), act=nn.Softplus())
    _, log = lowered(quantize(net, overrides={"b": {"w": None}}))
    assert {where for where, _ in log.skipped} == {"a", "b", "matmul"}
    assert log.notes == ["computed in floats: 1 Softplus (act), 1 exp (exp), 1 mul (mul), 1 relu (relu), 1 softmax (softmax)"]


def test_sizes_are_read_off_bytes():
    new, _ = lowered(simulated("shuffle", 4, 4))
    (left,) = (node for node, module in called(new) if isinstance(module, Dequantize))
    assert [kind(reader) for reader in left.users] == ["other"]  # the Quantize of the half that goes on to another grid


def test_views_and_padding_move_bytes():
    def body(s, x):
        y = F.max_pool2d(F.relu(s.a(x)), 2)
        left, right = y.chunk(2, 1)
        return s.b(F.pad(left[:, :, ::2], (1, 1, 0, 2)).transpose(2, 3)) + s.b(right.roll(1, 3).reshape(-1, 2, 7, 7)).mean()

    gm = quantize(Net(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(2, 5, 3)))
    new, log = lowered(gm)
    assert log.count == 2
    assert classes(new)["Dequantize"] == 0
    assert classes(new)["BytePad"] == classes(new)["ByteMaxPool2d"] == 1
    assert_same(gm, new, images(8))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda s, x: s.b(F.pad(F.relu(s.a(x)), (1, 1, 1, 1), value=0.5)), id="padding with another number"),
        pytest.param(lambda s, x: s.b(F.pad(F.relu(s.a(x)), (1, 1, 1, 1), mode="reflect")), id="padding by reflection"),
        pytest.param(lambda s, x: s.b(F.adaptive_max_pool2d(F.relu(s.a(x)), 5)), id="adaptive max pooling"),
        pytest.param(lambda s, x: s.b(F.interpolate(F.relu(s.a(x)), scale_factor=2)), id="nearest interpolation"),
        pytest.param(lambda s, x: s.b(F.pixel_unshuffle(F.pixel_shuffle(F.relu(s.a(x)), 2), 2)), id="pixel shuffles"),
        pytest.param(lambda s, x: s.b(torch.add(s.b(F.relu(s.a(x))), F.relu(s.a(x)), alpha=2)), id="a sum with a factor"),
        pytest.param(lambda s, x: s.b(F.relu(s.a(x)) + F.relu(s.a(x)).mean((2, 3), keepdim=True)), id="a sum of two shapes"),
    ],
)
def test_what_moves_no_bytes_reads_floats(body):
    gm = quantize(Net(body, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3, padding=1)))
    new, _ = lowered(gm)
    assert_same(gm, new, images(8))


def pooled_head(pool, head: nn.Module) -> GraphModule:
    """A quantized network whose `head` reads what `pool` makes of maps ``[N, 8, 8, 8]``."""
    return quantize(Net(lambda s, x: s.head(pool(F.relu(s.a(x)))), a=nn.Conv2d(3, 8, 3, 2, 1), head=head))


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(lambda y: F.avg_pool2d(y, 8).flatten(1), id="a window as large as the map"),
        pytest.param(lambda y: nn.AvgPool2d((8, 7), stride=[8])(y).view(-1, 8), id="a window in the corner"),
        pytest.param(lambda y: F.adaptive_avg_pool2d(y, (1, 1)).reshape(-1, 8), id="adaptive"),
        pytest.param(lambda y: y.mean((-1, 2)).contiguous(), id="mean"),
    ],
)
def test_means_of_maps_and_of_their_corners_are_exact(pool):
    gm = pooled_head(pool, nn.Linear(8, 5))
    new, log = lowered(gm)
    assert operations(new)[-1] == "PooledIntegerLayer"
    assert [where for where, _ in log.skipped] == ["a"]
    assert_same(gm, new, images(8))


@pytest.mark.parametrize(
    ("pool", "head"),
    [
        pytest.param(lambda y: F.avg_pool2d(y, 8, padding=1).flatten(1), nn.Linear(8, 5), id="padding counted"),
        pytest.param(lambda y: F.avg_pool2d(y, 8, divisor_override=9).flatten(1), nn.Linear(8, 5), id="another divisor"),
        pytest.param(lambda y: nn.AvgPool2d(9, 9, ceil_mode=True, padding=1)(y).flatten(1), nn.Linear(8, 5), id="rounded up"),
        pytest.param(lambda y: y.mean((2, 3)).flip(1), nn.Linear(8, 5), id="channels turned round"),
        pytest.param(lambda y: y.mean((2, 3)).roll(1, 1), nn.Linear(8, 5), id="channels moved"),
        pytest.param(lambda y: y.mean((2, 3)).narrow(1, 2, 6), nn.Linear(6, 5), id="some channels"),
        pytest.param(lambda y: y.mean((2, 3)).reshape(-1, 4), nn.Linear(4, 5), id="channels apart"),
        pytest.param(lambda y: y.mean((2, 3), True), nn.Linear(1, 1), id="positions"),
        pytest.param(lambda y: y.mean((2, 3), True).squeeze(), nn.Linear(8, 5), id="one image loses its axis"),
        pytest.param(lambda y: y.mean((2, 3), True), nn.Conv2d(8, 4, 1, groups=2), id="groups"),
        pytest.param(lambda y: y.mean((2, 3), True), nn.Conv2d(8, 4, 3, padding=1), id="a kernel with padding"),
        pytest.param(lambda y: y.mean((2, 3), True), nn.Conv2d(8, 4, 1, 3, padding=1), id="padding alone"),
    ],
)
def test_what_is_no_mean_of_maps_stays_as_it_is(pool, head):
    gm = pooled_head(pool, head)
    new, log = lowered(gm)
    assert "PooledIntegerLayer" not in operations(new)
    assert dict(log.skipped)["head"].endswith("which is not quantized")
    assert_same(gm, new, images(8))


def test_a_window_that_images_outgrow():
    """A graph of convolutions takes images of any size; the pool gives several values for larger ones."""
    gm = pooled_head(lambda y: F.avg_pool2d(y, 7), nn.Conv2d(8, 5, 1))
    new, _ = lowered(gm)
    assert_same(gm, new, torch.rand(4, 3, 26, 18))  # maps of 13 x 9, still one window
    assert gm(torch.rand(4, 3, 28, 16)).shape == (4, 5, 2, 1)
    compiled = torch.compile(new, fullgraph=True, backend="eager")
    assert_same(gm, compiled, torch.rand(4, 3, 26, 18))
    for size in ((28, 16), (12, 16)):
        words = rf"the pool in front gives one value for maps between 7 x 7 and 13 x 13, not for {size[0] // 2} x 8"
        with pytest.raises(ConfigError, match=f"^head: {words}"):
            new(torch.rand(4, 3, *size))
        with pytest.raises(Exception, match=words):
            compiled(torch.rand(4, 3, *size))


def test_a_mean_over_other_axes_is_no_mean_of_maps():
    net = Net(lambda s, x: s.fc(F.relu(s.a(x)).permute(0, 2, 3, 1).mean((1, 2))), a=nn.Conv2d(3, 14, 3), fc=nn.Linear(14, 5))
    gm = quantize(net)
    new, log = lowered(gm)
    assert log.count == 0
    assert dict(log.skipped)["fc"].startswith("reads mean, which is not quantized")
    assert new is gm


def test_reasons():
    gm = fxquant.quantize(make("attention"), [images(8)], 8, 8, False, recipe="fast", progress=False)
    _, log = lowered(gm)
    assert any("the products are of floats" in reason for _, reason in log.skipped)
    old = fxquant.quantize(make("one_dimension"), [images(8)], 4, 4, False, recipe="fast", progress=False)
    _, log = lowered(old)
    assert any("Conv1d has no integer form" in reason for _, reason in log.skipped)


def test_a_float_layer_between_stays_one():
    gm = quantize(make("chain"), 4, 4, overrides={"4": {"w": None}})
    new, log = lowered(gm)
    assert ("4", "its weight is float") in log.skipped
    assert operations(new).count("Conv2d") == 1
    assert_same(gm, new, images(8))


def test_a_backend_may_refuse():
    class Picky(CpuBackend):
        def refusal(self, layer: IntegerLayer, residual: Grid | None = None) -> str | None:
            return "only linear layers" if not layer.is_linear else super().refusal(layer, residual)

    step = LowerInteger(Picky())
    new = step(simulated("residual", 4, 4)).graph_module
    assert [reason for _, reason in step.log.skipped].count("only linear layers") == 5
    assert_same(simulated("residual", 4, 4), new, images(8))


def test_boundaries_are_where_they_must_be():
    """Bytes become floats only for what reads floats."""
    new, _ = lowered(simulated("squeeze_excite", 8, 8))
    for node, module in called(new):
        if isinstance(module, Dequantize):
            assert not any(
                isinstance(new.get_submodule(str(user.target)), CpuIntegerLayer) for user in node.users if user.op == "call_module"
            )
        if isinstance(module, Quantize):
            assert node.users
