"""Real networks: every torchvision classification model, and forty timm models of different families."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "05_trace_coverage.py"
    spec = importlib.util.spec_from_file_location("trace_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = _load()
TORCHVISION = {name: rest for name, *rest in coverage.torchvision_networks()}
TIMM = {name: rest for name, *rest in list(coverage.timm_networks(98))[::2][:40]}
# torch computes nn.MultiheadAttention by a fused kernel; its explicit form rounds differently.
ROUNDED = ("vit_",)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    row = coverage.check(name, *TORCHVISION[name], limit=600)
    assert row.ok, row.why
    assert row.error < 1e-5 if name.startswith(ROUNDED) else row.error == 0.0


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    row = coverage.check(name, *TIMM[name], limit=600)
    assert row.ok, row.why
    assert row.error == 0.0
