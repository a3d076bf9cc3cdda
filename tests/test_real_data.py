"""A trained network on real images, against a little less than the numbers of examples/measurements.md. Slow; needs the data."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.metrics import agreement, kl_divergence, top1

FOLDER = os.environ.get("FXQUANT_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="set FXQUANT_DATA to a folder with zoo.py, its weights and CIFAR-10"),
]

FLOAT = 91.73
"""Top-1 of the float network on the 10,000 test images, in percent."""


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    assert FOLDER is not None
    spec = importlib.util.spec_from_file_location("zoo", Path(FOLDER) / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(zoo) -> tuple[nn.Module, list[Tensor], list[Tensor], Tensor]:
    """The network, 1,024 training images, 10,000 test images and their labels."""
    network, norm = zoo.load_model("cifar10_resnet20")
    train, _ = zoo.load_images("cifar10_train8192", norm)
    test, labels = zoo.load_images("cifar10_test", norm)
    return network, list(train[:1024].split(64)), list(test.split(500)), labels


@torch.no_grad()
def logits(network: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([network(batch) for batch in batches])


@pytest.fixture(scope="module")
def measure(trained):
    """Return a function from bits and the setting of CAT to top-1 in percent and test KL in nats; each is computed once."""
    network, train, test, labels = trained
    teacher = logits(network, test)
    assert top1(teacher, labels) == pytest.approx(FLOAT, abs=0.05)
    known: dict[tuple[int, bool], tuple[float, float]] = {}

    def run(bits: int, cat: bool) -> tuple[float, float]:
        if (bits, cat) not in known:
            quantized = fxquant.quantize(network, train, w=bits, a=bits, cat=cat, recipe="fast", progress=False)
            student = logits(quantized, test)
            known[bits, cat] = top1(student, labels), kl_divergence(student, teacher).mean().item()
            print(
                f"W{bits}A{bits} cat={cat}: top-1 {known[bits, cat][0]:.2f}, agreement {agreement(student, teacher):.2f}, "
                f"KL {known[bits, cat][1]:.4f}  {fxquant.report(quantized).record.cat.get('fit', '')}"
            )
        return known[bits, cat]

    return run


def test_eight_bits(measure):
    assert measure(8, False)[0] == pytest.approx(FLOAT, abs=0.2)


def test_four_bits(measure):
    assert measure(4, False)[0] >= 90.1


def test_two_bits(measure):
    assert measure(2, False)[0] >= 59


def test_learning_at_two_bits(trained):
    """A tenth of the steps of the default, which has 86 % in the end."""
    network, train, test, labels = trained
    recipe = fxquant.Recipe.STANDARD.replace(finish_iterations=320)
    quantized = fxquant.quantize(network, train, 2, 2, recipe=recipe, progress=False)
    student = logits(quantized, test)
    print(f"W2A2, 320 steps: top-1 {top1(student, labels):.2f}, KL {kl_divergence(student, logits(network, test)).mean():.4f}")
    assert top1(student, labels) >= 83


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_cat_never_hurts(measure, bits):
    assert measure(bits, True)[1] <= 1.01 * measure(bits, False)[1]


def test_cat_helps_at_two_bits(measure):
    assert measure(2, True)[1] < measure(2, False)[1]
