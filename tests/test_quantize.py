"""The one call, end to end: what comes out, that it is the same every time, and that nobody else notices."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import fxquant
from fxquant import execution
from fxquant.cat import CAT
from fxquant.data import rebatch
from fxquant.metrics import kl_divergence
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.histogram import ImageObserver
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import PRESETS

PASSES = {"units": "reconstruct_units", "scales": "reconstruct_units", "output_kl": "finish_network", "finish": "finish_network"}
"""The pass of each stage that learns."""

BRIEFLY = {
    **dict.fromkeys(("unit_iterations", "unit_correction_iterations", "scales_iterations", "output_kl_iterations"), 2),
    **{"finish_iterations": 2, "finish_checks": 1, "unit_batch": 8, "output_kl_batch": 8, "finish_batch": 8},
}
"""Constants with which the stages that learn are over at once."""


def quantize(model: nn.Module, loader: Any, *args: Any, **options: Any) -> torch.fx.GraphModule:
    return fxquant.quantize(model, loader, *args, **{"progress": False, "recipe": "fast", **options})


def record_of(model: nn.Module) -> Any:
    return fxquant.report(model).record


def bits_of(quantized: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    return {row.name: (row.w, row.a) for row in record_of(quantized).layers}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in mine.items())


# What comes out


def test_few_images_at_once_where_values_are_large(net, images, monkeypatch):
    """The same network, whatever the batches: what they are is a matter of speed."""
    seen: list[int] = []
    real = ImageObserver.forward
    monkeypatch.setattr(ImageObserver, "forward", lambda self, x: seen.append(len(x)) or real(self, x))
    recipe = fxquant.Recipe(stages=("ranges", "bias"))
    whole = quantize(net, images, recipe=recipe, cat=False)
    assert set(seen) == set(map(len, rebatch(images)))
    seen.clear()
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    few = quantize(net, images, recipe=recipe, cat=False)
    assert record_of(few).passes == record_of(whole).passes
    assert set(seen) == {1}


def test_infinite_bounds(images):
    """Buffers that bound nothing, as gemma's clipped layers have them without a checkpoint."""

    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
            self.register_buffer("low", torch.tensor(-torch.inf))

        def forward(self, x):
            return self.fc(self.conv(x).clamp(min=self.low).relu().mean((2, 3)))

    network = Bounded().eval()
    quantized = quantize(network, images, w=8, a=8, cat=False)
    with torch.no_grad():
        torch.testing.assert_close(quantized(images[0]), network(images[0]), rtol=0, atol=0.02)


def test_one_graph_module_ready_for_inference(net, images):
    quantized = quantize(net, images)
    assert isinstance(quantized, torch.fx.GraphModule)
    assert type(quantized).__name__ == "Residual"
    assert not any(module.training for module in quantized.modules())
    assert not any(value.requires_grad for value in quantized.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quantized.modules())
    assert quantized.num_classes == 10
    quantized.graph.lint()
    for count in (1, 5):
        assert quantized(images[0][:count]).shape == (count, 10)


def test_the_result_shares_no_memory_with_the_network(net, images):
    theirs = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    for options in ({}, {"w": None}, {"a": None}, {"edges": "float"}):
        mine = {value.untyped_storage().data_ptr() for value in quantize(net, images, **options).state_dict().values()}
        assert not mine & theirs


@pytest.mark.parametrize(("w", "a"), [(2, 2), (3, 5), (4, 4), (8, 8)])
@pytest.mark.parametrize("cat", [True, "paper"])
def test_levels(net, images, w, a, cat):
    quantized = quantize(net, images, w, a, cat, edges="same")
    seen: dict[str, Tensor] = {}
    for name, module in quantized.named_modules():
        if isinstance(module, UniformQuantizer) and name.startswith("activations."):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    quantized(torch.cat(images))
    assert len(seen) == 3
    assert all(value.unique().numel() <= 2**a for value in seen.values())
    assert any(value.unique().numel() > 2 ** (a - 1) for value in seen.values())
    layers = [module for module in quantized.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == 4
    assert all(channel.unique().numel() <= 2**w for layer in layers for channel in layer.weight)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ("8bit", {"conv1": (8, None), "blocks.0.0.0": (2, 2), "blocks.0.2.0": (2, 2), "fc": (8, 8)}),
        ("brecq", {"conv1": (8, None), "blocks.0.0.0": (2, 8), "blocks.0.2.0": (2, 2), "fc": (8, 8)}),
        ("same", {"conv1": (2, None), "blocks.0.0.0": (2, 2), "blocks.0.2.0": (2, 2), "fc": (2, 2)}),
        ("float", {"conv1": (None, None), "blocks.0.0.0": (2, 2), "blocks.0.2.0": (2, 2), "fc": (None, None)}),
    ],
)
def test_edges(net, images, edges, expected):
    quantized = quantize(net, images, cat=False, edges=edges)
    assert bits_of(quantized) == expected
    stem = next(module for module in quantized.activations.modules() if isinstance(module, UniformQuantizer))
    assert stem.spec.bits == (8 if edges == "brecq" else 2)
    assert record_of(quantized).edges == edges


