"""Whole networks: 8 bits cover the work, outputs stay, they compile as one graph and come out of their file as they went in."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "10_quantize_coverage.py"


def _load() -> ModuleType:
    sys.path.insert(0, str(EXAMPLE.parent))  # as it is where the example is run as a script
    try:
        return importlib.import_module(EXAMPLE.stem)
    finally:
        sys.path.remove(str(EXAMPLE.parent))


coverage = _load()

TORCHVISION = (
    "convnext_tiny",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
)
TIMM = (
    "cait_s24_224",
    "convnext_atto",
    "cs3darknet_s",
    "deit_tiny_patch16_224",
    "dla34",
    "edgenext_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "fasternet_s",
    "fastvit_t8",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnet_tiny",
    "inception_next_atto",
    "lcnet_050",
    "lcnetv2_small",
    "lowformer_e1",
    "maxvit_nano_rw_256",
    "mixnet_s",
    "mobilevit_s",
    "nf_seresnet26",
    "pvt_v2_b0",
    "regnetx_004_tv",
    "repghostnet_050",
    "repvit_m1",
    "resnetv2_18",
    "rexnet_100",
    "shvit_s1",
    "starnet_s1",
    "swin_s3_tiny_224",
    "xcit_nano_12_p8_224",
)


class Hidden(nn.Module):
    """Multiplies behind torch's back: the weight depends on the image, so it cannot be quantized beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * x.std(), padding=1)


def small(*middle: nn.Module) -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_the_check_of_a_small_network():
    row = coverage.check("small", small, 16, limit=100)
    assert row.ok, row.why
    assert (row.covered, row.compiled, row.stored, row.left) == (1.0, "", "", [])
    assert row.multiply_adds == 8 * 8 * 8 * 27 + 80
    assert 0.999 < row.cosine <= 1.0


def test_what_is_not_covered_is_said():
    row = coverage.check("hidden", lambda: small(Hidden(), nn.ReLU()), 16, limit=100)
    assert row.covered == pytest.approx(1 - 8 * 8 * 8 * 72 / row.multiply_adds)
    assert row.why.startswith(f"covered {100 * row.covered:.2f} % (conv2d: its weight is computed, ")
    assert not row.ok and "| covered 2" in str(row)


def test_an_error_is_a_row_too():
    assert coverage.check("none", nn.Identity, 16, limit=100).why.startswith("ModelError: ")
    assert coverage.check("late", lambda: nn.Sequential(Sleeper()), 16, limit=1).why == "over 1 s"


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        while True:
            pass


def test_what_does_not_compile_or_load_is_said(monkeypatch):
    images = torch.randn(4, 3, 16, 16)
    net = small()
    assert "Unsupported" in coverage.why_not_compiled(Breaks(net), images)
    monkeypatch.setattr(coverage.fxquant, "load", lambda path, model: Breaks(net))
    monkeypatch.setattr(coverage.fxquant, "save", lambda model, path: None)
    assert coverage.why_not_stored(Doubled(net), net, images) == "gives other outputs"


class Breaks(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.net(x)


class Doubled(Breaks):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.net(x)


def test_rows_that_are_there_are_not_run_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = coverage.Row("resnet18", "torchvision", covered=1.0, cosine=1.0, compiled="", stored="", multiply_adds=1_000_000)
    row.left = [coverage.Work("fc", 5, "its weight is float")]
    path.write_text(json.dumps(asdict(row)) + "\n")
    assert coverage.read(path) == {"torchvision:resnet18": row}
    words = ["--library", "torchvision", "--only", "resnet18", "--out", str(path)]
    done = subprocess.run([sys.executable, str(EXAMPLE), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| resnet18 | 1 | 100.00 | 1.0000 | 0 | ok |" in done.stdout
    assert "1 networks: 1 ok, 1 covered, 1 cosine, 1 compiled, 1 stored" in done.stdout
    assert len(path.read_text().splitlines()) == 1


@functools.cache
def networks() -> dict[str, tuple]:
    found = [*coverage.tracing.timm_networks(160), *coverage.torchvision_networks(1000)]
    return {network[0]: network for network in found if network[0] in TORCHVISION + TIMM}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    row = coverage.check(*networks()[name], limit=600, images=4)
    assert row.ok, row.why


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    row = coverage.check(*coverage.smaller(networks()[name]), limit=600, images=4)
    assert row.ok, row.why


def test_at_least_forty_are_pinned_and_windowed_and_class_attention_among_them():
    pinned = {*TORCHVISION, *TIMM}
    assert len(pinned) >= 40
    assert {"swin_t", "swin_v2_t", "maxvit_nano_rw_256", "cait_s24_224", "xcit_nano_12_p8_224", "deit_tiny_patch16_224"} <= pinned
