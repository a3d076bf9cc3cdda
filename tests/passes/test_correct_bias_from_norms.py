"""CorrectBiasFromNorms: what rounded weights add to the mean of an output is taken out again, without an image."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, classes, images, make, names, once_traced, ops
from test_expectations import exact
from test_insert_fake_quant import MINMAX
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.graph import called, fork
from fxquant.kinds import is_layer
from fxquant.passes import PREPARE, CorrectBiasFromNorms, Freeze, InsertFakeQuant, InsertObservers
from fxquant.pipeline import Pipeline
from fxquant.placement import place
from fxquant.quantizers.layers import QuantizedLayer


def quantized(teacher: GraphModule, w: int = 3, a: int | None = None, x: Tensor | None = None) -> GraphModule:
    plan = place(teacher, w, a, "same")
    observed = InsertObservers(plan)(teacher).graph_module
    observed(images(6) if x is None else x)
    return InsertFakeQuant(plan, activation_quantizers(MINMAX), weight_quantizers(MINMAX))(observed).graph_module


def means(gm: GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Return the mean of each channel of what every layer gives."""
    found: dict[str, Tensor] = {}
    new = fork(gm)
    for node, module in called(new):
        if is_layer(node):
            module.register_forward_hook(
                lambda _, args, y, path=str(node.target): found.update({path: y.transpose(0, 1).flatten(1).mean(1)})
            )
    new(x)
    return found


BODIES = {
    "relu": lambda self, x: self.fc(self.conv2(self.bn(self.conv(x)).relu()).mean((2, 3))),
    "groups": lambda self, x: self.fc(self.grouped(self.bn(self.conv(x)).relu()).mean((2, 3))),
    "map": lambda self, x: self.wide(nn.functional.avg_pool2d(self.bn(self.conv(x)).relu(), 16).flatten(1)),
}


@pytest.mark.parametrize("name", BODIES)
def test_means_come_back(name):
    """For the inputs that the norms promise; the error of the last layer, behind one without a norm, stays."""
    layers = {"conv2": nn.Conv2d(8, 6, 1), "grouped": nn.Conv2d(8, 6, 1, groups=2), "fc": nn.Linear(6, 4), "wide": nn.Linear(32, 4)}
    teacher, x = exact(BODIES[name], conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), **layers)
    gm = quantized(teacher, x=x[:6])
    new = Pipeline([CorrectBiasFromNorms()]).run(gm)
    target = {"relu": "conv2", "groups": "grouped", "map": "wide"}[name]
    for graph in (gm, new):  # the first layer stays float, so that what reads it has the inputs promised
        graph.set_submodule("conv", teacher.get_submodule("conv"))
    wanted, before, behind = (means(graph, x)[target] for graph in (teacher, gm, new))
    assert (behind - wanted).abs().max() < 0.15 * (before - wanted).abs().max()


def test_in_closed_form():
    teacher, _ = exact(BODIES["relu"], conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8), conv2=nn.Conv2d(8, 6, 3), fc=nn.Linear(6, 4))
    norm = teacher.meta["folded_norms"]["conv"]
    normal = torch.distributions.Normal(0.0, 1.0)
    mean, deviation = norm.factor * norm.mean + norm.shift, (norm.factor * norm.deviation).abs()
    expected = mean * normal.cdf(mean / deviation) + deviation * normal.log_prob(mean / deviation).exp()
    gm = quantized(teacher)
    new = Pipeline([CorrectBiasFromNorms()]).run(gm)
    old, corrected = gm.get_submodule("conv2"), new.get_submodule("conv2")
    error = old.used_weight() - old.weight
    torch.testing.assert_close(corrected.bias, old.bias - torch.einsum("oihw,i->o", error, expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(corrected.used_weight(), old.used_weight())


@pytest.mark.parametrize("name", NETS)
def test_graphs_stay_and_every_layer_is_corrected_or_named(name, untouched):
    teacher = Pipeline([step() for step in PREPARE]).run(once_traced(name))
    gm = quantized(teacher, a=4)
    step = CorrectBiasFromNorms()
    with untouched(gm):
        new = Pipeline([step]).run(gm)
    assert (names(new), ops(new), classes(new)) == (names(gm), ops(gm), classes(gm))
    layers = [node for node, module in called(gm) if isinstance(module, QuantizedLayer)]
    assert step.log.count + len(step.log.skipped) == len(layers)
    assert all(why for _, why in step.log.skipped)
    again = CorrectBiasFromNorms()
    assert Pipeline([again]).run(new) is new or again.log.count == 0
    for path in (str(node.target) for node in layers):
        a, b = new.get_submodule(path), gm.get_submodule(path)
        assert torch.equal(a.used_weight(), b.used_weight())


def test_as_a_constant_of_a_recipe():
    """In the place of the pass that measures; the report names it and what it left."""
    recipe = fxquant.Recipe(stages=("ranges", "bias"), bias_means="norms")
    record = fxquant.report(fxquant.quantize(make("mobile"), [images(8)], 4, 8, cat=False, recipe=recipe, progress=False)).record
    log = next(log for log in record.passes if log.name == "correct_bias_from_norms")
    assert log.count >= 2 and log.skipped
    assert not any(log.name == "correct_bias" for log in record.passes)


def test_transposed_and_frozen_layers_are_refused():
    parts = {"conv": nn.Conv2d(3, 8, 1), "bn": nn.BatchNorm2d(8), "up": nn.ConvTranspose2d(8, 6, 2, 2), "fc": nn.Linear(6, 4)}
    teacher, _ = exact(lambda self, x: self.fc(self.up(self.bn(self.conv(x)).relu()).mean((2, 3))), **parts)
    step = CorrectBiasFromNorms()
    Pipeline([step]).run(quantized(teacher))
    assert "transposed" in dict(step.log.skipped)["up"]
    frozen = Pipeline([Freeze()]).run(quantized(Pipeline([part() for part in PREPARE]).run(once_traced("residual"))))
    step = CorrectBiasFromNorms()
    Pipeline([step]).run(frozen)
    assert step.log.count == 0 and all("frozen" in why for _, why in step.log.skipped)


def test_reasons():
    step = CorrectBiasFromNorms()
    Pipeline([step]).run(quantized(Pipeline([part() for part in PREPARE]).run(once_traced("residual"))))
    reasons = dict(step.log.skipped)
    assert "nothing is known of images" in reasons.values()
    assert any("changes the means by more than batch norms tell" in why for why in reasons.values())
    assert step.log.count >= 2