def test_overrides(net, images):
    overrides = {"blocks.*": {"w": 4, "a": 5}, "blocks.0.2.*": {"w": None}, "fc": {"w": 3}}
    quantized = quantize(net, images, cat=False, overrides=overrides)
    assert bits_of(quantized) == {"conv1": (8, None), "blocks.0.0.0": (4, 5), "blocks.0.2.0": (None, 5), "fc": (3, 8)}
    assert not isinstance(quantized.get_submodule("blocks.0.2.0"), QuantizedLayer)
    assert quantized.get_submodule("blocks.0.0.0").weight_quantizer.spec.bits == 4


# The same, always


def test_same_seed_same_result(net, images):
    first = quantize(net, images)
    torch.rand(7), np.random.rand(3), random.random()
    first(images[0])
    net(images[1])
    second = quantize(net, images)
    assert same_state(first, second)
    assert torch.equal(first(images[0]), second(images[0]))
    assert str(first.graph) == str(second.graph)


def test_the_seed_decides(net, images):
    draw = {seed: quantize(net, images, cat="paper", seed=seed, recipe=fxquant.Recipe.FAST.replace(cat_clusters=8)) for seed in (0, 1)}
    assert not same_state(draw[0], draw[1])


def test_global_random_states_stay(net, images, random_states):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    torch.rand(3), np.random.randn(1), random.gauss(0, 1)
    before = random_states()
    quantize(net, images)
    assert random_states() == before


def test_a_shuffled_loader_is_deterministic(net, images):
    loader = DataLoader(TensorDataset(torch.cat(images)), 16, shuffle=True)
    first = quantize(net, loader)
    torch.rand(3)
    list(loader)
    assert same_state(first, quantize(net, loader))
    assert "shifted views" in record_of(first).cat["views"]  # an order of its own is no augmentation


def test_a_loader_with_a_generator_of_its_own(net, images):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(torch.cat(images)), 16, shuffle=True, generator=generator)
    before = generator.get_state()
    first = quantize(net, loader)
    assert torch.equal(generator.get_state(), before)
    list(loader)
    assert same_state(first, quantize(net, loader))


class Augmented(Dataset):
    """Images that get noise from the global generator of torch whenever they are read."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + 0.05 * torch.randn(self.images.shape[1:]), index


def test_random_augmentation_is_used(net, images):
    loader = DataLoader(Augmented(torch.cat(images)), 16, shuffle=True)
    first = quantize(net, loader)
    assert record_of(first).cat["views"] == "4 passes of the loader"
    assert record_of(first).cat["images"] == 4 * 64
    torch.rand(3)
    assert same_state(first, quantize(net, loader))


def test_random_augmentation_of_a_part_of_a_data_set(net, images):
    data = Augmented(torch.cat(images))
    loader = DataLoader(data, 16, sampler=SubsetRandomSampler(range(20, 60)), drop_last=True)
    record = record_of(quantize(net, loader))
    assert record.images == 32
    assert (record.cat["views"], record.cat["images"]) == ("4 passes of the loader", 4 * 32)


# Other ways in


def test_generator_as_loader(net, images):
    assert same_state(quantize(net, (batch for batch in images)), quantize(net, images))


def test_how_images_are_batched_does_not_matter(net, images):
    assert same_state(quantize(net, list(torch.cat(images).split(7))), quantize(net, images))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda net: torch.compile(nn.DataParallel(net))])
def test_wrapped_networks(net, images, wrap, untouched):
    wrapped = wrap(net)
    with untouched(net):
        assert same_state(quantize(wrapped, images), quantize(net, images))


def test_a_traced_network(net, images, untouched):
    traced = fxquant.trace(net, images[0])
    with untouched(traced):
        quantized = quantize(traced, images)
    assert same_state(quantized, quantize(net, images))
    assert type(quantized).__name__ == type(traced).__name__ == type(net).__name__
    assert torch.equal(traced(images[0]), net(images[0]))


def test_a_network_on_the_training_tape(net, images):
    """Gradients of the caller's parameters are neither used nor made."""
    net(images[0]).sum().backward()
    before = {name: value.grad.clone() for name, value in net.named_parameters()}
    with torch.enable_grad():
        quantize(net, images)
    assert all(torch.equal(value.grad, before[name]) for name, value in net.named_parameters())


def test_inside_no_grad_and_inference_mode(net, images):
    expected = quantize(net, images)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quantized = quantize(net, images)
        assert same_state(quantized, expected)
        assert torch.equal(quantized(images[0]), expected(images[0]))


def test_float64(make_net, images):
    quantized = quantize(make_net().double(), images)
    assert {value.dtype for value in quantized.state_dict().values()} == {torch.float64}
    out = quantized(images[0].double())
    assert out.dtype == torch.float64
    assert kl_divergence(out.float(), quantize(make_net(), images)(images[0])).mean() < 0.05


