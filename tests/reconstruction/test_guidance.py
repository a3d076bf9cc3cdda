"""The rest of the network and the statistics of batch norms, against the whole network."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import images, prepared
from test_learners import pair, visit_to, walk_over
from torch import nn
from torch.fx import GraphModule

from fxquant import trace
from fxquant.graph import called, fork
from fxquant.quantizers import UniformQuantizer
from fxquant.recipe import Recipe
from fxquant.reconstruction.guidance import choose_ranges_again, corrected_inputs, output_gradients, suffix_of
from fxquant.reconstruction.learners import Learners, put_modules
from fxquant.reconstruction.losses import channel_loss
from fxquant.reconstruction.network import with_features
from fxquant.reconstruction.norms import NORMS, FoldedNorm, norm_distance

COUNT = 18
ROWS = torch.tensor([4, 0, 17, 4])
NAMES = ["residual", "mobile", "dense", "shuffle", "squeeze_excite", "attention", "one_dimension", "transposed"]


@pytest.mark.parametrize("name", NAMES)
def test_float_outputs_lead_to_the_logits_of_the_float_network(name):
    teacher = prepared(name)
    x = images(COUNT)
    walk, seen = walk_over(teacher, teacher, x), 0
    for visit in walk:
        outputs = tuple(value.clone().requires_grad_() for value in visit.targets(ROWS))
        logits = suffix_of(walk, visit.index)(outputs, ROWS)
        torch.testing.assert_close(logits, teacher(x)[ROWS], rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(logits.square().sum(), outputs)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        seen += 1
    assert seen == sum(1 for unit in walk.units if unit.layers)
    assert all(part.grad is None for part in teacher.parameters())


def test_float_outputs_lead_to_the_logits_in_the_net_of_conftest(net, images):
    x = torch.cat(images)
    teacher = prepared(trace(net, x[:2]))
    walk = walk_over(teacher, teacher, x)
    for visit in walk:
        logits = suffix_of(walk, visit.index)(visit.targets(ROWS), ROWS)
        torch.testing.assert_close(logits, net(x)[ROWS], rtol=1e-3, atol=1e-3)


def float_behind(teacher: GraphModule, student: GraphModule, walk, index: int) -> GraphModule:
    """Return the student with all units behind `index` float."""
    whole, behind = fork(student), {name for unit in walk.units[index + 1 :] for name in unit.nodes}
    for node, part in list(called(student)):
        is_quantizer = isinstance(part, UniformQuantizer)
        if (node.args[0].name if is_quantizer else node.name) in behind:
            put_modules(whole, {str(node.target): nn.Identity() if is_quantizer else teacher.get_submodule(str(node.target))})
    return whole


@pytest.mark.parametrize(("name", "layer"), [("residual", "layers.0.conv1"), ("dense", "conv1"), ("mobile", "b.3")])
@pytest.mark.parametrize("activations", [True, False])
def test_output_gradients_are_those_of_the_whole_network(name, layer, activations):
    teacher, student = pair(name, 3, 3)
    x = images(COUNT)
    walk = walk_over(teacher, student, x, activations=activations)
    visit = visit_to(walk, layer)
    logits = 3 * torch.randn(COUNT, 5)
    names, read = output_gradients(visit, suffix_of(walk, visit.index), logits, batch=7)
    assert names == [f"gradient:{output}" for output in visit.unit.outputs] and set(names) <= set(visit.store.names)
    whole = float_behind(teacher, student, walk, visit.index)
    if not activations:  # the first phase of BRECQ: weights alone
        whole = Learners(whole, None, None, float_activations=True).graph
    known = {node.name for node in whole.graph.nodes}
    places = [f"activations_{output}" if f"activations_{output}" in known else output for output in visit.unit.outputs]
    expected = []
    for rows in torch.arange(COUNT).split(7):
        y, values = with_features(whole, places)(x[rows].requires_grad_())
        loss = -(logits[rows].softmax(1) * y.log_softmax(1)).sum() / 7  # the last batch is smaller, its images weigh as much
        expected.append([gradient.abs() + 1 for gradient in torch.autograd.grad(loss, values)])
    for mine, parts in zip(read(torch.arange(COUNT)), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine - 1, torch.cat(parts) - 1, rtol=1e-2, atol=1e-6)
        assert (mine > 1).any()


# ---- distribution correction ----


def corrected(name: str, layer: str, **fields):
    teacher, student = pair(name, 3, 3)
    visit = visit_to(walk := walk_over(teacher, student, images(COUNT)), layer)
    recipe = Recipe.PDQUANT.replace(**{"unit_correction_iterations": 20, "unit_batch": 9, "unit_correction_rate": 1e-2, **fields})
    told: list[str] = []
    found = corrected_inputs(visit, walk, teacher.meta[NORMS], COUNT, recipe, lambda done, of, text: told.append(text))
    assert told == [f"correcting inputs: {start} of {COUNT} images" for start in range(0, COUNT, recipe.unit_batch) if found[0]]
    return teacher, visit, *found


def distances(visit, inputs, norms) -> float:
    found = [(node.name, norms[str(node.target)]) for node, _ in called(visit.teacher) if str(node.target) in norms]
    _, values = with_features(visit.teacher, [name for name, _ in found])(*inputs)
    return sum(norm_distance(value, norm).item() for value, (_, norm) in zip(values, found, strict=True))


@pytest.mark.parametrize(
    ("name", "layer"), [("residual", "layers.0.conv1"), ("residual", "layers.1.conv1"), ("mobile", "c.0"), ("chain", "0")]
)
def test_correction_brings_the_statistics_closer_and_makes_targets_anew(name, layer):
    teacher, visit, names, read = corrected(name, layer, unit_correction_pull=0.1)
    everything = torch.arange(COUNT)
    inputs, targets = read(everything)
    floats = visit.floats(everything)
    norms = teacher.meta[NORMS]
    assert distances(visit, inputs, norms) < 0.95 * distances(visit, floats, norms)
    assert not torch.equal(inputs[0], floats[0])
    torch.testing.assert_close(targets[0], visit.teacher(*inputs), rtol=1e-4, atol=1e-5)
    assert set(names) == {f"corrected:{node}" for node in (*visit.unit.inputs, *visit.unit.outputs)} <= set(visit.store.names)
    assert all(part.grad is None for part in teacher.parameters())
    some_inputs, some_targets = read(ROWS)
    assert torch.equal(some_inputs[0], inputs[0][ROWS]) and torch.equal(some_targets[0], targets[0][ROWS])
    *_, held = corrected(name, layer, unit_correction_pull=1e6)  # Adam's steps around the start are all that is left
    assert (held(everything)[0][0] - floats[0]).abs().max() < (inputs[0] - floats[0]).abs().max()


def test_correction_of_the_first_step_follows_the_gradient_of_the_formula():
    teacher, visit, _, read = corrected("residual", "layers.0.conv1", unit_correction_iterations=1, unit_batch=COUNT)
    x = visit.floats(torch.arange(COUNT))[0].requires_grad_()
    norms = teacher.meta[NORMS]
    paths = [path for path in visit.unit.layers if path in norms]
    names = [node.name for node, _ in called(visit.teacher) if str(node.target) in paths]
    _, values = with_features(visit.teacher, names)(x)
    loss = 0.0
    for value, path in zip(values, paths, strict=True):
        norm = norms[path]
        y = (value - norm.shift.view(-1, 1, 1)) / norm.factor.view(-1, 1, 1)
        mean, deviation = y.mean((2, 3)), y.std((2, 3))
        loss = loss + ((norm.mean - mean).square().sum(1) + (norm.deviation - deviation).square().sum(1)).mean()
    (gradient,) = torch.autograd.grad(loss, x)
    moved = read(torch.arange(COUNT))[0][0] - x.detach()
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(moved[clear], -1e-2 * gradient[clear].sign(), rtol=1e-2, atol=1e-5)  # Adam's first step


def test_the_rate_of_the_correction_falls_as_the_recipe_says():
    """Without patience, under a pull that every step makes worse, from the second step that is no better on."""
    given = {"name": "residual", "layer": "layers.0.conv1", "unit_correction_pull": 1e6, "unit_correction_iterations": 6}
    everything = torch.arange(COUNT)

    def moved(**fields) -> torch.Tensor:
        _, visit, _, read = corrected(**given, **fields)
        return (read(everything)[0][0] - visit.floats(everything)[0]).abs().mean()

    patient = moved(unit_correction_patience=100)
    assert moved(unit_correction_patience=0, unit_correction_decay=0.01) < 0.9 * patient
    assert moved(unit_correction_patience=0, unit_correction_decay=0.01, unit_correction_least_rate=1e-2) == patient


def test_statistics_that_match_already_change_nothing():
    teacher, student = pair("residual", 3, 3)
    path, node = "stem.0", next(node for node in teacher.graph.nodes if node.target == "stem.0")
    x = images(1).expand(COUNT, -1, -1, -1).contiguous()  # one image, so that its statistics can be those of the norm
    value = with_features(teacher, [node.name])(x)[1][0].detach()[0].flatten(1)
    norm = FoldedNorm(value.mean(1), value.std(1) + 1e-6, torch.ones(len(value)), torch.zeros(len(value)))
    walk = walk_over(teacher, student, x)
    visit = visit_to(walk, "stem.0")
    recipe = Recipe.PDQUANT.replace(unit_correction_iterations=5)
    _, read = corrected_inputs(visit, walk, {path: norm}, COUNT, recipe, lambda *said: None)
    rate = Recipe.PDQUANT.unit_correction_rate
    assert norm_distance(value.view(1, len(value), 16, 16), norm) < 1e-9
    moved = read(torch.arange(COUNT))[0][0] - x
    assert moved.abs().max() <= 5.01 * rate  # Adam turns rounding noise into steps; they are no more than that
    assert channel_loss(moved, torch.zeros_like(moved)) < 3 * (5 * rate) ** 2


def test_units_without_norms_are_not_corrected():
    _, visit, _, read = corrected("residual", "fc.3")
    inputs, targets = read(ROWS)
    assert torch.equal(inputs[0], visit.floats(ROWS)[0])
    torch.testing.assert_close(targets[0], visit.targets(ROWS)[0])


# ---- ranges behind the quantized prefix ----


def test_ranges_are_chosen_again_from_what_reaches_the_unit():
    teacher, student = pair("residual", 2, 2)
    visit = visit_to(walk_over(teacher, student, images(COUNT)), "layers.1.conv1")
    others = {str(node.target): part for node, part in called(student)}
    inside = [str(node.target) for node, part in called(visit.student) if isinstance(part, UniformQuantizer)]
    assert len(inside) == 2
    recipe = Recipe.PDQUANT.replace(activation_range="minmax")
    few = recipe.replace(unit_range_images=2)
    choose_ranges_again(visit, copy.deepcopy(student), few)
    assert_ends(visit, inside, torch.arange(2))
    choose_ranges_again(visit, student, recipe)
    for path, old in others.items():
        new = student.get_submodule(path)
        assert (new is old) == (path not in inside)
        if path in inside:
            assert torch.equal(visit.student.get_submodule(path).scale, new.scale)
            assert new.spec == old.spec and new.scale != old.scale
    assert_ends(visit, inside, torch.arange(COUNT))


def assert_ends(visit, inside: list[str], rows: torch.Tensor) -> None:
    env = torch.fx.Interpreter(visit.student)
    env.garbage_collect_values = False
    with torch.no_grad():
        env.run(*visit.quantized(rows))
    for node, part in called(visit.student):
        if str(node.target) in inside:  # with "minmax", the ends of the grid are those of what it reads
            seen = env.env[node.args[0]]
            assert part.scale.item() == pytest.approx((seen.max() - seen.min().clamp(max=0)).item() / 3, rel=1e-2)
