"""Nets, images and checks that several test files share."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a case without the address of its object: the same names in every run."""
    text = str(val)
    return re.sub(r" at 0x[0-9a-f]+", "", text) if " at 0x" in text else None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test gets the same random numbers alone and in any order."""
    torch.manual_seed(0)


class Residual(nn.Module):
    """Stem, one residual block, classifier; its batch norms hold statistics as a trained network's do."""

    def __init__(self, classes: int = 10, width: int = 8, depth: int = 1, act: type[nn.Module] = nn.ReLU, channels: int = 3):
        super().__init__()
        self.num_classes = classes
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(nn.Sequential(_conv_bn(width), act(), _conv_bn(width)) for _ in range(depth))
        self.act, self.fc = act(), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        nn.init.normal_(self.fc.weight, std=1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = self.act(block(x) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _conv_bn(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


@pytest.fixture
def make_net():
    """Return a factory of small residual nets in eval mode; the same arguments give the same weights."""

    def make(seed: int = 0, **options) -> Residual:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Residual(**options).eval()

    return make


@pytest.fixture
def net(make_net) -> Residual:
    """A small residual net, ten classes, for images [N, 3, 8, 8]."""
    return make_net()


@pytest.fixture
def images() -> list[Tensor]:
    """Four batches [16, 3, 8, 8] of smooth random images."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(64, 3, 4, 4, generator=generator)
    return list((F.interpolate(coarse, 8, mode="bilinear") + 0.3 * torch.randn(64, 3, 8, 8, generator=generator)).split(16))


@pytest.fixture
def untouched():
    """Return a context manager that fails unless a module is, bit for bit and flag for flag, what it was before.

    It looks behind the block whether or not the block raises, so it goes around ``pytest.raises`` or inside it.
    """

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = _snapshot(model)
        try:
            yield
        finally:
            after = _snapshot(model)
            assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
            changed = [key for key, value in before.items() if not _same(value, after[key])]
            assert not changed, f"changed: {changed}"

    return check


def _snapshot(model: nn.Module) -> dict[str, object]:
    """Everything a caller could notice: modules and their classes and flags, tensors by identity and by value, hooks."""
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: class"] = type(module)
        found[f"{path}: training"] = module.training
        found[f"{path}: attributes"] = sorted(vars(module))
        found[f"{path}: hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            found[f"{path}.{name}: identity"] = id(value)
            if value is not None:
                found[f"{path}.{name}"] = value.detach().clone()
                found[f"{path}.{name}: gradient"] = (value.requires_grad, value.grad is None)
    return found


def _same(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta and a.shape == b.shape
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a.nan_to_num(nan=1234.5), b.nan_to_num(nan=1234.5))


@pytest.fixture
def random_states():
    """Return a function that gives the states of all global random generators, comparable with ``==``."""

    def states() -> tuple:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()

    return states
