"""FinishNetwork: what it trains, what it leaves, in both of its stages."""

from __future__ import annotations

import pytest
import torch
from nets import classes, images, names, ops, prepared

from fxquant.calibration import activation_quantizers, weight_quantizers
from fxquant.graph import called
from fxquant.passes import FinishNetwork, InsertFakeQuant, InsertObservers
from fxquant.placement import place
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.recipe import Recipe

RECIPE = Recipe.FINISH.replace(finish_iterations=6, finish_batch=4, finish_checks=6, finish_warmup=0.0)
X = images(12)


@pytest.fixture(scope="module")
def nets():
    return pair(2, 3)


def pair(w, a):
    """Return the float graph and the quantized one."""
    teacher = prepared("residual")
    plan = place(teacher, w, a)
    observed = InsertObservers(plan)(teacher).graph_module
    with torch.no_grad():
        observed(X)
    return teacher, InsertFakeQuant(plan, activation_quantizers(RECIPE), weight_quantizers(RECIPE))(observed).graph_module


def finished(nets, stage="finish", **changes):
    step = FinishNetwork(nets[0], [X], [X], RECIPE.replace(**changes), 0, torch.device("cpu"), stage)
    return step(nets[1]).graph_module, step.log


def test_the_graph_stays_and_the_values_move(nets, untouched):
    with untouched(nets[1]):
        new, log = finished(nets)
    assert (names(new), ops(new), classes(new)) == (names(nets[1]), ops(nets[1]), classes(nets[1]))
    assert log.count == sum(isinstance(module, UniformQuantizer | QuantizedLayer) for _, module in called(new))
    assert "6 steps of 4 views" in log.notes[0] and "1 images held out" in log.notes[0]
    moved = [
        not torch.equal(a.weight, b.weight) for (_, a), (_, b) in zip(called(new), called(nets[1]), strict=True) if hasattr(a, "weight")
    ]
    assert any(moved)


def test_it_says_whether_channels_are_held(nets):
    held, free = "held to the float moments while training", "not held to the float moments: scales or biases"
    for changes, expected in (({}, held), ({"finish_scale_rate": 0.0}, free), ({"finish_match": False}, None)):
        notes = [note for note in finished(nets, **changes)[1].notes if "moments" in note]
        assert len(notes) == (expected is not None) and all(expected in note for note in notes)


def test_units_of_which_it_matches_the_outputs_are_as_long_as_the_recipe_says(nets):
    few, more = (FinishNetwork(nets[0], [X], [X], RECIPE.replace(unit_longest=most), 0, X.device).training(nets[1]) for most in (12, 2))
    assert len(few.teacher(X)[1]) < len(more.teacher(X)[1])


def test_output_kl_moves_zero_points_and_scales_and_no_integer(nets):
    new, _ = finished(nets, "output_kl", output_kl_iterations=20, output_kl_zero_point_rate=1.0, output_kl_rate=1e-2, output_kl_penalty=0.0)
    pairs = [(a, b) for (_, a), (_, b) in zip(called(new), called(nets[1]), strict=True)]
    activations = [(a, b) for a, b in pairs if isinstance(a, UniformQuantizer)]
    assert any(a.zero_point != b.zero_point for a, b in activations)
    assert all(a.zero_point == a.zero_point.round() for a, _ in activations)
    assert any(a.scale != b.scale for a, b in activations)
    for a, b in pairs:
        if isinstance(a, QuantizedLayer):
            assert torch.equal(a.codes(), b.codes())
            assert torch.equal(a.bias, b.bias)


def test_held_where_it_is_by_the_penalty(nets):
    free, _ = finished(nets, "output_kl", output_kl_iterations=10, output_kl_rate=1e-2, output_kl_penalty=0.0)
    held, _ = finished(nets, "output_kl", output_kl_iterations=10, output_kl_rate=1e-2, output_kl_penalty=1e6)

    def distance(new):
        pairs = zip(called(new), called(nets[1]), strict=True)
        return sum((a.scale / b.scale - 1).abs().item() for (_, a), (_, b) in pairs if isinstance(a, UniformQuantizer))

    assert distance(held) < 0.5 * distance(free)


@pytest.mark.parametrize("stage", ["finish", "output_kl"])
def test_no_iterations(nets, stage):
    new, log = finished(nets, stage, finish_iterations=0, output_kl_iterations=0)
    assert new is nets[1]
    assert log.notes == ["0 iterations: nothing was learned"]


@pytest.mark.parametrize(("power", "factor"), [(0.0, 1), (1.0, 64), (1.25, 64**1.25)])
def test_weights_of_more_levels_move_faster(nets, power, factor):
    recipe = RECIPE.replace(finish_weight_rate=0.01, finish_level_power=power)
    training = FinishNetwork(nets[0], [X], [X], recipe, 0, torch.device("cpu")).training(nets[1])
    rates = {id(parameter): rate for parameters, rate in training.groups for parameter in parameters}
    bits = {learner.spec.bits: rates[id(learner.latent)] for learner in training.latents}
    assert bits == pytest.approx({2: 0.01, 8: 0.01 * factor})


@pytest.mark.parametrize(("w", "a", "factor"), [(2, 4, 1), (4, 2, 1), (3, 4, 0.5), (4, 4, 0.25)])
@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
def test_everything_moves_slower_the_finer_the_coarsest_grid(w, a, factor, power):
    teacher, student = pair(w, a)
    recipe = RECIPE.replace(
        finish_level_power=0.0,
        finish_fine_power=power,
        finish_weight_rate=0.01,
        finish_scale_rate=0.002,
        finish_activation_rate=0.003,
        finish_bias_rate=0.004,
        finish_color=0.4,
    )
    training = FinishNetwork(teacher, [X], [X], recipe, 0, torch.device("cpu")).training(student)
    wanted = [rate * factor**power for rate in (0.01, 0.002, 0.003, 0.004)]
    assert sorted({rate for _, rate in training.groups}) == pytest.approx(sorted(wanted))
    assert training.views.color == pytest.approx(0.4 * factor ** (2 * power))
