"""append_cat: on networks of fxquant, of other tools, and on plain functions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import execution
from fxquant.cat import CAT
from fxquant.console import Narrator
from fxquant.correction import logits_of, logits_of_each
from fxquant.metrics import kl_divergence


class ByHand(nn.Module):
    """What another tool might leave: weights rounded in place, a wrapper around the network, no graph."""

    def __init__(self, model: nn.Module, levels: int = 4):
        super().__init__()
        self.model = copy.deepcopy(model)
        for value in self.model.parameters():
            step = value.detach().abs().max() / levels
            value.data = (value / step).round() * step

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def append_cat(quantized, teacher, loader, **options):
    return fxquant.append_cat(quantized, teacher, loader, **{"progress": False, **options})


def divergence(network, teacher: nn.Module, images: list[Tensor]) -> float:
    with torch.no_grad():
        return kl_divergence(network(torch.cat(images)), teacher(torch.cat(images))).mean().item()


@pytest.fixture
def distort(net):
    """A student whose logits are an affine map away from those of the teacher."""
    gain, shift = torch.linspace(0.4, 2, 10), torch.linspace(-2, 2, 10)
    return lambda x: net(x) * gain + shift


@pytest.mark.parametrize("fit", ["auto", "moments", "ridge", "kl"])
def test_the_divergence_falls(net, distort, images, fit):
    corrected = append_cat(distort, net, images, fit=fit, clusters=2, alpha=1.0)
    fresh = [batch + 0.1 for batch in images]
    assert divergence(corrected, net, fresh) < 0.3 * divergence(distort, net, fresh)


def test_a_network_of_another_tool(net, images, untouched):
    student = ByHand(net).eval()
    with untouched(student), untouched(net):
        corrected = append_cat(student, net, images, fit="kl", clusters=1)
        out = corrected(images[0])
    assert isinstance(corrected.cat, CAT)
    assert not any(module.training for module in corrected.modules())
    assert torch.equal(out, corrected.cat(student(images[0])))
    assert divergence(corrected, net, images) < divergence(student, net, images)


def test_a_graph_that_fxquant_did_not_trace(net, images):
    student = torch.fx.symbolic_trace(ByHand(net).eval())
    corrected = append_cat(student, net, images, fit="kl", clusters=2)
    assert torch.equal(corrected(images[0]), corrected.cat(student(images[0])))


def test_an_exported_network(net, images):
    student = torch.export.export(ByHand(net).eval(), (images[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    corrected = append_cat(student, net, images, fit="kl", clusters=2)
    assert torch.allclose(corrected(images[0]), corrected.cat(student(images[0])))


@pytest.mark.parametrize("kind", ["traced", "transformed", "exported for a fixed number"])
def test_graphs_get_as_many_images_as_they_take(net, images, monkeypatch, kind):
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    seen: list[int] = []
    x, graph = torch.cat(images)[:48], fxquant.trace(net, images[0])
    student = {
        "traced": graph,
        "transformed": torch.fx.Transformer(graph).transform(),  # its input has no recorded shape
        "exported for a fixed number": torch.export.export(net, (x,)).module(),
    }[kind]
    append_cat(student, lambda batch: seen.append(len(batch)) or 2 * net(batch), [x], fit="kl", clusters=1)
    assert seen == ([1] * 48 if kind == "traced" else [48])


def test_several_clusters_are_one_node_more(net, images, untouched):
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    with untouched(quantized), untouched(net):
        corrected = append_cat(quantized, net, images, fit="kl", clusters=3)
    assert isinstance(corrected, torch.fx.GraphModule)
    assert len(corrected.graph.nodes) == len(quantized.graph.nodes) + 1
    assert sum(isinstance(module, CAT) for module in corrected.modules()) == 1
    assert torch.equal(corrected(images[0]), corrected.cat(quantized(images[0])))
    theirs = {value.untyped_storage().data_ptr() for value in quantized.state_dict().values()}
    assert not theirs & {value.untyped_storage().data_ptr() for value in corrected.state_dict().values()}


@pytest.mark.parametrize("edges", ["8bit", "float"])
def test_one_cluster_folds_into_the_classifier(net, images, untouched, edges):
    quantized = fxquant.quantize(net, images, cat=False, edges=edges, recipe="fast", progress=False)
    with untouched(quantized):
        corrected = append_cat(quantized, net, images, fit="kl", clusters=1, alpha=0.5)
    assert len(corrected.graph.nodes) == len(quantized.graph.nodes)
    assert not any(isinstance(module, CAT) for module in corrected.modules())
    cat = append_cat(lambda x: quantized(x), net, images, fit="kl", clusters=1, alpha=0.5).cat
    assert torch.allclose(corrected(images[0]), cat(quantized(images[0])), atol=1e-4)
    assert not torch.equal(corrected(images[0]), quantized(images[0]))


def test_the_report_knows(net, images):
    quantized = fxquant.quantize(net, images, cat=False, recipe="fast", progress=False)
    corrected = append_cat(quantized, net, images, fit="kl", clusters=2)
    before, after = (fxquant.report(network).record for network in (quantized, corrected))
    assert before.cat == {}
    assert (after.cat["fit"], after.cat["clusters"], after.cat["folded"]) == ("kl", 2, False)
    assert [log.name for log in after.passes] == [*(log.name for log in before.passes), "append_cat"]
    assert "kl, K=2" in str(fxquant.report(corrected))


def test_nothing_helps(net, images):
    options = {"edges": "float", "overrides": {"*": {"w": None, "a": 8}}}
    quantized = fxquant.quantize(net, images, 8, 8, cat=False, recipe="fast", progress=False, **options)
    assert append_cat(net, net, images) is net
    same = append_cat(lambda x: net(x), net, images)
    assert torch.equal(same(images[0]), net(images[0]))
    assert quantized(images[0]).shape == (16, 10)


def test_same_seed_same_correction(net, distort, images):
    first, second, other = (append_cat(distort, net, images, fit="kl", clusters=8, seed=seed).cat.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_float64(make_net, images):
    net = make_net().double()
    corrected = append_cat(ByHand(net).eval(), net, images, fit="kl", clusters=2)
    assert corrected(images[0].double()).dtype == torch.float64


def test_other_batches(net, distort, images):
    expected = append_cat(distort, net, images, fit="ridge", clusters=2)(images[0])
    assert torch.equal(
        append_cat(distort, net, [{"pixel_values": batch} for batch in images], fit="ridge", clusters=2)(images[0]), expected
    )


def test_progress(net, distort, images, capfd):
    append_cat(distort, net, images)
    assert tuple(capfd.readouterr()) == ("", "")
    append_cat(distort, net, images, progress=True)
    assert "KL" in capfd.readouterr().err


# What cannot be corrected


def test_train_mode_is_refused(make_net, images, untouched):
    student, teacher = make_net(), make_net()
    for train, other in ((student, teacher), (teacher, student)):
        train.train(), other.eval()
        with (
            untouched(student),
            untouched(teacher),
            pytest.raises(fxquant.CATError, match=r"is in train mode, .* Call \.eval\(\) on it first"),
        ):
            append_cat(student, teacher, images)


@pytest.mark.parametrize(
    ("output", "what"),  # the four batches of 16 arrive as 48 and 16
    [
        (lambda net, x: (net(x), x), "a tuple"),
        (lambda net, x: {"logits": net(x)}, "a dict"),
        (lambda net, x: net.conv1(x), r"shape \[48, 8, 8, 8\]"),
        (lambda net, x: net(x).argmax(1), r"shape \[48\]"),
    ],
)
def test_no_logits(net, images, output, what):
    def broken(x: Tensor):
        return output(net, x)

    for pair in ((broken, net), (net, broken)):
        with pytest.raises(fxquant.CATError, match=f"^broken: gives {what}, not logits .*wrap the network so that it returns them"):
            append_cat(*pair, images)


def test_logits_of_several_networks_in_one_pass(net, make_net, images):
    other = make_net(seed=1)
    mine, theirs = logits_of_each([net, other], iter(images), Narrator(False), torch.device("cpu"))
    for network, logits in ((net, mine), (other, theirs)):
        assert torch.equal(logits, torch.cat([network(batch) for batch in images]))
        assert torch.equal(logits, logits_of(network, iter(images)))
        assert not logits.requires_grad


def test_other_classes(net, make_net, images):
    with pytest.raises(fxquant.CATError, match=r"student logits \[64, 10\] and teacher logits \[64, 11\] differ in shape"):
        append_cat(net, make_net(classes=11), images)


def test_nan_logits(net, images):
    with pytest.raises(fxquant.CATError, match="student logits are NaN or infinite for 64 of 64 images, the first is image 0"):
        append_cat(lambda x: net(x) / 0, net, images)


def test_not_callable(net, images):
    with pytest.raises(fxquant.CATError, match=r"a str cannot be called with images. Pass networks, or functions that give logits"):
        append_cat("resnet18", net, images)


def test_a_correction_twice(net, images):
    once = append_cat(fxquant.quantize(net, images, cat=False, recipe="fast", progress=False), net, images, fit="kl", clusters=2)
    with pytest.raises(fxquant.CATError, match=r"has a CAT already. Pass it as it was before"):
        append_cat(once, net, images)


def test_few_images(net, images):
    with pytest.raises(
        fxquant.CATError, match=r"^loader: 7 images are too few to cross-validate, 8 are enough. Pass more images, or choose a"
    ):
        append_cat(net, net, [images[0][:7]])
    with pytest.raises(fxquant.CATError, match=r"^cat: 16 images are fewer than 64 clusters\. Pass more images, or ask for fewer clusters"):
        append_cat(net, net, images[:1], fit="moments")
    with pytest.raises(fxquant.CalibrationError, match="yields no batch"):
        append_cat(net, net, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "best"}, "fit: 'best' is no fit. Use 'auto', 'moments', 'ridge' or 'kl'."),
        ({"seed": 0.5}, "seed: 0.5 is no seed."),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
    ],
)
def test_arguments_that_cannot_be_meant(net, images, options, message):
    with pytest.raises(fxquant.ConfigError) as caught:
        append_cat(net, net, images, **options)
    assert str(caught.value).startswith(message)
