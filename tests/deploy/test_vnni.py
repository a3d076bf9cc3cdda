"""Kernels of fxquant's own for one image: every way through them gives the bytes of the reference, in eager mode and from compiled code."""

from __future__ import annotations

import pytest
import torch
from integer_layers import OUTPUTS, random_bytes, random_layer
from nets import images as small_images
from nets import make
from torch import Tensor

import fxquant
from fxquant.deploy import cpu, native, vnni
from fxquant.deploy.integers import Grid, IntegerLayer, overflow

needs_kernels = pytest.mark.skipif(cpu.unavailable() is not None or vnni.unavailable() is not None, reason=str(vnni.unavailable()))


def assert_same(layer: IntegerLayer, codes: Tensor, residual: tuple[Grid, Tensor] | None = None) -> None:
    grid, added = residual or (None, None)
    product = vnni.VnniProduct(layer, grid)
    expected = layer.reference(codes, None if grid is None else grid.dequantize(added))
    got = product(codes) if added is None else product(codes, added)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert got.stride() == torch.empty_like(expected, memory_format=torch.channels_last if got.ndim == 4 else None).stride()


@needs_kernels
@pytest.mark.parametrize("output", [None, OUTPUTS[2], OUTPUTS[4]])
@pytest.mark.parametrize("outputs", [1, 16, 17, 33, 50, 64, 65, 128, 200])
def test_dense_layers_of_any_width(outputs, output):
    """One vector of 16 outputs, two, three and four, several panels of four, and what is left; as many pixels as no tile divides."""
    for side in (1, 2, 3, 5, 7):
        layer = random_layer(outputs, outputs, 8, 3, input=Grid(0.05, 13), output=output, padding=(1, 1))
        codes = random_bytes(side, 1, 8, side, side, grid=layer.input)
        assert_same(layer, codes)
        if output is not None:
            grid = Grid(3 / 8, 4)
            assert_same(layer, codes, (grid, random_bytes(9, 1, outputs, side, side, grid=grid)))


@needs_kernels
@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (5, 5), (2, 7)])
@pytest.mark.parametrize("geometry", [((1, 1), (0, 0), (1, 1)), ((2, 1), (2, 3), (1, 2)), ((3, 2), (1, 0), (2, 1))])
@pytest.mark.parametrize(("inputs", "groups"), [(3, 1), (8, 1), (16, 2), (24, 24), (80, 80), (100, 100)])
def test_kernels_of_any_form(inputs, groups, geometry, kernel):
    """Heights and widths that differ, more padding than the kernel reaches over, dilation, groups; four, two and one neighbors a block."""
    stride, padding, dilation = geometry
    layer = random_layer(3, 2 * inputs if groups < inputs else inputs, inputs, 1, groups, input=Grid(0.05, 200))
    weight = torch.randint(-128, 128, (len(layer.weight), inputs // groups, *kernel), generator=torch.Generator().manual_seed(1))
    form = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = IntegerLayer(weight.to(torch.int8), layer.scale, layer.bias, layer.input, OUTPUTS[4], **form)
    if vnni.refusal(layer) is not None:
        assert inputs == 3
        assert dilation[1] > 1
        return
    for size in ((11, 17), (13, 12)):
        assert_same(layer, random_bytes(2, 2, inputs, *size, grid=layer.input))


@needs_kernels
def test_the_largest_sums():
    """Of as many inputs as 32 bits can add up: with a zero-point the sum is far from where it starts and from where it ends."""
    for weight in (torch.full((16, 66_304), 127, dtype=torch.int8), torch.full((16, 65_792), -128, dtype=torch.int8)):
        for zero_point in (0, 100, 255):
            layer = IntegerLayer(weight, torch.full((16,), 2.0**-22), None, Grid(1.0, zero_point), Grid(4.0, 128))
            assert overflow(layer) is None
            for byte in (0, 255):
                codes = torch.full((1, weight.shape[1]), byte, dtype=torch.uint8)
                assert torch.equal(vnni.VnniProduct(layer)(codes), layer.reference(codes))


@needs_kernels
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (1, 5, 32), (2, 3, 4, 32)])
def test_rows(shape):
    layer = random_layer(0, 70, 32, 1, input=Grid(0.05, 9), output=OUTPUTS[4])
    layer = IntegerLayer(layer.weight.flatten(1), layer.scale, layer.bias, layer.input, layer.output)
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(vnni.VnniProduct(layer)(codes), layer.reference(codes))


@needs_kernels
def test_groups_of_several_panels():
    layer = random_layer(5, 200, 16, 3, 2, input=Grid(0.05, 3), output=OUTPUTS[4], padding=(1, 1))
    assert_same(layer, random_bytes(1, 1, 16, 9, 9, grid=layer.input))


@needs_kernels
@pytest.mark.parametrize("groups", [1, 40])
def test_no_images(groups):
    layer = random_layer(5, 40, 40, 3, groups, input=Grid(0.05, 3), output=OUTPUTS[4])
    assert vnni.VnniProduct(layer)(torch.empty((0, 40, 9, 9), dtype=torch.uint8)).shape == (0, 40, 7, 7)


