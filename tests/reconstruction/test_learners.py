"""Learners: the same function to begin with, and what is fixed in the end computes what was learned. Also helpers of the other files."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from nets import Net, apply, head, images, make, prepared, traced
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import trace
from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.graph import called, fork
from fxquant.passes import InsertFakeQuant, InsertObservers
from fxquant.placement import place
from fxquant.quantizers import LogQuantizer, UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.quantizers.learned import LatentWeight, LearnedQuantizer, SoftRounding
from fxquant.recipe import Recipe
from fxquant.reconstruction.learners import Learners, constant, put_modules, without_gradients
from fxquant.reconstruction.store import Store
from fxquant.reconstruction.walk import Visit, Walk
from fxquant.units import Unit, cut, on_student

CPU = torch.device("cpu")
RECIPE = Recipe(weight_range="minmax", activation_range="minmax")


def spread(name: str) -> GraphModule:
    """Return the traced net of `nets` with logits that differ from image to image, by 1.5 in each class: so that their KL counts."""
    net, x = make(name), images(64)
    last = [part for part in net.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():
        y = net(x)
        last.weight.mul_(1.5 / y.std(0)[:, None])
        last.bias.copy_(-(net(x) - last.bias).mean(0))
    return trace(net, images())


def pair(net: str | nn.Module, w: int | None = 3, a: int | None = 4, recipe: Recipe = RECIPE, count: int = 6, **options) -> tuple:
    """Return the float graph of a net of `nets` and its quantized one."""
    options = {"edges": "same", **options}
    teacher = prepared(net if isinstance(net, str | GraphModule) else traced(net))
    plan = place(teacher, w, a, **options)
    observed, _ = apply(teacher, InsertObservers(plan))
    with torch.no_grad():
        observed(images(count))
    return teacher, apply(observed, InsertFakeQuant(plan, activation_quantizers(recipe), weight_quantizers(recipe)))[0]


def walk_over(teacher: GraphModule, student: GraphModule, x: Tensor, units: Sequence[Unit] | None = None, activations: bool = True) -> Walk:
    batches = list(x.split(5))
    return Walk(teacher, student, cut(teacher) if units is None else units, batches, Store(len(x), CPU, 1e9), activations)


def visit_to(walk: Walk, layer: str) -> Visit:
    """Return the visit to the unit that holds a layer; the walk stays there."""
    walk.paused = iter(walk)
    return next(visit for visit in walk.paused if layer in visit.unit.layers)


def partly(teacher: GraphModule, student: GraphModule, unit: Unit) -> GraphModule:
    """Return the student with everything but one unit float."""
    new = fork(student)
    kept = {node.target for node in student.graph.nodes if node.name in on_student(unit, student).nodes}
    for node, part in list(called(student)):
        if node.target in kept:
            continue
        if isinstance(part, UniformQuantizer):
            put_modules(new, {str(node.target): nn.Identity()})
        elif isinstance(part, QuantizedLayer):
            put_modules(new, {str(node.target): teacher.get_submodule(str(node.target))})
    return new


def nudge(learners: Learners, seed: int = 0) -> None:
    """Move everything that is learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for learner in learners.weights.values():
            value = learner.alpha if isinstance(learner, SoftRounding) else learner.latent
            value.add_(2 * torch.randn(value.shape, generator=generator))
            if isinstance(learner, LatentWeight):
                learner.project()
            learner.scale.value.mul_(1.1)
        for learner in learners.activations.values():
            learner.scale.value.mul_(0.9)
        for bias in learners.biases.values():
            bias.add_(0.1 * torch.randn(bias.shape, generator=generator))


def latent(gm: GraphModule, biases: bool = True) -> Learners:
    return Learners(gm, LatentWeight, lambda quantizer: LearnedQuantizer(quantizer, relative=True), biases)


def soft(gm: GraphModule, **options) -> Learners:
    return Learners(gm, lambda weight, quantizer: SoftRounding(weight, quantizer, True), LearnedQuantizer, **options)


NAMES = ["chain", "residual", "mobile", "dense", "transposed", "one_dimension", "linear_norm", "attention", "shared", "Functional"]


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_graph_computes_the_same_to_begin_with_and_in_the_end(name, untouched):
    _, gm = pair(name)
    x = images(4)
    with untouched(gm), torch.no_grad():
        learners = latent(gm)
        assert torch.equal(learners.graph(x), gm(x))
        assert learners.weights.keys() == learners.biases.keys()
        nudge(learners)
        y, fixed = learners.graph(x), fork(gm)
        put_modules(fixed, learners.fixed())
        assert not torch.equal(y, gm(x))
        assert torch.equal(fixed(x), y)
    for node, part in called(fixed):
        if isinstance(part, QuantizedLayer):
            assert torch.equal(part.weight_quantizer(part.weight), part.weight)
            assert type(part) is type(gm.get_submodule(str(node.target))) and not part.weight.requires_grad
        if str(node.target) in learners.activations:
            assert type(part) is UniformQuantizer


