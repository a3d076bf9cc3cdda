"""The CUDA integer kernels give the reference bit for bit: interpreted on the CPU, and on the device where there is one.

Triton decides when it is imported, and torch imports it early, whether kernels are interpreted. So the tests that need the interpreter
run in a second pytest over this same file, with TRITON_INTERPRET=1 from its start; `test_kernels_interpreted` starts it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant.deploy import cuda
from fxquant.deploy.cuda import CudaBackend, CudaIntegerLayer, pack_weight, refusal, weight_width
from fxquant.deploy.integers import Grid, IntegerLayer
from fxquant.errors import ConfigError
from fxquant.graph import deep_copy
from fxquant.passes import LowerInteger
from fxquant.pipeline import Pipeline

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

interpreted = pytest.mark.skipif(not (INTERPRETED and HAS_TRITON), reason="runs inside test_kernels_interpreted")
once = pytest.mark.skipif(INTERPRETED, reason="needs no interpreter, runs outside")
on_cuda = [pytest.mark.cuda, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")]


INCOMING, OUT = Grid(0.02, 100), Grid(1.0, 90)


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_cuda)])
def device(request) -> str:
    return request.param


def draw(generator: torch.Generator, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def make_layer(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, ...] = 3,
    bits: int = 8,
    incoming: Grid = INCOMING,
    out: Grid | None = OUT,
    bias: bool = True,
    seed: int = 0,
    **geometry,
) -> IntegerLayer:
    """A layer with every weight of `bits` bits; the outputs spread over the bytes of `out`, whose scale is set for that."""
    generator = torch.Generator().manual_seed(seed)
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    shape = (outputs, inputs // geometry.get("groups", 1), *sides)
    zero = draw(generator, 0, 2**bits - 1, outputs, *[1] * (len(shape) - 1), dtype=torch.int64)
    zero = zero if bits < 8 else torch.full_like(zero, 128)
    weight = (draw(generator, 0, 2**bits - 1, *shape, dtype=torch.int64) - zero).to(torch.int8)
    scale = 0.01 * torch.rand(outputs, generator=generator) + 0.001
    width = 0.3 * (incoming.high - incoming.low) * incoming.scale
    spread = width * float((weight.double().square().flatten(1).sum(1).sqrt() * scale).mean())
    shift = 0.3 * spread * torch.randn(outputs, generator=generator) if bias else None
    out = None if out is None else replace(out, scale=spread / max(4, (out.high - out.low) / 5))
    return IntegerLayer(weight, scale, shift, incoming, out, **geometry)


def make_codes(layer: IntegerLayer, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = draw(generator, layer.input.low, layer.input.high, *shape, dtype=torch.uint8)
    return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes


def check(device: str, layer: IntegerLayer, codes: Tensor, residual: Tensor | None = None, grid: Grid | None = None, **options) -> None:
    """Compare what the device gives with the reference, which is always computed on the CPU."""
    added = residual if residual is None or grid is None else grid.dequantize(residual)
    want = layer.reference(codes, None if added is None else added.float())
    module = CudaIntegerLayer(layer, grid, **options).to(device)
    before = codes.clone()
    got = module(codes.to(device), None if residual is None else residual.to(device))
    assert got.dtype == (torch.uint8 if layer.output is not None else options.get("dtype", torch.float32))
    assert got.shape == want.shape
    if got.dtype == torch.bfloat16 and INTERPRETED:  # which cuts off bits, where devices round
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got.cpu(), want.to(got.dtype))
    assert torch.equal(codes, before)
    assert got.ndim != 4 or got.is_contiguous(memory_format=torch.channels_last)
    assert layer.output is None or want.unique().numel() > min(8, want.numel() // 8, layer.output.high - layer.output.low)


LAYERS = {
    "3x3": {"inputs": 32, "outputs": 17, "padding": (1, 1)},
    "3x3 of three channels": {"inputs": 3, "outputs": 8, "padding": (1, 1)},
    "7x7 stride 2": {"inputs": 3, "outputs": 8, "kernel": 7, "stride": (2, 2), "padding": (3, 3)},
    "1x1": {"inputs": 17, "outputs": 33, "kernel": 1},
    "1x1 stride 2": {"inputs": 8, "outputs": 16, "kernel": 1, "stride": (2, 2)},
    "1x1 by int_mm": {"inputs": 16, "outputs": 17, "kernel": 1},
    "1x1 padded": {"inputs": 8, "outputs": 8, "kernel": 1, "padding": (1, 1)},
    "dilation": {"inputs": 8, "outputs": 8, "padding": (2, 2), "dilation": (2, 2)},
    "two sides": {"inputs": 40, "outputs": 8, "kernel": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "no padding, no bias": {"inputs": 8, "outputs": 17, "bias": False},
    "no zero-points": {"inputs": 17, "outputs": 8, "padding": (1, 1), "incoming": Grid(0.1, 0), "out": Grid(1.0, 0)},
    "2-bit bytes": {"inputs": 17, "outputs": 8, "padding": (1, 1), "incoming": Grid(0.7, 1, 0, 3), "out": Grid(1.0, 0, 0, 3)},
    "a zero-point above the bytes": {"inputs": 8, "outputs": 8, "padding": (1, 1), "incoming": Grid(0.1, 200, 0, 100)},
    "zero-point one": {"inputs": 8, "outputs": 8, "padding": (1, 1), "incoming": Grid(0.1, 1), "out": Grid(1.0, 1, 1, 255)},
    "cut at zero": {"inputs": 8, "outputs": 8, "padding": (1, 1), "out": Grid(1.0, 128, 128, 255)},
    "cut on both sides": {"inputs": 8, "outputs": 8, "padding": (1, 1), "out": Grid(1.0, 30, 30, 140)},
    "floats out": {"inputs": 8, "outputs": 17, "padding": (1, 1), "out": None},
    "groups": {"inputs": 34, "outputs": 6, "padding": (1, 1), "groups": 2},
    "narrow groups": {"inputs": 12, "outputs": 24, "padding": (1, 1), "groups": 3},
    "depthwise": {"inputs": 19, "outputs": 19, "padding": (1, 1), "groups": 19},
    "depthwise stride 2": {"inputs": 33, "outputs": 33, "kernel": 5, "stride": (2, 2), "padding": (2, 2), "groups": 33},
    "depthwise, two each": {"inputs": 8, "outputs": 16, "padding": (1, 1), "groups": 8},
    "depthwise, floats out": {"inputs": 8, "outputs": 8, "dilation": (2, 2), "padding": (2, 2), "groups": 8, "out": None},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(device, name):
    layer = make_layer(**LAYERS[name])
    channels = LAYERS[name]["inputs"]
    check(device, layer, make_codes(layer, 3, channels, 7, 5))
    check(device, layer, make_codes(layer, 1, channels, 5, 7))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["3x3", "3x3 of three channels", "1x1", "groups", "2-bit bytes", "depthwise"])
def test_packed_weights(device, name, bits):
    layer = make_layer(**LAYERS[name], bits=bits)
    assert weight_width(layer) == bits
    check(device, layer, make_codes(layer, 2, LAYERS[name]["inputs"], 5, 6), weight_bits=bits)


def test_packed_weights_of_long_rows(device):
    """Rows of a tap that fill a block, and more than one."""
    for bits, channels in ((2, 130), (4, 65), (8, 33)):
        layer = make_layer(channels, 8, kernel=(1, 2), bits=bits)
        check(device, layer, make_codes(layer, 1, channels, 3, 3), weight_bits=bits)


@pytest.mark.parametrize("name", ["3x3", "1x1", "1x1 by int_mm", "depthwise", "floats out"])
@pytest.mark.parametrize("kind", ["bytes", "float32", "float16", "bfloat16"])
def test_residual(device, name, kind):
    layer = make_layer(**LAYERS[name])
    codes = make_codes(layer, 2, LAYERS[name]["inputs"], 5, 7)
    shape = layer.reference(codes).shape
    scale = layer.output.scale if layer.output is not None else 0.5
    if kind == "bytes":
        grid = Grid(1.3 * scale, 117)
        check(device, layer, codes, make_codes(layer, *shape, seed=5), grid)
    else:
        floats = 40 * scale * torch.randn(shape, generator=torch.Generator().manual_seed(5))
        check(device, layer, codes, floats.to(getattr(torch, kind)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_out(device, dtype):
    for name in ("floats out", "depthwise, floats out"):
        layer = make_layer(**LAYERS[name])
        check(device, layer, make_codes(layer, 1, LAYERS[name]["inputs"], 5, 5), dtype=dtype)


@pytest.mark.parametrize(("features", "rows"), [(16, (3,)), (16, (4, 5)), (17, (2, 11)), (8, (1,))])
@pytest.mark.parametrize("int_mm", [True, False])
def test_linear(device, features, rows, int_mm):
    layer = make_layer(features, 10, kernel=())
    codes = make_codes(layer, *rows, features)
    check(device, layer, codes, int_mm=int_mm)
    check(device, replace(layer, output=None), codes, torch.ones(*rows, 10), int_mm=int_mm)
    check(device, layer, codes, make_codes(layer, *rows, 10), Grid(layer.output.scale, 3), int_mm=int_mm)


def test_packed_linear(device):
    layer = make_layer(18, 10, kernel=(), bits=2)
    check(device, layer, make_codes(layer, 20, 18), weight_bits=2)


def test_ties_go_to_even(device):
    """All outputs are multiples of one half, and the grid has steps of one."""
    for groups, outputs in ((1, 3), (8, 8)):
        weight = torch.ones(outputs, 8 // groups, 1, 1, dtype=torch.int8)
        layer = IntegerLayer(weight, torch.full((outputs,), 0.5), None, Grid(1.0, 6), Grid(1.0, 100), padding=(1, 1), groups=groups)
        codes = make_codes(replace(layer, input=Grid(1.0, 6, 0, 40)), 1, 8, 6, 6)
        assert (layer.accumulate(codes) % 2 == 1).any()
        check(device, layer, codes)


def test_any_order_of_the_bytes_in_memory(device):
    layer = make_layer(8, 8, padding=(1, 1))
    codes = make_codes(layer, 2, 8, 5, 6).contiguous()
    check(device, layer, codes)
    check(device, layer, make_codes(layer, 2, 8, 6, 5).transpose(2, 3))
    module = CudaIntegerLayer(make_layer(16, 17, kernel=1)).to(device)
    assert torch.equal(module(codes.repeat(1, 2, 1, 1).to(device)), module(make_codes(layer, 2, 8, 5, 6).repeat(1, 2, 1, 1).to(device)))


def test_no_images(device):
    layer = make_layer(3, 8)
    assert CudaIntegerLayer(layer).to(device)(torch.empty(0, 3, 5, 5, dtype=torch.uint8, device=device)).shape == (0, 8, 3, 3)


@st.composite
def any_layer(draw_one) -> tuple[IntegerLayer, tuple[int, ...], int]:
    def number(low: int, high: int) -> int:
        return draw_one(st.integers(low, high))

    bits = draw_one(st.sampled_from([2, 4, 8]))
    groups = draw_one(st.sampled_from([1, 1, 2, 5]))
    inputs, outputs = groups * number(1, 20), groups * number(1, 12)
    kernel, dilation = (number(1, 3), number(1, 3)), (number(1, 2), number(1, 2))
    padding, stride = (number(0, 2), number(0, 2)), (number(1, 3), number(1, 3))
    high = draw_one(st.sampled_from([3, 15, 127, 255]))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    incoming = Grid(0.1, number(0, high), 0, high)
    layer = make_layer(inputs, outputs, kernel, bits, incoming, Grid(1.0, number(0, 255)), bool(number(0, 1)), number(0, 99), **geometry)
    sides = [number(dilation[i] * (kernel[i] - 1) + 1, 7) for i in range(2)]
    return layer, (number(1, 3), inputs, *sides), bits


@interpreted
@settings(max_examples=25, deadline=None)
@given(any_layer())
def test_any_layer(case):
    layer, shape, bits = case
    codes = make_codes(layer, *shape)
    assert torch.equal(CudaIntegerLayer(layer, weight_bits=bits)(codes), layer.reference(codes))


class Net(nn.Module):
    """Every route, a residual of bytes, and a linear layer at the end."""

    def __init__(self, int_mm: bool = True):
        super().__init__()
        grid = Grid(0.1, 90)

        def module(residual: Grid | None = None, weight_bits: int = 8, **options) -> CudaIntegerLayer:
            return CudaIntegerLayer(make_layer(incoming=grid, **options), residual, weight_bits, int_mm=int_mm)

        self.first = module(inputs=3, outputs=8, padding=(1, 1))
        self.point = module(inputs=8, outputs=16, kernel=1)
        self.depth = module(inputs=16, outputs=16, padding=(1, 1), groups=16)
        self.last = module(inputs=16, outputs=8, padding=(1, 1), bits=2, weight_bits=2, residual=grid)
        self.head = module(inputs=8, outputs=5, kernel=(), out=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.last(self.depth(self.point(x)), x)
        return self.head(x.amax((2, 3)))


def images(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


@interpreted
def test_compiles_and_exports():
    net = Net()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(net, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)).module()
    for batch in (2, 3):
        want = net(images(batch))
        assert torch.equal(compiled(images(batch)), want)
        assert torch.equal(exported(images(batch)), want)


@interpreted
@pytest.mark.parametrize("name", ["7x7 stride 2", "depthwise, two each", "floats out"])
def test_operators_obey_torch(monkeypatch, name):
    """Schema, shape function and tracing agree with what the operator does."""
    layer = make_layer(**LAYERS[name])
    module, calls = CudaIntegerLayer(layer), []
    operator = "int8_depthwise_conv2d" if module.depthwise else "int8_conv2d"
    monkeypatch.setattr(cuda, operator, lambda *args: calls.append(args))
    module(make_codes(layer, 2, LAYERS[name]["inputs"], 6, 5))
    assert set(torch.library.opcheck(getattr(torch.ops.fxquant, operator).default, calls[0]).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", LAYERS)
@once
def test_shapes_without_a_kernel(name):
    """Tensors of no storage tell shape, type and memory order, on any machine."""
    layer = make_layer(**LAYERS[name])
    codes = make_codes(layer, 2, LAYERS[name]["inputs"], 6, 5)
    want = layer.reference(codes).contiguous(memory_format=torch.channels_last)
    for int_mm in (True, False):
        got = CudaIntegerLayer(layer, int_mm=int_mm).to("meta")(codes.to("meta"))
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@once
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", os.path.abspath(__file__)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60, done.stdout[-2000:]


@once
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["matrix", "packed", "depthwise"])
@pytest.mark.skipif(not HAS_TRITON or sys.platform != "linux", reason="needs Triton's compiler")
def test_compiles_for_devices_that_are_not_here(monkeypatch, tmp_path, kernel, arch):
    """The kernels reach the int8 tensor cores, and round every step: no product is contracted with a sum."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fxquant.deploy import triton_kernels

    bits = 2 if kernel == "packed" else 8
    constants = {"TAPS": 9, "ACROSS": 3, "RESIDUAL": triton_kernels.BYTE_RESIDUAL, "ROUND": True, "BLOCK_M": 64, "BLOCK_N": 32}
    if kernel != "depthwise":
        constants |= {"BITS": bits, "SHIFTED": True, "FLAT": False, "BLOCK_K": 64}
    pointers = {"codes": "*u8", "weight": "*i8" if bits == 8 else "*u8", "zeros": "*i8", "weight_scale": "*fp32", "bias": "*fp32"}
    types = pointers | {"offset": "*i32", "residual": "*u8", "out": "*u8"}
    types |= dict.fromkeys(("scale_in", "residual_scale", "residual_zero", "out_inverse", "out_zero", "low", "high"), "fp32")
    function = (triton_kernels._depthwise_kernel if kernel == "depthwise" else triton_kernels._matrix_kernel).fn
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(name),): value for name, value in constants.items()})
    code = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, **triton_kernels.OPTIONS}).asm["ptx"]
    assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in code or kernel == "depthwise"
    assert (".s32.s8.s8" in code) == (kernel != "depthwise")
    assert "mul.rn.f32" in code
    assert not re.search(r"fma\.rn[.a-z]*\.f32|div\.[a-z.]*f32", code)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_the_device(mode):
    """Inside CUDA graphs too. What the compiler makes of plain ops may contract them: there a byte may fall to the next one."""
    for int_mm in (False, True):
        net = Net(int_mm)
        layers = [module for module in net.modules() if isinstance(module, CudaIntegerLayer)]
        assert any(layer.int_mm for layer in layers) == int_mm
        net = net.cuda()
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, mode=mode)
        for batch in (4, 4, 4, 7, 1):
            want, got = net(images(batch).cuda()), compiled(images(batch).cuda()).clone()
            assert torch.equal(got, want) or (int_mm and (got - want).abs().mean() < 0.05 * want.abs().mean())