@needs_kernels
@pytest.mark.parametrize("groups", [1, 40])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_images_in_another_memory_order_and_threads(groups, threads):
    """As many threads as torch has, each with a part that is not a multiple of a tile."""
    layer = random_layer(7, 40, 40, 3, groups, input=Grid(0.05, 3), output=OUTPUTS[2], padding=(1, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same(layer, random_bytes(1, 2, 40, 30, 31, grid=layer.input).contiguous())
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_what_is_no_input():
    """Pointers say nothing of what they point to, so it is checked before."""
    product = vnni.VnniProduct(random_layer(7, 16, 8, 3, input=Grid(0.05, 3), output=OUTPUTS[2]), Grid(0.5, 0))
    codes = random_bytes(1, 1, 8, 6, 6, grid=Grid(1.0, 0))
    for wrong, reason in (
        ((codes.float(),), "cannot read float32"),
        ((codes[:, :4],), "8 input channels cannot read bytes of shape"),
        ((codes[:, :, :2],), "a map of 2 x 6 is smaller than the kernel"),
        ((codes, codes), "cannot be added to"),
        ((codes, torch.zeros(1, 16, 4, 4)), "cannot be added to"),
    ):
        with pytest.raises(ValueError, match=reason):
            product(*wrong)
    with pytest.raises(ValueError, match="cannot read uint8, int8, int32, float16, float16"):
        product.half()(codes)


@needs_kernels
def test_what_torch_asks_of_an_operator():
    """And torch.compile takes it without fxquant.compile, too, through Python."""
    layer = random_layer(7, 16, 8, 3, input=Grid(0.05, 3), output=OUTPUTS[2])
    product, codes = vnni.VnniProduct(layer), random_bytes(1, 1, 8, 6, 6, grid=layer.input)
    given = (codes, product.packed, product.start, product.scale, product.bias, None, product.geometry, product.grids)
    torch.library.opcheck(vnni.vnni_layer, given)
    assert torch.equal(torch.compile(product, fullgraph=True)(codes), layer.reference(codes))


@pytest.mark.parametrize(
    ("layer", "residual", "reason"),
    [
        (random_layer(0, 8, 8, 3, 8, input=Grid(1.0, 0)), None, "depthwise layers give bytes"),
        (random_layer(0, 8, 8, 3, 8, input=Grid(1.0, 0), output=Grid(1.0, 0)), Grid(1.0, 0), "without a residual"),
        (random_layer(0, 8, 6, 3, 2, input=Grid(1.0, 0)), None, "3 input channels come in no fours"),
        (random_layer(0, 8, 3, 3, input=Grid(1.0, 0), dilation=(1, 2)), None, "3 input channels come in no fours"),
    ],
)
def test_what_runs_on_onednn(layer, residual, reason):
    assert reason in str(vnni.refusal(layer, residual))
    if cpu.unavailable() is None and residual is None:
        assert cpu.CpuIntegerLayer(layer, residual).single is None


@pytest.fixture
def simulation(images):
    return fxquant.quantize(make("mobile"), images, 8, 8, False, recipe="fast", edges="integer", progress=False)


@pytest.fixture
def images():
    return [small_images(8), small_images(8)]


@needs_kernels
def test_compiled_code_calls_them_itself(simulation, monkeypatch):
    """Without Python in between, for one image; all layers but the classifier, of 6 channels."""
    lowered = fxquant.lower(simulation)
    layers = [module for module in lowered.modules() if isinstance(module, cpu.CpuIntegerLayer)]
    assert [layer.single is not None for layer in layers] == [*[True] * 7, False]
    compiled, x = fxquant.compile(lowered), small_images(1)
    expected, several = lowered(x), lowered(small_images(5))
    assert torch.equal(compiled(x), expected)

    def fail(*_):
        raise AssertionError("called from Python")

    monkeypatch.setattr(native, "library", fail)
    with pytest.raises(AssertionError, match="called from Python"):
        lowered(x)
    assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(compiled(small_images(5)), several, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_layers_run_on_onednn(simulation, monkeypatch, tmp_path):
    if cpu.unavailable() is not None:
        pytest.skip(str(cpu.unavailable()))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(native, "_inductor", lambda: ("false -x", str(tmp_path)))
    native.library.cache_clear()
    vnni._not_built.cache_clear()
    try:
        assert "cannot build vnni.cpp" in str(vnni.unavailable())
        lowered = fxquant.lower(simulation)
    finally:
        native.library.cache_clear()
        vnni._not_built.cache_clear()
    assert all(module.single is None for module in lowered.modules() if isinstance(module, cpu.CpuIntegerLayer))
    x = small_images(2)
    assert torch.equal(lowered(x[:1]), lowered(x)[:1])
    assert "cannot build vnni.cpp" in str(fxquant.report(lowered))
    assert not list((tmp_path / "fxquant").iterdir()), "nothing half-written stays"


def test_other_machines(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert "ONEDNN_MAX_CPU_ISA" in str(vnni.unavailable())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, "amx_int8": True})
    assert "AMX" in str(vnni.unavailable())
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "no AVX-512 VNNI" in str(vnni.unavailable())
    monkeypatch.setattr("sys.platform", "win32")
    assert "win32" in str(vnni.unavailable())