def test_float64_images_for_a_float32_network(net, images):
    assert same_state(quantize(net, [batch.double() for batch in images]), quantize(net, images))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return {"classes": self.a(x.mean((2, 3))), "maps": [self.b(x), x]}


def test_several_outputs(images):
    torch.manual_seed(0)
    network = Heads().eval()
    quantized = quantize(network, images, 8, 8, cat=False)
    wanted, got = network(images[0]), quantized(images[0])
    assert got.keys() == wanted.keys()
    for mine, theirs in zip((got["classes"], *got["maps"]), (wanted["classes"], *wanted["maps"]), strict=True):
        assert torch.allclose(mine, theirs, atol=0.05 * theirs.abs().max().item())


# How good


def test_more_bits_less_divergence(net, images):
    fresh = torch.cat(images) + 0.1 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    divergence = [kl_divergence(quantize(net, images, bits, bits, cat=False)(fresh), net(fresh)).mean() for bits in (8, 4, 2)]
    assert divergence[0] < 0.1 * divergence[1]
    assert divergence[1] < 0.3 * divergence[2]


def test_eight_bits_are_close_to_float(net, images):
    wanted, got = net(images[0]), quantize(net, images, 8, 8)(images[0])
    assert (wanted - got).abs().max() < 0.02 * wanted.abs().max()


def test_cat_lowers_the_divergence_on_other_images(net):
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randn(512, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, 8, mode="bilinear") + 0.3 * torch.randn(512, 3, 8, 8, generator=generator)
    calibration, test = list(images[:256].split(64)), images[256:]
    recipe = fxquant.Recipe.FAST.replace(bias_gain="none")
    without, with_cat = (quantize(net, calibration, cat=cat, recipe=recipe) for cat in (False, True))
    before, after = (kl_divergence(network(test), net(test)).mean().item() for network in (without, with_cat))
    cat = record_of(with_cat).cat
    assert cat["fit"] != "none"
    assert after < before
    assert cat["kl_after"] < cat["kl_before"]


# Recipes


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_recipe_does_what_its_stages_say(net, images, name):
    recipe = fxquant.Recipe.named(name).replace(name=name, **BRIEFLY)
    record = record_of(quantize(net, images, recipe=recipe))
    assert record.recipe == recipe
    stages = [stage for stage in recipe.stages if stage in PASSES]
    learned = [log.name for log in record.passes if log.name in PASSES.values()]
    assert learned == [PASSES[stage] for stage in stages]
    assert bool(record.cat) == ("cat" in recipe.stages)


def test_the_default_recipe_is_standard():
    assert inspect.signature(fxquant.quantize).parameters["recipe"].default == "standard"


@pytest.mark.parametrize("stages", [("ranges",), ("ranges", "bias"), ("ranges", "cat"), ("ranges", "bias", "cat")])
def test_a_part_of_the_stages(net, images, stages):
    quantized = quantize(net, images, recipe=fxquant.Recipe(stages=stages))
    names = [log.name for log in record_of(quantized).passes]
    assert ("correct_bias" in names) == ("bias" in stages)
    assert bool(record_of(quantized).cat) == ("cat" in stages)
    assert quantized(images[0]).isfinite().all()


@pytest.mark.parametrize("options", [{"weight_symmetric": True}, {"activation_symmetric": True}, {"memory_gib": 0.001, "bias_images": 3}])
def test_other_recipes(net, images, options):
    quantized = quantize(net, images, 4, 4, recipe=fxquant.Recipe.FAST.replace(**options))
    assert kl_divergence(quantized(images[0]), net(images[0])).mean() < 0.2
    if "weight_symmetric" in options:
        assert all((m.weight_quantizer.zero_point == 0).all() for m in quantized.modules() if isinstance(m, QuantizedLayer))


def test_no_cat_when_not_asked(net, images):
    quantized = quantize(net, images, cat=False)
    assert record_of(quantized).cat == {}
    assert not any(isinstance(module, CAT) for module in quantized.modules())


# Copies and words


def test_deepcopy_keeps_the_report(net, images):
    quantized = quantize(net, images)
    copied = copy.deepcopy(quantized)
    assert torch.equal(copied(images[0]), quantized(images[0]))
    assert fxquant.report(copied).to_dict() == fxquant.report(quantized).to_dict()
    assert copied.num_classes == 10
    again = copy.deepcopy(copied)
    assert str(fxquant.report(again)) == str(fxquant.report(quantized))


def test_silence(net, images, capfd):
    quantize(net, images, progress=False)
    assert tuple(capfd.readouterr()) == ("", "")


def test_one_line_a_pass(net, images, capfd):
    quantized = quantize(net, images, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    for log in record_of(quantized).passes:
        assert sum(line.startswith(log.name) for line in lines) == 1, log.name
    assert any(line.startswith("place") and "4 layers, 3 tensors" in line for line in lines)
    assert any(line.startswith("cat") and "KL" in line for line in lines)