# What needs neither the interpreter nor a device.


@once
def test_packing_can_be_undone():
    for bits in (2, 4):
        for inputs in (1, 3, 8, 17):
            weight = make_layer(inputs, 6, kernel=(2, 3), bits=bits).weight
            packed, zeros = pack_weight(weight, bits)
            row = -(-inputs * bits // 8)
            assert packed.dtype == torch.uint8 and packed.shape == (6, 6 * row)
            planes = [(packed.view(6, 2, 3, row) >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
            codes = torch.cat(planes, -1)[..., :inputs].permute(0, 3, 1, 2)
            assert torch.equal(codes.to(torch.int8) - zeros[:, None, None, None], weight)


@once
def test_the_layout_of_packed_weights():
    weight = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.int8).view(1, 8, 1, 1)
    packed, zeros = pack_weight(weight, 2)
    assert zeros.tolist() == [0]
    # Byte 0: channels 0 2 4 6, lowest bits first; byte 1: channels 1 3 5 7.
    assert packed.tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]]


@once
def test_weights_that_do_not_fit():
    layer = make_layer(8, 4, bits=4)
    with pytest.raises(ConfigError, match=r"output channel \d has weights .* more than 2 bits hold"):
        CudaIntegerLayer(layer, weight_bits=2)
    with pytest.raises(ConfigError, match="weight_bits=3"):
        CudaIntegerLayer(layer, weight_bits=3)
    with pytest.raises(ConfigError, match="8 bits cannot be packed"):
        pack_weight(layer.weight, 8)
    assert weight_width(make_layer(8, 4, bits=8)) == 8
    # 0 belongs to every window: weights of 2..4 alone are a span of four steps, not of two.
    assert weight_width(replace(layer, weight=torch.full((4, 8, 3, 3), 4, dtype=torch.int8))) == 4


