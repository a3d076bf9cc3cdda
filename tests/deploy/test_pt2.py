"""Files of torch.export: they come back with equal outputs for any batch size, and no file is left when anything fails.

And the comparison that all exports share: what it lets pass, and what not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, images, make
from torch import Tensor, nn

import fxquant
from fxquant.deploy import exported
from fxquant.deploy.exported import batches_of, compare, image_errors, rounding_errors
from fxquant.deploy.pt2 import export_pt2
from fxquant.errors import ExportError
from fxquant.quantizers import LogQuantizer, QuantSpec
from fxquant.tree import tensors_of


def quantize(net: nn.Module, w: int | None = 2, a: int | None = 2, dtype: torch.dtype = torch.float32) -> torch.fx.GraphModule:
    return fxquant.quantize(net, [images(16, dtype)], w, a, cat=False, recipe="fast", progress=False)


@pytest.fixture(scope="module")
def small() -> torch.fx.GraphModule:
    return quantize(make("chain"))


@pytest.mark.parametrize("name", NETS)
def test_there_and_back(tmp_path, name, untouched):
    quantized = quantize(make(name), 2, 3)
    with untouched(quantized):
        result = export_pt2(quantized, tmp_path / "a.pt2", images=images(4))
    assert result.size == (tmp_path / "a.pt2").stat().st_size
    assert result.opset is None and result.batches == (4, 1) and result.max_difference < 1e-5
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    for count in (1, 5):
        for got, wanted in zip(tensors_of(loaded(images(count))), tensors_of(quantized(images(count))), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt2"]


def test_bit_identical(tmp_path, small):
    result = export_pt2(small, str(tmp_path / "a.pt2"))
    assert result.max_difference == result.relative_error == 0
    assert result.agreement == 1
    assert str(result).endswith("bytes, differs by at most 0 (relative 0), same arg-max 100.00%; batches of 4 and 1 images")


def test_cat_and_double(tmp_path):
    net = make("chain").double()
    some = [images(16, torch.float64)]
    quantized = quantize(net, dtype=torch.float64)
    quantized = fxquant.append_cat(quantized, net, some, fit="kl", clusters=3, progress=False)
    export_pt2(quantized, tmp_path / "a.pt2", images=images(2))
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(some[0]), quantized(some[0]))


def test_classes_and_masks_beside_the_scores(tmp_path):
    class Head(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = super().forward(x)
            return y, y.argmax(1), y > 0

    quantized = quantize(Head(*make("chain")).eval(), 8, 8)
    assert export_pt2(quantized, tmp_path / "a.pt2", images=images(4)).max_difference < 1e-5


def test_wrapped(tmp_path, small):
    assert export_pt2(nn.DataParallel(small), tmp_path / "a.pt2").agreement == 1


# What goes wrong


@pytest.fixture
def path(tmp_path) -> Path:
    """A file that is there already, and must stay."""
    (tmp_path / "model.pt2").write_bytes(b"old")
    return tmp_path / "model.pt2"


def check_refused(quantized: Any, path: Path, match: str, error: type[Exception] = ExportError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        export_pt2(quantized, path, **options)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_not_quantized(path):
    check_refused(make("chain"), path, "carries no record of a quantization", fxquant.ModelError)


def test_other_images(small, path):
    check_refused(small, path, r"images is \[1, 3, 8, 8\]", fxquant.ConfigError, images=torch.zeros(1, 3, 8, 8))


def raising(*args: Any, **options: Any) -> None:
    raise RuntimeError("first line.\nsecond line")


def test_torch_export_refuses(small, path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", raising)
    check_refused(small, path, "is not captured by torch.export: first line. Write")


@pytest.mark.parametrize("name", ["save", "load"])
def test_it_does_not_come_back(small, path, monkeypatch, name):
    monkeypatch.setattr(torch.export, name, raising)
    check_refused(small, path, "does not come back from torch.export.save: first line. No file was written")


def test_it_computes_something_else(small, path, monkeypatch):
    other = torch.export.export(quantize(make("mobile"), 8, 8), (images(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    monkeypatch.setattr(torch.export, "load", lambda file: other)
    check_refused(small, path, r"computes other values: relative error [\d.]+ of an image. No file was written")


def test_missing_folder_and_full_disk(small, path, monkeypatch):
    with pytest.raises(ExportError, match="its folder is missing"):
        export_pt2(small, path.parent / "missing" / "a.pt2")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    check_refused(small, path, "cannot be written: .*No space left on device")


# The comparison


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def check(network: nn.Module, batch: Tensor, got: list[Tensor]) -> dict[str, Any]:
    return compare(Path("a.onnx"), network, [batch], [got])  # type: ignore[arg-type]


def test_other_shapes_and_values_that_are_not_finite():
    x = images(4)
    with pytest.raises(ExportError, match=r"a.onnx: gives shapes \[\[4, 5\]\] for 4 images, not \[\[4, 768\]\]"):
        check(Fixed(), x, [torch.zeros(4, 5)])
    bad = x.flatten(1).clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ExportError, match="gives values that are not finite"):
        check(Fixed(), x, [bad])


def test_ties_touch_some_images():
    """The median image counts: one image may be off, as after a tie, but not all."""
    x = images(5)
    got = x.flatten(1).clone()
    got[0] *= 1.5
    found = check(Fixed(), x, [got])
    assert found["agreement"] == 1 and found["max_difference"] > 1 and found["batches"] == (5,)
    quantized = quantize(make("chain"))
    with torch.no_grad():
        wanted = quantized(x)
    assert check(quantized, x, [wanted])["max_difference"] == 0
    with pytest.raises(ExportError, match="computes other values: relative error"):
        check(quantized, x, [1.02 * wanted])


def test_ties_that_explain_an_error(monkeypatch):
    """Where torch itself is as far off when inputs of quantizers move by a rounding error, so may a runtime be."""
    quantized, x = quantize(make("chain")), images(5)
    with torch.no_grad():
        wanted = quantized(x)
    assert rounding_errors(quantized, x, [wanted]).max() < 1e-2
    monkeypatch.setattr(exported, "ROUNDING", 0.1)
    own = rounding_errors(quantized, x, [wanted])
    assert own.max() > 1e-2
    assert check(quantized, x, [1.02 * wanted])["relative_error"] == pytest.approx(0.02, rel=1e-3)


def test_ties_of_a_logarithmic_grid():
    """Values between two powers, as a softmax may give them: each moves by a share of its own size, and 0 stays."""
    log = LogQuantizer(QuantSpec(4, symmetric=True), torch.tensor(1.0))
    graph = torch.fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("x"),)))
    network = torch.fx.GraphModule(nn.Sequential(log), graph)
    ties = torch.exp2(-0.5 - torch.arange(8.0)).repeat(3, 4)
    for x, moves in ((ties, True), (ties * 2**0.5, False), (torch.zeros(3, 4), False)):
        assert (rounding_errors(network, x, [network(x)]).max() > 0.01) == moves


def test_image_errors():
    a = torch.ones(3, 4)
    b = a.clone()
    b[1] += 0.5
    assert torch.allclose(image_errors([a, a], [a, b]), torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64))
    assert image_errors([], []).tolist() == [0]


def test_flat():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(value) for value in tensors_of({"x": a, "y": [b, (c,)], "z": None, "name": "text"})] == [1, 2, 3]


def test_batches(small):
    assert [len(batch) for batch in batches_of(small, None)] == [4, 1]
    assert [len(batch) for batch in batches_of(small, images(1))] == [2, 1]
    assert torch.equal(batches_of(small, None)[0], batches_of(small, None)[0])
    assert batches_of(small, images(2).double())[0].dtype == torch.float32
