"""CAT on a real network, crudely quantized. Needs a folder with zoo.py: FXQUANT_DATA=/path pytest tests/cat."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fxquant.cat import fit_cat, select_cat
from fxquant.metrics import agreement, kl_divergence, top1

DATA = os.environ.get("FXQUANT_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="FXQUANT_DATA does not name a folder with zoo.py")
SHARES = torch.linspace(0.2, 1, 33)


def snap(x, low, high, bits):
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step


def snap_best(x, bits):
    """Quantize the rows of ``x`` with the share of their range that loses least."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    tried = torch.stack([snap(x, share * low, share * high, bits) for share in SHARES])
    best = (tried - x).square().sum(2).argmin(0)
    return tried[best, torch.arange(len(x))], SHARES[best]


def quantize(network, images, bits):
    """Return a copy with low-bit inner weights and low-bit outputs of the residual blocks, ranges from ``images``."""
    network = copy.deepcopy(network)
    for module in [m for m in network.modules() if isinstance(m, nn.Conv2d)][1:]:
        module.weight.data = snap_best(module.weight.data.flatten(1), bits)[0].view_as(module.weight)
    highs = {}

    def snap_output(module, _, y):
        if module not in highs:
            highs[module] = y.max() * snap_best(y.reshape(1, -1)[:, ::16], bits)[1]
        return snap(y, torch.zeros(1), highs[module], bits)

    for module in network.modules():
        if type(module).__name__ == "Block":
            module.register_forward_hook(snap_output)
    network(images)
    return network


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", Path(DATA) / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [3, 4])
@torch.inference_mode()
def test_correction_holds_on_test_images(zoo, bits):
    network, norm = zoo.load_model("cifar10_resnet20")
    train, _ = zoo.load_images("cifar10_train8192", norm, 1024)
    test, labels = zoo.load_images("cifar10_test", norm)
    low = quantize(network, train[:128], bits)
    (q, f), (test_q, test_f) = ([torch.cat([n(x) for x in images.split(100)]) for n in (low, network)] for images in (train, test))

    choice = select_cat(q, f)
    corrections = {
        "none": nn.Identity(),
        "moments K=1 alpha=1": fit_cat(q, f, clusters=1, alpha=1.0),
        "published": fit_cat(q, f),
        "moments K=64 alpha=1": fit_cat(q, f, alpha=1.0),
        "ridge K=1": fit_cat(q, f, fit="ridge", clusters=1, alpha=1.0),
        "kl K=1": fit_cat(q, f, fit="kl", clusters=1, alpha=1.0),
        "selected": choice.cat or nn.Identity(),
    }
    kl = {}
    for name, cat in corrections.items():
        z = cat(test_q)
        kl[name] = kl_divergence(z, test_f).mean().item()
        print(f"{bits} bits, {name:20s} KL {kl[name]:.4f} top-1 {top1(z, labels):.2f} agreement {agreement(z, test_f):.2f}")
    print(f"selected {choice.fit} K={choice.clusters} PCA {choice.pca} alpha={choice.alpha}")

    assert kl["kl K=1"] < 0.9 * kl["none"]
    assert kl["kl K=1"] < min(kl["published"], kl["moments K=1 alpha=1"], kl["moments K=64 alpha=1"])
    assert kl["moments K=64 alpha=1"] > kl["none"]
    assert kl["selected"] <= 1.01 * min(kl["none"], kl["kl K=1"])
