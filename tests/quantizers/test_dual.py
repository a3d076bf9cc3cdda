"""Two grids an output: which columns, what they stand for, and the way from the recipe through a file, a compiler and ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Recipe
from fxquant.coverage import count_multiply_adds, count_work
from fxquant.errors import ConfigError
from fxquant.quantizers import DualQuantizer, QuantSpec, UniformQuantizer
from fxquant.quantizers.dual import outlier_columns
from fxquant.quantizers.layers import QuantizedLayer, QuantizedLinear
from fxquant.record import stored_bytes

DUAL = Recipe.ERQ.replace(name="dual", weight_groups="dual")


def weight(outputs: int = 40, inputs: int = 12) -> Tensor:
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    w[:, [3, 8]] *= 10
    return w


def quantizer(bits: int = 3, dtype: torch.dtype = torch.float32) -> DualQuantizer:
    w, outlier = weight(), torch.zeros(12, dtype=torch.bool)
    outlier[[3, 8]] = True
    low, high = (torch.stack([f(w[:, c], 1) for c in (~outlier, outlier)], 1) for f in (torch.amin, torch.amax))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return DualQuantizer(QuantSpec(bits, axis=0), scale.to(dtype), (-low / scale).round().to(dtype), outlier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_either_group_is_a_quantizer_of_its_own(bits, dtype):
    q, w = quantizer(bits, dtype), weight().to(dtype)
    for group, columns in enumerate((~q.outlier, q.outlier)):
        alone = UniformQuantizer(q.spec, q.scale[:, group], q.zero_point[:, group])
        assert torch.equal(q(w)[:, columns], alone(w[:, columns]))
        assert torch.equal(q.quantize(w)[:, columns], alone.quantize(w[:, columns]))
    assert torch.equal(q(q(w)), q(w))
    assert torch.equal(q.dequantize(q.quantize(w)), q(w))


def test_better_than_one_grid_where_columns_differ():
    w = weight()
    one = fxquant.quantizers.weight_quantizer(w, QuantSpec(3, axis=0))
    assert (quantizer()(w) - w).norm() < 0.7 * (one(w) - w).norm()


def test_outlier_columns():
    """By hand: the tails of each row, counted, the most flagged first."""
    w = weight(60, 200)
    flags = torch.zeros(200)
    for row in w:
        high, low = row[row > 0].quantile(0.99), row[row < 0].quantile(0.01)
        flags += (row > high) | (row < low)
    wanted = flags.argsort(descending=True, stable=True)[:3]
    found = outlier_columns(w)
    assert found.nonzero().flatten().tolist() == sorted(wanted.tolist())
    assert found[[3, 8]].all()


@pytest.mark.parametrize(("shape", "count"), [((5, 12), 1), ((40, 12), 2), ((400, 12), 6), ((3, 2), 1)])
def test_at_least_one_column_and_at_most_half(shape, count):
    assert int(outlier_columns(torch.randn(shape)).sum()) == count


def test_rows_of_one_sign_and_zeros():
    assert int(outlier_columns(torch.zeros(40, 12)).sum()) == 2
    assert int(outlier_columns(weight().abs()).sum()) == 2


@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen(step, bias):
    """The sums of both groups, each in integers, are those of the weight."""
    layer = nn.Linear(12, 40, bias)
    layer.weight.data = weight()
    quantized = QuantizedLayer.of(layer, quantizer())
    frozen = quantized.freeze(None if step is None else torch.tensor(step))
    assert isinstance(frozen, QuantizedLinear)
    assert torch.equal(frozen.weight, frozen.weight.round())
    assert torch.equal(frozen.used_weight(), quantized.used_weight())
    assert torch.equal(frozen.codes(), quantized.codes())
    x = torch.randn(5, 7, 12)
    x = x if step is None else (x / step).round() * step
    torch.testing.assert_close(frozen(x), quantized(x), rtol=1e-4, atol=1e-5)
    assert stored_bytes(frozen) == 40 * 12 * 3 // 8 + 40 * 2 * 5 + 12 + (160 if bias else 0)


def test_each_input_is_multiplied_once():
    frozen = QuantizedLayer.of(nn.Linear(12, 40), quantizer()).freeze()
    plain, outliers = frozen.weight_quantizer.columns()
    assert outliers.tolist() == [3, 8]
    assert plain.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert count_multiply_adds(frozen, torch.randn(1, 12)) == 40 * 12
    assert [key for key, _ in frozen.weight_quantizer.named_buffers()] == ["scale", "zero_point", "outlier"]  # what a file holds


@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_integers_are_scaled_and_added(bias):
    """To the bit what the formula says: each group on its own, with the columns of the other zero."""
    torch.manual_seed(0)
    frozen = QuantizedLayer.of(nn.Linear(12, 40, bias), quantizer()).freeze(torch.tensor(0.25))
    integers, q = torch.randint(-127, 128, (5, 7, 12)).float(), frozen.weight_quantizer
    sums = [integers.masked_fill(mask, 0) @ frozen.weight.T for mask in (q.outlier, ~q.outlier)]
    wanted = sums[0] * 0.25 * q.scale[:, 0] + sums[1] * 0.25 * q.scale[:, 1]
    wanted = wanted + frozen.bias if bias else wanted
    assert torch.equal(frozen(integers / 4), wanted)
    assert torch.equal(frozen.from_sums(*sums), wanted)
    with pytest.raises(ValueError, match="zip"):
        frozen.from_sums(sums[0] + sums[1])


@pytest.mark.parametrize("freeze", [True, False])
def test_scaled(freeze):
    """A gain an output goes into both of its scales; which columns are apart stays."""
    layer = nn.Linear(12, 40).double()
    layer.weight.data = weight().double()
    quantized = QuantizedLayer.of(layer, quantizer(dtype=torch.float64))
    quantized = quantized.freeze() if freeze else quantized
    gain, shift = torch.linspace(0.5, 2, 40, dtype=torch.float64), torch.linspace(-1, 1, 40, dtype=torch.float64)
    scaled, x = quantized.scaled(gain, shift), torch.randn(5, 12, dtype=torch.float64)
    assert isinstance(scaled.weight_quantizer, DualQuantizer)
    assert torch.equal(scaled.weight_quantizer.outlier, quantized.weight_quantizer.outlier)
    assert torch.equal(scaled.codes(), quantized.codes())
    torch.testing.assert_close(scaled(x), gain * quantized(x) + shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("axis", "shape", "outlier"),
    [
        (None, (4, 2), torch.ones(3, dtype=torch.bool)),
        (0, (4,), torch.ones(3, dtype=torch.bool)),
        (0, (4, 3), torch.ones(3, dtype=torch.bool)),
        (0, (4, 2), torch.ones(3)),
        (0, (4, 2), torch.ones(3, 1, dtype=torch.bool)),
    ],
)
def test_what_cannot_be_meant(axis, shape, outlier):
    with pytest.raises(ConfigError, match=r"are no two grids an output|outlier is torch"):
        DualQuantizer(QuantSpec(4, axis=axis), torch.ones(shape), torch.zeros(shape), outlier)


# The recipe


class Transformer(nn.Module):
    """Patches, a norm that two layers read and one that one reads, and a classifier behind a norm and a pool, in either order."""

    def __init__(self, pool: bool = True):
        super().__init__()
        self.pool = pool
        torch.manual_seed(0)
        self.patch, self.norm1, self.norm2, self.norm3 = nn.Conv2d(3, 24, 2, 2), nn.LayerNorm(24), nn.LayerNorm(24), nn.LayerNorm(24)
        self.q, self.kv, self.proj = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)
        self.fc1, self.fc2, self.head = nn.Linear(24, 60), nn.Linear(60, 24), nn.Linear(24, 5)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.uniform_(norm.weight, 0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        k, v = self.kv(y).chunk(2, -1)
        x = x + self.proj((self.q(y) @ k.transpose(1, 2) / 24**0.5).softmax(-1) @ v)
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x).mean(1)) if self.pool else self.head(self.norm3(x.mean(1)))


NAMES = ("q", "kv", "fc1")
"""The layers that read a reparameterized norm."""


@pytest.fixture(scope="module")
def calibration() -> list[Tensor]:
    return [torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def qmodel(calibration) -> torch.fx.GraphModule:
    return fxquant.quantize(Transformer().eval(), calibration, 3, 4, recipe=DUAL, cat=False, progress=False)


def test_layers_behind_reparameterized_norms(qmodel):
    found = {name: type(layer.weight_quantizer) for name, layer in qmodel.named_modules() if isinstance(layer, QuantizedLayer)}
    assert len(found) == 7
    assert {name for name, kind in found.items() if kind is DualQuantizer} == set(NAMES)
    assert qmodel.fc1.weight_quantizer.outlier.sum() == 3
    assert "twice: 3 of 24 columns apart" in str(qmodel)


def test_bytes_in_the_report(qmodel, calibration):
    one = fxquant.quantize(Transformer().eval(), calibration, 3, 4, recipe="erq", cat=False, progress=False)
    rows = [{row.name: row.bytes for row in fxquant.report(network).record.layers} for network in (qmodel, one)]
    assert {name: rows[0][name] - rows[1][name] for name in rows[0] if rows[0][name] != rows[1][name]} == {
        "q": 24 * 5 + 24,
        "kv": 48 * 5 + 24,
        "fc1": 60 * 5 + 24,
    }


def test_through_a_file(qmodel, calibration, tmp_path):
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    again = fxquant.load(tmp_path / "q.safetensors", Transformer())
    assert torch.equal(again(calibration[0]), qmodel(calibration[0]))
    assert isinstance(again.kv.weight_quantizer, DualQuantizer)
    assert fxquant.report(again).to_dict() == fxquant.report(qmodel).to_dict()


@pytest.mark.slow
def test_compiles(qmodel, calibration):
    torch.testing.assert_close(torch.compile(qmodel, fullgraph=True)(calibration[0]), qmodel(calibration[0]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("clip", [False, True])
def test_onnx(qmodel, calibration, tmp_path, clip):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = fxquant.export_onnx(qmodel, tmp_path / "q.onnx", clip=clip, images=calibration[0])
    assert result.relative_error < 0.02
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert len(tensors["kv.weight.codes"].raw_data) == 48 * 24 // (1 if clip else 2)
    floats = [list(tensor.dims) for tensor in tensors.values() if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not [dims for dims in floats if sorted(dims) in ([24, 48], [24, 24], [24, 60])]


def test_lowering_names_it(qmodel, calibration):
    from fxquant.deploy import cpu

    if cpu.unavailable() is not None:
        pytest.skip(str(cpu.unavailable()))
    lowered = fxquant.lower(qmodel)
    skipped = dict(fxquant.report(lowered).record.passes[-1].skipped)
    assert all("its weight has two grids an output" in skipped[name] for name in NAMES)
    torch.testing.assert_close(lowered(calibration[0]), qmodel(calibration[0]), rtol=0.05, atol=0.05)


def test_multiply_adds_are_those_of_one_grid(qmodel, calibration):
    one = fxquant.quantize(Transformer().eval(), calibration, 3, 4, recipe="erq", cat=False, progress=False)
    assert count_work(qmodel, calibration[0][:1]) == count_work(one, calibration[0][:1])


def test_one_cluster_folds_into_a_classifier_with_two_grids(calibration, tmp_path):
    recipe = DUAL.replace(stages=(*DUAL.stages, "cat"), cat_clusters=1)
    net = Transformer(pool=False).eval()
    qmodel = fxquant.quantize(net, calibration, 3, 4, "paper", recipe=recipe, edges="same", progress=False)
    assert isinstance(qmodel.head.weight_quantizer, DualQuantizer)
    assert any("folded into head" in note for log in fxquant.report(qmodel).record.passes for note in log.notes)
    plain = fxquant.quantize(net, calibration, 3, 4, False, recipe=recipe, edges="same", progress=False)
    assert torch.equal(qmodel.head.codes(), plain.head.codes())
    gain = qmodel.head.weight_quantizer.scale / plain.head.weight_quantizer.scale
    torch.testing.assert_close(gain[:, 0], gain[:, 1])
    fxquant.save(qmodel, tmp_path / "q.safetensors")
    assert torch.equal(fxquant.load(tmp_path / "q.safetensors", net)(calibration[0]), qmodel(calibration[0]))


def test_eight_bits_have_one(calibration):
    qmodel = fxquant.quantize(Transformer().eval(), calibration, 8, 8, recipe=DUAL, cat=False, progress=False)
    assert not [part for part in qmodel.modules() if isinstance(part, DualQuantizer)]


@pytest.mark.parametrize("stage", ["units", "scales", "output_kl", "finish"])
def test_no_learning(stage):
    with pytest.raises(ConfigError, match=f"'dual' grids cannot be learned, as the stage '{stage}' would"):
        DUAL.replace(stages=("reparameterize", "ranges", "erq", stage))
