"""ONNX files: the integers of the network and nothing more, equal outputs in onnxruntime as it comes, and no file when anything fails."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net, images, make, once_traced
from torch import Tensor, nn

import fxquant
from fxquant.deploy import exported as exported_module
from fxquant.deploy import onnx_export as module
from fxquant.deploy.exported import Exported
from fxquant.deploy.onnx_export import export_onnx
from fxquant.deploy.onnx_graph import Rewriter
from fxquant.errors import ExportError
from fxquant.graph import called, put_module
from fxquant.quantizers import LogQuantizer, QuantSpec, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.tree import tensors_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SYMMETRIC = fxquant.Recipe.FAST.replace(weight_symmetric=True, activation_symmetric=True)


def logarithmic(grid: str, **more: Any) -> fxquant.Recipe:
    return fxquant.Recipe.FAST.replace(softmax_quantizer=grid, **more)


def quantize(net: nn.Module, w: int | None = 2, a: int | None = 2, **options: Any) -> torch.fx.GraphModule:
    return fxquant.quantize(net, [images(16)], w, a, **{"cat": False, "recipe": "fast", "progress": False, "edges": "same", **options})


def run(path: Path, x: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"images": x.numpy()})]


@dataclass
class Case:
    quantized: torch.fx.GraphModule
    path: Path
    result: Exported
    clip: bool

    def __post_init__(self) -> None:
        self.model = onnx.load(self.path)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.counts = Counter(node.op_type for node in self.model.graph.node)
        self.layers = {str(node.target): m for node, m in called(self.quantized) if isinstance(m, QuantizedLayer)}
        self.activations = {str(node.target): m for node, m in called(self.quantized) if isinstance(m, UniformQuantizer)}


def with_cat() -> torch.fx.GraphModule:
    return fxquant.append_cat(
        quantize(once_traced("chain"), 2, 4), once_traced("chain"), [images(16)], fit="kl", clusters=3, progress=False
    )


CASES = {
    "two bits": (lambda: quantize(once_traced("residual"), 2, 2), False),
    "two bits, clip": (lambda: quantize(once_traced("residual"), 2, 2), True),
    "two and eight bits": (lambda: quantize(once_traced("chain"), 2, 8), False),
    "three bits, transposed": (lambda: quantize(once_traced("transposed"), 3, 3), False),
    "three bits, clip": (lambda: quantize(once_traced("mobile"), 3, 3), True),
    "four bits, depthwise": (lambda: quantize(once_traced("mobile"), 4, 4), False),
    "five and six bits": (lambda: quantize(once_traced("shuffle"), 5, 6), False),
    "eight bits": (lambda: quantize(once_traced("one_dimension"), 8, 8), False),
    "attention, two bits": (lambda: quantize(once_traced("attention"), 2, 2), False),
    "attention, four bits": (lambda: quantize(once_traced("attention"), 4, 4), False),
    "attention, weights only": (lambda: quantize(once_traced("attention"), 4, None), False),
    "attention, log2": (lambda: quantize(once_traced("attention"), 4, 4, recipe=logarithmic("log2")), False),
    "attention, logsqrt2, clip": (lambda: quantize(once_traced("attention"), 3, 3, recipe=logarithmic("logsqrt2")), True),
    "attention, log2, eight bits": (lambda: quantize(once_traced("attention"), 8, 8, recipe=logarithmic("log2")), False),
    "attention, a scale a head": (
        lambda: quantize(once_traced("attention"), 4, 3, recipe=logarithmic("logsqrt2", matmul_scales="head")),
        False,
    ),
    "activations only": (lambda: quantize(once_traced("linear_norm"), None, 4), False),
    "signed, two bits": (lambda: quantize(once_traced("chain"), 2, 2, recipe=SYMMETRIC), False),
    "signed, six bits": (lambda: quantize(once_traced("linear_norm"), 6, 6, recipe=SYMMETRIC), False),
    "float islands": (lambda: quantize(once_traced("norm_act"), 2, 2, edges="8bit", overrides={"2": {"w": None, "a": None}}), False),
    "cat": (with_cat, False),
    "several outputs": (lambda: quantize(once_traced("several_outputs"), 2, 2), False),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Return a function that gives a case by name; each is exported once."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            build, clip = CASES[name]
            quantized = build()
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            made[name] = Case(quantized, path, export_onnx(quantized, path, clip=clip, images=images(4)), clip)
        return made[name]

    return case


@pytest.fixture(params=CASES)
def case(request, cases) -> Case:
    return cases(request.param)


def type_of(spec: QuantSpec, clip: bool) -> tuple[int, int]:
    bits = 8 if clip or spec.bits > 4 else 4 if spec.bits > 2 else 2
    return onnx.TensorProto.DataType.Value(f"{'' if spec.signed else 'U'}INT{bits}"), bits


# What is in the file


def test_weights_are_packed_integers(case):
    dequantize = {node.input[0]: node for node in case.model.graph.node if node.op_type == "DequantizeLinear"}
    for name, layer in case.layers.items():
        quantizer = layer.weight_quantizer
        kind, bits = type_of(quantizer.spec, case.clip)
        node = dequantize[f"{name}.weight.codes"]
        codes, scale, zero = (case.initializers[tensor] for tensor in node.input)
        assert codes.data_type == zero.data_type == kind
        assert len(codes.raw_data) == -(-layer.weight.numel() * bits // 8)
        assert list(codes.dims) == list(layer.weight.shape)
        assert np.array_equal(onnx.numpy_helper.to_array(codes).astype(np.float32), layer.codes().numpy())
        assert np.array_equal(onnx.numpy_helper.to_array(zero).astype(np.float32), quantizer.zero_point.numpy())
        assert np.array_equal(onnx.numpy_helper.to_array(scale), quantizer.scale.numpy())
        assert [onnx.helper.get_attribute_value(attribute) for attribute in node.attribute] == [quantizer.spec.axis]


def test_no_float_weight_is_left(case):
    shapes = [list(tensor.dims) for tensor in case.initializers.values() if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not [name for name, layer in case.layers.items() if list(layer.weight.shape) in shapes]


def test_every_quantizer_is_there_once(case):
    assert case.counts["QuantizeLinear"] == len(case.activations)
    assert case.counts["DequantizeLinear"] == len(case.activations) + len(case.layers)
    types = {case.initializers[node.input[2]].data_type for node in case.model.graph.node if node.op_type == "QuantizeLinear"}
    assert types == {type_of(m.spec, case.clip)[0] for m in case.activations.values()}
    assert {node.domain for node in case.model.graph.node} == {""}
    assert [entry.domain for entry in case.model.opset_import] == [""]


def test_lowest_operator_set(case):
    specs = [m.spec for m in case.activations.values()] + [m.weight_quantizer.spec for m in case.layers.values()]
    wanted = {2: 25, 4: 21, 8: 18}[min(type_of(spec, case.clip)[1] for spec in specs)]
    assert case.model.opset_import[0].version == case.result.opset == wanted
    assert case.model.ir_version == {25: 13, 21: 10, 18: 8}[wanted]


def test_any_batch_size(case):
    for count in (1, 3, 5):
        x = images(count)
        with torch.no_grad():
            wanted = tensors_of(case.quantized(x))
        got = run(case.path, x)
        assert [value.shape for value in got] == [value.shape for value in wanted]
        in_integers = any(m.spec.bits == 8 for m in case.activations.values())
        assert exported_module.image_errors(wanted, got).median() < (1e-2 if in_integers else 1e-5)
    assert case.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_names(case):
    assert [value.name for value in case.model.graph.input] == ["images"]
    several = len(case.model.graph.output) > 1
    assert [value.name for value in case.model.graph.output] == (["output_0", "output_1", "output_2"] if several else ["logits"])


def test_nothing_of_where_it_was_made(case):
    content = case.path.read_bytes()
    assert b".py" not in content and b"torch" not in content
    assert case.model.producer_name == "fxquant"


def test_result(case):
    result = case.result
    assert result.size == case.path.stat().st_size == Path(result).stat().st_size
    assert result.batches == (4, 1)
    assert result.max_difference < 1e-3
    assert result.agreement in (1.0, None)
    assert str(result).startswith(f"{case.path}: {result.size:,} bytes, opset {result.opset}, differs by at most ")


def test_cat_is_part_of_the_graph(cases):
    case = cases("cat")
    assert case.counts["ArgMax"] == 1
    assert case.counts["Gather"] == 2


def test_clip_where_bits_do_not_fill_the_type(cases):
    wanted = sum(m.spec.bits < 8 for m in cases("three bits, clip").activations.values())
    assert wanted > 3
    own = [node for node in cases("three bits, clip").model.graph.node if node.output[0].endswith(".inside")]
    assert [node.op_type for node in own] == ["Clip"] * wanted
    assert cases("five and six bits").counts["Clip"] == len(cases("five and six bits").activations)
    assert cases("eight bits").counts["Clip"] == 0


def test_no_clip_that_a_runtime_refuses(cases):
    """ReLU6 in front of a quantizer of four bits: onnxruntime 1.31 stops at that pair."""
    case = cases("four bits, depthwise")
    assert case.counts["Clip"] == 0
    assert case.counts["Min"] == len(case.activations) + 5


def test_both_forms_compute_the_same(cases):
    plain, clipped = cases("two bits"), cases("two bits, clip")
    assert torch.allclose(run(plain.path, images(8))[0], run(clipped.path, images(8))[0], atol=1e-5)
    assert not any(tensor.data_type > onnx.TensorProto.INT64 for tensor in clipped.model.graph.initializer)


def test_bytes(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 144, 10)).eval()
    numel = sum(parameter.numel() for parameter in net.parameters() if parameter.ndim > 1)
    size = {w: export_onnx(quantize(net, w, 8), tmp_path / "a.onnx").size for w in (2, 4, 8)}
    clip = export_onnx(quantize(net, 2, 8), tmp_path / "a.onnx", clip=True).size
    assert abs((size[8] - size[4]) - numel / 2) < 500
    assert abs((size[4] - size[2]) - numel / 4) < 500
    assert abs(clip - size[8]) < 500
    assert size[2] < numel / 4 + 4000


def test_same_bytes_twice_and_network_untouched(tmp_path, untouched):
    quantized = quantize(make("chain"))
    with untouched(quantized):
        export_onnx(quantized, tmp_path / "a.onnx")
    export_onnx(quantized, str(tmp_path / "b.onnx"))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# Levels


def transparent(bits: int, signed: bool = False) -> torch.fx.GraphModule:
    """Return a network that is one quantizer, of zero-point 2^bits / 4, between two convolutions that change nothing."""
    quantized = quantize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)).eval(), None, bits)
    for _, layer in called(quantized):
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.copy_(torch.eye(3)[:, :, None, None])
            layer.bias.data.zero_()
        elif isinstance(layer, UniformQuantizer):
            layer.spec = QuantSpec(bits, signed=signed)
            layer.scale.fill_(0.25)
            layer.zero_point.fill_(2**bits // 4 if not signed else -1)
    return quantized


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("bits", "signed"), [(2, False), (2, True), (3, False), (4, True), (5, False), (7, True), (8, False)])
def test_levels_far_outside_the_range_and_at_ties(tmp_path, bits, signed, clip):
    """Exporters that only pick a wider type lose the clamp to the bits; values of every size come out as torch has them.

    At a tie QuantizeLinear takes the even step, and integer kernels, which the simulation follows, the even code: with an odd zero-point,
    the other one.
    """
    quantized = transparent(bits, signed)
    steps = torch.cat([torch.arange(-600, 601) / 2, 10.0 ** torch.arange(3, 21), -(10.0 ** torch.arange(3, 21)), torch.tensor([0.0])])
    x = torch.nn.functional.pad(steps * 0.25, (0, 2 * 768 - len(steps))).view(2, 3, 16, 16)
    result = export_onnx(quantized, tmp_path / "a.onnx", clip=clip, images=x)
    got, wanted = run(tmp_path / "a.onnx", x)[0], quantized(x).detach()
    tie = (x * 4 - 0.5 == (x * 4 - 0.5).round()) & (quantized(x + 1e-3) != quantized(x - 1e-3))
    assert torch.equal(got[~tie], wanted[~tie])
    assert torch.allclose((got - wanted)[tie].abs(), torch.tensor(0.25 if signed or bits == 2 else 0.0))
    assert got.unique().numel() == 2**bits
    assert result.max_difference in (0, 0.25)
    assert onnx.load(tmp_path / "a.onnx").graph.output[0].name == "output"


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("grid", ["log2", "logsqrt2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logarithmic_levels(tmp_path, bits, grid, axis):
    """Every level, what is between them, 0, and what is too small or too large for the grid."""
    quantized = transparent(4)
    (name,) = (str(node.target) for node, part in called(quantized) if isinstance(part, UniformQuantizer))
    scale = torch.tensor(0.7) if axis is None else torch.tensor([0.7, 0.83, 1.3])
    put_module(quantized, name, LogQuantizer(QuantSpec(bits, symmetric=True, axis=axis), scale, grid))
    powers = torch.exp2(-torch.arange(0, 126, 0.0625)[:2000])  # no tie is among them, shifted by the scale as they are
    values = torch.cat([powers, torch.tensor([0.0, 1.0, 2.0, 100.0])])
    x = torch.nn.functional.pad(values, (0, 3 * 768 - len(values))).view(1, 3, 1, -1)
    x = x.view(3, 3, 16, 16)
    result = export_onnx(quantized, tmp_path / "a.onnx", images=x)
    got = run(tmp_path / "a.onnx", x)[0]
    assert torch.equal(got, quantized(x))
    assert result.max_difference == 0
    assert result.opset == 18
    assert not {"QuantizeLinear", "Pow"} & {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}


def test_a_wrong_table_is_noticed(tmp_path, monkeypatch):
    real = Rewriter._float

    def wrong(self, name, value):
        return real(self, name, value.flip(0) if name.endswith(".table") else value)

    monkeypatch.setattr(Rewriter, "_float", wrong)
    with pytest.raises(ExportError, match=r"quantizer activations\.softmax\w* of the file gives other codes"):
        export_onnx(quantize(make("attention"), 4, 4, recipe=logarithmic("log2")), tmp_path / "a.onnx")


@pytest.mark.parametrize("clip", [False, True])
def test_a_lost_clip_is_noticed(tmp_path, monkeypatch, clip):
    monkeypatch.setattr(Rewriter, "_clip", lambda self, inputs, y, shielded: [onnx.helper.make_node("Identity", inputs[:1], [y])])
    x = 1000 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportError, match=r"quantizer activations\.\w+ of the file gives other codes at \d+ of 1536 places. No file"):
        export_onnx(transparent(3), tmp_path / "a.onnx", clip=clip, images=x)
    assert list(tmp_path.iterdir()) == []


def test_codes_at_ties_and_elsewhere():
    quantizer = UniformQuantizer(QuantSpec(2), torch.tensor(1.0), torch.tensor(1))
    x = torch.tensor([0.499, 0.501, 0.3, -5.0, 9.0])
    assert module._wrong_codes(quantizer, x, torch.tensor([1.0, 0.0, 0.0, -1.0, 2.0])) == 0
    assert module._wrong_codes(quantizer, x, torch.tensor([1.0, 0.0, 1.0, -1.0, 2.0])) == 1
    assert module._wrong_codes(quantizer, x, torch.tensor([1.0, 0.0, 0.0, -1.0, 1.0])) == 1
    assert module._wrong_codes(quantizer, x, torch.tensor([1.0, 0.0, 0.0, -4.0, 5.0])) == 2
    assert module._wrong_codes(quantizer, x, torch.tensor([0.0])) == 5


# What goes wrong


@pytest.fixture(scope="module")
def small() -> torch.fx.GraphModule:
    return quantize(make("chain"))


@pytest.fixture
def path(tmp_path) -> Path:
    """A file that is there already, and must stay."""
    (tmp_path / "model.onnx").write_bytes(b"old")
    return tmp_path / "model.onnx"


def check_refused(quantized: Any, path: Path, match: str, error: type[Exception] = ExportError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        export_onnx(quantized, path, **options)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_extra_missing(small, path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    check_refused(small, path, rf'{name} cannot be imported .*pip install "fxquant\[onnx\]"')


def test_imported_late():
    for file in ("onnx_export", "onnx_graph", "exported"):
        tree = ast.parse(Path(module.__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not [name for name in names if name.startswith("onnx")]


def test_old_onnx(small, path, monkeypatch):
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 24)
    check_refused(small, path, r"onnx [\d.]+ has no operator set 25. Upgrade onnx, or use clip=True")


def test_old_onnxruntime(small, path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 13, max supported IR version: 10\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.0")
    check_refused(
        small, path, r"onnxruntime 1.20.0 does not take 2-bit .*version: 10. Upgrade onnxruntime \(1.31 takes them\), or use clip"
    )
    check_refused(small, path, r"does not take 8-bit integers of operator set 18: .*version: 10. Upgrade onnxruntime.$", clip=True)


def test_a_run_that_fails(small, path, monkeypatch):
    class Session:
        def __init__(self, *args, **options): ...

        def run(self, *args):
            raise RuntimeError("Got invalid dimensions for input: images")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    check_refused(small, path, "does not run in onnxruntime with 4 images: Got invalid dimensions for input: images. No file was written")


def test_a_file_that_onnx_refuses(small, path, monkeypatch):
    monkeypatch.setattr(Rewriter, "_clip", lambda self, inputs, y, shielded: [])
    check_refused(small, path, r"onnx [\d.]+ refuses the file: .*No file was written")


def test_other_weights_are_noticed(small, path, monkeypatch):
    monkeypatch.setattr(QuantizedLayer, "codes", lambda self: self.weight_quantizer.quantize(self.weight).flip(0))
    check_refused(small, path, "gives other codes at|computes other outputs from equal codes")


def test_a_runtime_that_computes_other_values(small, path, monkeypatch):
    real = module._session

    class Noisy:
        def __init__(self, *args):
            self.session = real(*args)

        def run(self, *args):
            return [1.05 * value for value in self.session.run(*args)]

    monkeypatch.setattr(module, "_session", lambda *args, optimize=True: Noisy(*args) if optimize else real(*args, optimize))
    check_refused(small, path, "computes other values: relative error 0.05")


def test_real_images(path):
    """An untrained network, calibrated on handwritten digits and compared on others: the classes have to be the same."""
    from fxquant.demo import DigitNet, load_digits

    pytest.importorskip("sklearn")
    digits = load_digits()
    train, test = digits.train[:64], digits.test[:32]
    qmodel = fxquant.quantize(DigitNet().eval(), [train], 4, 4, recipe="fast", progress=False)
    result = export_onnx(qmodel, path, images=test)
    assert result.agreement == 1.0


def test_not_quantized(path):
    match = "carries no record of a quantization. Pass what fxquant.quantize or fxquant.load returned"
    for other in (make("chain"), nn.Linear(2, 2), "model"):
        check_refused(other, path, match, fxquant.ModelError)


def test_an_op_without_onnx_form(path):
    net = Net(lambda s, x: s.fc(torch.special.bessel_j0(s.conv(x)).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 5)).eval()
    check_refused(
        quantize(net), path, r"model.onnx: has no ONNX form: node bessel_j0 \(torch.ops.prims.bessel_j0.default\): No ONNX function"
    )


def test_torch_export_refuses(small, path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("Constraints violated (batch)!\nlong explanation")

    monkeypatch.setattr(torch.export, "export", refuse)
    check_refused(small, path, r"is not captured by torch.export: Constraints violated \(batch\)!\. Write")


def test_old_onnxscript(small, path, monkeypatch):
    import onnxscript.version_converter

    monkeypatch.setattr(onnxscript.version_converter, "convert_version", lambda model, version, **options: None)
    check_refused(small, path, "onnxscript gives operator set 18 instead of 25. Upgrade onnxscript")


def test_double(path):
    quantized = quantize(make("chain").double())
    check_refused(quantized, path, r"is torch.float64, and QuantizeLinear takes float32. Give qmodel.float\(\)")
    assert export_onnx(quantized.float(), path).agreement == 1


@pytest.mark.parametrize("other", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 16, 16), torch.zeros(0, 3, 16, 16), [1], "images"])
def test_other_images(small, path, other):
    check_refused(small, path, r"images is .*, the network was calibrated with \[N, 3, 16, 16\]", fxquant.ConfigError, images=other)


def test_folders(small, tmp_path):
    with pytest.raises(ExportError, match=r"missing/a.onnx: its folder is missing. Make .*missing first"):
        export_onnx(small, tmp_path / "missing" / "a.onnx")
    with pytest.raises(ExportError, match=r"is a folder. Name a file in it"):
        export_onnx(small, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_while_writing_keeps_the_old_file(small, path, monkeypatch, broken):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    check_refused(small, path, r"cannot be written: .*No space left on device. Check the folder", images=images(1))


@pytest.mark.slow
@pytest.mark.parametrize(("w", "a"), [(2, 2), (4, 4), (8, 8)])
def test_resnet18(tmp_path, w, a):
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    batch = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    quantized = fxquant.quantize(net, [batch], w, a, cat=False, recipe="fast", progress=False)
    assert export_onnx(quantized, tmp_path / "a.onnx", images=batch[:4]).size < 11.7e6 * w / 8 * 1.2 + 5e5