@once
@pytest.mark.parametrize("rows", [17, 40])
def test_int_mm_on_the_cpu(rows):
    """The route of plain ops needs no kernel."""
    layer = make_layer(16, 10, kernel=())
    codes = make_codes(layer, rows, 16)
    assert torch.equal(CudaIntegerLayer(layer)(codes), layer.reference(codes))


@once
def test_refusals_of_layers():
    layer = make_layer(8, 4)
    refused = {
        "3 dimensions": replace(layer, weight=layer.weight[..., 0]),
        "5 dimensions": replace(layer, weight=layer.weight[..., None]),
        "torch.int16, not int8": replace(layer, weight=layer.weight.short()),
        "do not divide into 3 groups": replace(layer, groups=3),
        "linear layer of 2 groups": replace(make_layer(8, 4, kernel=()), groups=2),
        "input runs over 0..300": replace(layer, input=Grid(0.1, 0, 0, 300)),
        "output runs over -1..255": replace(layer, output=Grid(0.1, 0, -1, 255)),
        "no byte that padding": replace(layer, input=Grid(0.1, 256)),
        "does not fit into 32 bits": replace(make_layer(8, 1, kernel=()), weight=torch.full((1, 70000), 127, dtype=torch.int8)),
    }
    for words, bad in refused.items():
        assert words in str(refusal(bad, "cuda"))
        with pytest.raises(ConfigError, match="no integer kernel computes this layer"):
            CudaIntegerLayer(bad)


