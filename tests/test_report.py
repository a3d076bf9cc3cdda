"""The report: complete, readable in a narrow terminal, and data."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxquant
from fxquant import metrics
from fxquant.metrics import sqnr
from fxquant.record import Record


class Computed(nn.Module):
    """One layer whose weight depends on the image, which stays float, and a batch norm that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.scaled = nn.Conv2d(8, 8, 3)
        self.a_classifier_with_a_rather_long_name = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(x) + x)
        x = F.conv2d(x, self.scaled.weight / x.std())
        return self.a_classifier_with_a_rather_long_name(x.mean((2, 3)))


@pytest.fixture
def quantized(images):
    torch.manual_seed(0)
    return fxquant.quantize(Computed().eval(), images, recipe="fast", progress=False, overrides={"stem": {"w": None}})


def test_every_layer_with_its_bits(net, images):
    text = str(fxquant.report(fxquant.quantize(net, images, 3, 5, recipe="fast", progress=False)))
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in text.splitlines() if "│" in line}
    assert rows["conv1"][:4] == ["conv", "first", "8", "float"]
    assert rows["blocks.0.0.0"][:4] == ["conv", "", "3", "5"]
    assert rows["blocks.0.2.0"][:4] == ["conv", "", "3", "5"]
    assert rows["fc"][:4] == ["linear", "last", "8", "8"]


def test_refusals_with_their_reasons(quantized):
    text = " ".join(str(fxquant.report(quantized)).split())
    assert "its weight is computed" in text
    assert "norm: " in text
    assert "stem: its weight stays float, as planned" in text


def test_what_was_asked(quantized):
    text = str(fxquant.report(quantized))
    assert "8bit: first and last weights and the last layer's input at 8 bits" in text
    assert "fast, seed 0, 64 calibration images" in text
    for log in fxquant.report(quantized).record.passes:
        assert log.name in text


def test_the_choice_of_cat(net, images):
    texts = [str(fxquant.report(fxquant.quantize(net, images, cat=cat, recipe="fast", progress=False))) for cat in (False, "paper")]
    assert "cat     none: not asked for" in texts[0]
    assert "cat     moments, K=64, PCA 50, alpha=0.4: KL " in texts[1]
    assert "on the images it was fitted on (4 shifted views)" in texts[1]


def test_signal_to_noise_is_that_of_the_tensors(net, images):
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    rows = {row.name: row for row in fxquant.report(quantized).record.layers}
    with torch.no_grad():
        expected = sqnr(net(torch.cat(images)[:32]), quantized(torch.cat(images)[:32]))
    assert rows["fc"].output_sqnr == pytest.approx(expected, abs=0.01)
    assert rows["fc"].weight_sqnr > 45  # 6 dB a bit, whatever gain the correction of the outputs put on a channel
    assert rows["fc"].weight_sqnr > rows["blocks.0.0.0"].weight_sqnr + 20
    assert (rows["fc"].bytes, rows["fc"].float_bytes) == (80 + 10 * 5 + 40, 4 * 90)


def test_signal_to_noise_of_large_tensors_is_summed_in_blocks(monkeypatch):
    x, y = torch.randn(5, 7, 3).transpose(0, 1), torch.randn(5, 7, 3).transpose(0, 1)
    expected = 10 * math.log10(x.double().square().sum() / (x.double() - y.double()).square().sum())
    for block in (1, 4, 105, 1000):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert sqnr(x, y) == pytest.approx(expected, rel=1e-12)


def test_signal_to_noise_of_a_weight(net, images):
    quantized = fxquant.quantize(net, images, 4, 8, cat=False, edges="same", recipe=fxquant.Recipe(stages=("ranges",)), progress=False)
    expected = sqnr(net.fc.weight.detach(), quantized.fc.used_weight())
    assert {row.name: row for row in fxquant.report(quantized).record.layers}["fc"].weight_sqnr == pytest.approx(expected, abs=0.3)


def test_a_layer_without_noise(net, images):
    quantized = fxquant.quantize(net, images, None, 8, cat=False, progress=False, recipe=fxquant.Recipe(stages=("ranges",)))
    row = fxquant.report(quantized).record.layers[0]
    assert row.weight_sqnr is None
    assert row.output_sqnr == math.inf
    assert "exact" in str(fxquant.report(quantized))


def test_json_round_trip(quantized):
    report = fxquant.report(quantized)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Record.from_dict(json.loads(text)) == report.record
    old = json.loads(text)
    del old["recipe"]["activation_error"]
    assert Record.from_dict(old).recipe.activation_error == "absolute", "files without the field were made with absolute errors"


def test_a_record_is_complete_without_times(quantized):
    record = fxquant.report(quantized).record
    data = record.to_dict()
    assert data["graph"] == record.graph
    assert data["graph"]
    assert Record.from_dict(data) == record
    assert any(log.milliseconds for log in record.passes)
    assert "milliseconds" not in json.dumps(data)


def test_the_record_counts_the_images_that_biases_were_corrected_on(net, images):
    record = fxquant.report(fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)).record
    assert {log.name: log for log in record.passes}["correct_bias"].notes == ["moments over 64 images"]
    few = fxquant.Recipe.FAST.replace(bias_images=20)
    record = fxquant.report(fxquant.quantize(net, images, cat=False, progress=False, recipe=few)).record
    assert {log.name: log for log in record.passes}["correct_bias"].notes == ["moments over 20 images"]


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_terminals_lose_no_name(quantized, width):
    file = io.StringIO()
    Console(file=file, width=width).print(fxquant.report(quantized))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    names = "".join(cells)
    for row in fxquant.report(quantized).record.layers:
        assert row.name in names
    assert "…" not in file.getvalue()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, torch.fx.symbolic_trace(nn.Linear(2, 2))])
def test_a_foreign_module(model):
    with pytest.raises(
        fxquant.ModelError, match=r"carries no record of a quantization. Pass what fxquant.quantize or fxquant.load returned"
    ):
        fxquant.report(model)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped(quantized, wrap):
    assert str(fxquant.report(wrap(quantized))) == str(fxquant.report(quantized))