@pytest.mark.parametrize("name", ["residual", "transposed", "one_dimension", "linear_norm"])
def test_a_soft_graph_starts_at_clipped_float_weights_and_ends_on_the_grid(name, untouched):
    teacher, gm = pair(name, 8, None)
    x = images(4)
    with untouched(gm), torch.no_grad():
        learners = soft(gm)
        torch.testing.assert_close(learners.graph(x), teacher(x), rtol=1e-3, atol=1e-3)  # minmax: hardly anything is clipped
        nudge(learners)
        for learner in learners.weights.values():
            learner.alpha.copy_(torch.where(learner.alpha >= 0, 9.0, -9.0))
        fixed = fork(gm)
        put_modules(fixed, learners.fixed())
        torch.testing.assert_close(fixed(x), learners.graph(x), rtol=1e-4, atol=1e-4)


def test_float_activations_are_those_of_a_network_with_quantized_weights():
    _, gm = pair("residual", 3, 4)
    _, weights_only = pair("residual", 3, None)
    x = images(4)
    learners = soft(gm, float_activations=True)
    assert not learners.activations
    plain = Learners(gm, None, None, float_activations=True)
    assert torch.equal(plain.graph(x), weights_only(x))
    assert not plain.weights and not plain.fixed()
    assert set(learners.fixed()) == set(learners.weights)  # the quantizers of the student stay where they are
    assert torch.equal(Learners(gm, None, None).graph(x), gm(x))


def test_a_bias_is_made_where_there_was_none():
    _, gm = pair(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False), head(4)))
    assert gm.get_submodule("0").bias is None
    learners = latent(gm)
    assert {path: len(bias) for path, bias in learners.biases.items()} == {"0": 6, "2": 4, "3.3": 5}
    x = images(3)
    assert torch.equal(learners.graph(x), gm(x))
    nudge(learners)
    fixed = learners.fixed()
    assert torch.equal(fixed["0"].bias, learners.biases["0"]) and not fixed["0"].bias.requires_grad
    learners = latent(gm, biases=False)
    assert learners.graph.get_submodule("0").bias is None and learners.fixed()["0"].bias is None


def test_biases_alone():
    _, gm = pair("chain")
    learners = Learners(gm, None, None, biases=True)
    x = images(3)
    assert torch.equal(learners.graph(x), gm(x))
    nudge(learners)
    fixed = fork(gm)
    put_modules(fixed, learners.fixed())
    assert torch.equal(fixed(x), learners.graph(x))
    assert torch.equal(fixed.get_submodule("0").codes(), gm.get_submodule("0").codes())


def test_a_frozen_layer_keeps_its_weight():
    _, gm = pair("chain")
    put_modules(gm, {"0": gm.get_submodule("0").freeze()})
    learners = latent(gm)
    assert "0" not in learners.weights and "0" in learners.biases
    assert torch.equal(learners.graph(images()), gm(images()))
    assert learners.fixed()["0"].frozen


@pytest.mark.parametrize("name", ["residual", "attention", "norm_act", "Functional", "dense"])
def test_only_learners_get_gradients(name):
    teacher, gm = pair(name)
    for model in (teacher, gm):
        model.requires_grad_(True)
    learners = latent(gm)
    learners.graph(images(3)).square().sum().backward()
    asked = {id(p) for group in (learners.weights, learners.activations) for part in group.values() for p in part.parameters()}
    asked |= {id(bias) for bias in learners.biases.values()}
    assert {id(p) for p in learners.graph.parameters() if p.requires_grad} == asked
    assert all(p.grad is not None for p in learners.graph.parameters() if p.requires_grad)
    assert all(p.grad is None for model in (teacher, gm) for p in model.parameters())
    x = images(3).requires_grad_()
    constant_teacher = without_gradients(teacher)
    y = constant_teacher(x)
    assert torch.equal(y, teacher(x))
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(p.requires_grad for p in constant_teacher.parameters())


def with_stored_tensor() -> nn.Module:
    net = Net(lambda s, x: s.fc(s.conv(x) + s.place), conv=nn.Conv2d(3, 4, 3, padding=1), fc=head(4))
    net.place = nn.Parameter(torch.randn(1, 4, 16, 16))
    return net


def test_a_parameter_that_the_graph_reads_itself_gets_no_gradient():
    """As a position embedding or a class token is read: by a node of its own, not by a module."""
    teacher, gm = pair(with_stored_tensor())
    latent(gm).graph(images(3)).square().sum().backward()
    without_gradients(teacher)(images(3).requires_grad_()).sum().backward()
    assert all(p.grad is None for model in (teacher, gm) for p in model.parameters())


def test_constant_shares_values():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    copy = constant(module)
    assert not any(p.requires_grad for p in copy.parameters()) and all(p.requires_grad for p in module.parameters())
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in module.parameters()]


@pytest.mark.parametrize("grid", ["log2", "logsqrt2"])
def test_float_activations_are_float_behind_a_softmax_too(grid):
    """Its quantizer is none of those that are learned."""
    _, gm = pair("attention", 3, 3, Recipe(softmax_quantizer=grid))
    assert any(isinstance(part, LogQuantizer) for _, part in called(gm))
    plain = Learners(gm, None, None, float_activations=True).graph
    assert not any(isinstance(part, UniformQuantizer | LogQuantizer) for _, part in called(plain))