@once
def test_refusals_of_devices(monkeypatch):
    layer = make_layer(8, 4)
    assert "this is cpu" in str(refusal(layer, "cpu")) or not HAS_TRITON
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if HAS_TRITON:
        assert "CUDA is not available" in str(CudaBackend().refusal(layer))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in str(refusal(layer, "cuda:0")) or not HAS_TRITON
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refusal(layer, "cuda") is None or not HAS_TRITON
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in str(refusal(layer, "cuda"))


@once
def test_inputs_that_cannot_be_meant():
    module = CudaIntegerLayer(make_layer(8, 4))
    with pytest.raises(ConfigError, match=r"torch.float32 of 4 dimensions"):
        module(torch.rand(1, 8, 5, 5))
    codes = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="2x2 are smaller than the kernel"):
        module(codes[:, :, :2, :2])
    with pytest.raises(ConfigError, match="the residual has shape"):
        module(codes, torch.zeros(1, 4, 5, 5))
    with pytest.raises(ConfigError, match="has no grid for its bytes"):
        module(codes, torch.zeros(1, 4, 3, 3, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="has a grid for its bytes"):
        CudaIntegerLayer(make_layer(8, 4), Grid(0.1, 0))(codes, torch.zeros(1, 4, 3, 3))
    with pytest.raises(ConfigError, match=r"before lowering"):
        CudaIntegerLayer(make_layer(8, 4)).half()(codes)
    if HAS_TRITON:
        with pytest.raises(ConfigError, match="the bytes are on cpu"):
            module(codes)


@once
def test_backend_builds():
    backend = CudaBackend(pack=True)
    for bits in (2, 4, 8):
        assert backend.build(make_layer(8, 4, bits=bits)).weight_bits == bits
    assert CudaBackend(int_mm=False).build(make_layer(8, 4, kernel=())).int_mm is False
    words = repr(backend.build(make_layer(8, 4, bits=2)))
    assert "8 -> 4 channels, 2 bits, 72 bytes, matrix" in words


@once
def test_triton_is_not_needed_to_import():
    code = """
import sys
sys.modules["triton"] = None
import torch
import fxquant.deploy.cuda as cuda
from fxquant.deploy.integers import Grid, IntegerLayer
layer = IntegerLayer(torch.ones(2, 3, 1, 1, dtype=torch.int8), torch.ones(2), None, Grid(1.0, 0), Grid(1.0, 0))
assert "not installed" in cuda.refusal(layer, "cuda")
codes = torch.ones(1, 3, 4, 4, dtype=torch.uint8)
assert cuda.CudaIntegerLayer(layer).to("meta")(codes.to("meta")).shape == (1, 2, 4, 4)
try:
    cuda.CudaIntegerLayer(layer)(codes)
except cuda.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["residual", "mobile", "squeeze_excite"])
def test_whole_networks_are_the_simulation(device, name, pack):
    """Through the pass that lowers, up to the rounding of what is summed in floats."""
    simulation = fxquant.quantize(nets.make(name), [nets.images(8)], 4, 4, False, recipe="fast", edges="integer", progress=False)
    lowering = LowerInteger(CudaBackend(device, pack=pack))
    lowered = Pipeline([lowering]).run(deep_copy(simulation).to(device))
    assert lowering.log.count >= 4
    x = nets.images(3)
    with torch.no_grad():
        wanted, got = simulation(x), lowered(x.to(device)).cpu()
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
