"""Learning one unit: the loss written out, what gets gradients, what is drawn and dropped, and what happens when it diverges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from nets import Net, head, images
from test_learners import pair, partly, visit_to, walk_over
from torch import Tensor, nn

from fxquant import execution
from fxquant.graph import called, fork
from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.layers import QuantizedLayer
from fxquant.reconstruction import unit as module
from fxquant.reconstruction.guidance import suffix_of
from fxquant.reconstruction.learners import put_modules
from fxquant.reconstruction.unit import UnitData, UnitLearning, UnitSettings, learn_unit

COUNT = 24
PLAIN = UnitSettings(iterations=60, batch=8, rounding_rate=1e-2, activation_rate=1e-3)
ROWS = torch.tensor([3, 0, 11, 23, 3])


def quiet(done: float, total: float, text: str) -> None: ...


def data_of(name: str | nn.Module = "residual", layer: str = "layers.0.conv1", w: int = 2, a: int | None = 2, **options) -> UnitData:
    teacher, student = pair(name, w, a)
    walk = walk_over(teacher, student, images(COUNT), **options)
    data = UnitData(visit_to(walk, layer), COUNT)
    data.walk = walk  # type: ignore[attr-defined]
    return data


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared error, summed over channels, averaged over all else."""
    return (a - b).square().sum(1).mean()


def penalty(learning: UnitLearning, beta: float) -> Tensor:
    hardness = [(1.2 * soft.alpha.sigmoid() - 0.1).clamp(0, 1) for soft in learning.soft]
    return torch.stack([(1 - (2 * h - 1).abs() ** beta).sum() for h in hardness]).sum()


@pytest.mark.parametrize(("done", "shape", "beta"), [(0.0, "linear", None), (0.6, "linear", 11), (0.4, "cosine", 2 + 9 * (1 + 0.5**0.5))])
def test_the_loss_is_the_formula(done, shape, beta):
    data = data_of()
    learning = UnitLearning(data, replace(PLAIN, beta_shape=shape, rounding_weight=0.07), 0)
    out, target = learning.learners.graph(*data.visit.quantized(ROWS)), data.visit.targets(ROWS)[0]
    expected = distance(out, target) + (0.07 * penalty(learning, beta) if beta else 0)
    torch.testing.assert_close(learning.loss(ROWS, done), expected)


def test_targets_and_inputs_are_those_of_both_networks():
    teacher, student = pair("residual", 2, 2)
    x = images(COUNT)
    visit = visit_to(walk_over(teacher, student, x), "layers.1.conv1")
    floats, quantized = (torch.fx.Interpreter(gm) for gm in (teacher, student))
    for side in (floats, quantized):
        side.garbage_collect_values = False
        side.run(x)
    values = [{node.name: value for node, value in side.env.items()} for side in (floats, quantized)]
    (name,), (output,) = visit.unit.inputs, visit.unit.outputs
    torch.testing.assert_close(visit.floats(ROWS)[0], values[0][name][ROWS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visit.quantized(ROWS)[0], values[1][f"activations_{name}"][ROWS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visit.targets(ROWS)[0], values[0][output][ROWS], rtol=1e-4, atol=1e-5)


def test_the_first_soft_unit_with_float_activations_is_the_float_unit():
    data = data_of(w=8, layer="stem.0", activations=False)
    learning = UnitLearning(data, replace(PLAIN, activations=False), 0)
    power = data.visit.targets(ROWS)[0].square().sum(1).mean()
    assert learning.loss(ROWS, 0.0) < 1e-6 * power
    assert not learning.learners.activations


@pytest.mark.parametrize("fisher", ["diagonal", "full"])
def test_fisher_losses(fisher):
    data = data_of()
    gradient = torch.rand(COUNT, *data.visit.targets(ROWS)[0].shape[1:]) + 1
    data.gradients = lambda rows: (gradient[rows],)
    learning = UnitLearning(data, replace(PLAIN, fisher=fisher, p=2.4), 0)
    error = (learning.learners.graph(*data.visit.quantized(ROWS)) - data.visit.targets(ROWS)[0]) * gradient[ROWS]
    full = (error.abs().sum((1, 2, 3), keepdim=True) * error.abs()).mean() / 100
    torch.testing.assert_close(learning.loss(ROWS, 0.0), full if fisher == "full" else error.square().sum(1).mean())


@pytest.mark.parametrize("layer", ["stem.0", "layers.0.conv1", "layers.1.conv1", "fc.3"])
def test_the_kl_behind_the_float_rest_reaches_the_unit_alone(layer):
    """Loss and gradients equal those of the whole network, run from the images: quantized, learning, float."""
    teacher, student = pair("residual", 3, 3)
    for model in (teacher, student):
        model.requires_grad_(True)
    x = images(COUNT)
    walk = walk_over(teacher, student, x)
    visit = visit_to(walk, layer)
    logits = 3 * torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(0))  # no teacher's, so that the KL is large
    data = UnitData(visit, COUNT, suffix=suffix_of(walk, visit.index), logits=logits)
    learning = UnitLearning(data, replace(PLAIN, kl_weight=10.0, kl_temperature=3.0), 0)
    assert learning.at_once == PLAIN.batch
    loss = learning.loss(ROWS, 0.0)
    loss.backward()
    got = [parameter.grad.clone() for parameter in learning.parameters]

    whole = fork(student)
    behind = {name for unit in walk.units[visit.index + 1 :] for name in unit.nodes}
    for node, part in list(called(student)):
        parent = node.args[0].name if isinstance(part, UniformQuantizer) else node.name
        path = str(node.target)
        if parent in behind:
            put_modules(whole, {path: nn.Identity() if isinstance(part, UniformQuantizer) else teacher.get_submodule(path)})
    put_modules(whole, {str(node.target): part for node, part in called(learning.learners.graph)})
    p, q = (logits[ROWS] / 3).softmax(1), (whole(x[ROWS]) / 3).log_softmax(1)
    kl = (p * (p.log() - q)).sum(1).mean()
    expected = distance(learning.learners.graph(*visit.quantized(ROWS)), visit.targets(ROWS)[0]) + 10 * kl
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert all(part.grad is None for model in (teacher, student) for part in model.parameters())
    assert kl > 0.1
    for mine, theirs in zip(got, torch.autograd.grad(expected, learning.parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7)
    only_kl = torch.autograd.grad(10 * kl_of(data, learning), learning.parameters)
    assert all(gradient.abs().sum() > 0 for gradient in only_kl)


def test_a_part_is_half_as_large_where_two_sides_go_through_the_unit_together(monkeypatch):
    data = data_of()
    monkeypatch.setattr(execution, "LARGEST_VALUE", 6 * 4 * 512)
    assert UnitLearning(data, PLAIN, 0).at_once == 6
    data.suffix, data.logits = (lambda outputs, rows: outputs[0].flatten(1)), torch.zeros(COUNT, 5)
    assert UnitLearning(data, PLAIN, 0).at_once == 3


def kl_of(data: UnitData, learning: UnitLearning) -> Tensor:
    q = (data.suffix(learning.outputs(data.visit.quantized(ROWS)), ROWS) / 3).log_softmax(1)
    return -((data.logits[ROWS] / 3).softmax(1) * q).sum(1).mean()


@pytest.mark.parametrize("drop", [0.5, 0.2])
def test_the_input_is_mixed_elementwise_and_the_prediction_sees_the_quantized_one(drop):
    data, seen = data_of(), []
    data.suffix, data.logits = lambda outputs, rows: outputs[0].mean((2, 3)), torch.randn(COUNT, 8)
    learning = UnitLearning(data, replace(PLAIN, input_drop=drop, kl_weight=1.0), 0)
    outputs = learning.outputs
    learning.outputs = lambda inputs: seen.append(inputs[0]) or outputs(inputs)
    learning.loss(ROWS, 0.0)
    (x,), (q,) = data.visit.floats(ROWS), data.visit.quantized(ROWS)
    mixed, plain = seen[0].split(len(ROWS))
    assert torch.equal(plain, q)
    assert ((mixed == x) | (mixed == q)).all()
    differ = x != q
    assert abs((mixed == x)[differ].float().mean() - drop) < 0.03


def test_activations_are_dropped_while_it_learns_and_not_behind():
    learning = UnitLearning(data_of(), replace(PLAIN, iterations=1, drop=0.5), 0)
    quantizers = list(learning.learners.activations.values())
    seen = []
    assert quantizers and all(quantizer.drop == 0 for quantizer in quantizers)
    assert learning.run(lambda *_: seen.extend(quantizer.drop for quantizer in quantizers))
    assert set(seen) == {0.5} and all(quantizer.drop == 0 for quantizer in quantizers)


def test_rates_of_the_groups(monkeypatch):
    """Rounding at a constant rate; scales and biases along a cosine."""
    rates: list[list[float]] = []

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(module.torch.optim, "Adam", Watched)
    settings = replace(PLAIN, iterations=4, scale_rate=2e-4, bias_rate=3e-4, activation_rate=4e-4)
    learning = UnitLearning(data_of(), settings, 0, factor=0.1)
    groups = [len(group["params"]) for group in learning.groups]
    assert groups == [2, 2, 2, 2]
    learning.run(quiet)
    factors = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == [pytest.approx([1e-3, 2e-5 * f, 3e-5 * f, 4e-5 * f], rel=1e-5) for f in factors]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"activation_rate": 0.0}, {"alpha"}),
        ({"rounding_rate": 0.0}, {"scale"}),
        ({"rounding_rate": 0.0, "bias_rate": 1e-3, "activation_rate": 0.0}, {"bias"}),
        ({"activations": False, "scale_rate": 1e-4}, {"alpha", "scale"}),
    ],
)
def test_only_what_has_a_rate_is_learned(changes, names):
    data = data_of()
    before = {str(node.target): part for node, part in called(data.visit.student)}
    outcome = learn_unit(data, replace(PLAIN, iterations=3, **changes), 0, quiet)
    assert outcome.modules
    for path, new in outcome.modules.items():
        old = before[path]
        if isinstance(new, QuantizedLayer):
            assert torch.equal(new.bias, old.bias) == ("bias" not in names)
            assert torch.equal(new.weight_quantizer.scale, old.weight_quantizer.scale) == ("scale_rate" not in changes)
            if "alpha" not in names:
                assert torch.equal(new.codes(), old.codes())
        else:
            assert torch.equal(new.scale, old.scale) == ("scale" not in names)


@pytest.mark.parametrize(
    ("name", "layer"), [("residual", "layers.0.conv1"), ("residual", "fc.3"), ("mobile", "c.0"), ("one_dimension", "layers.0")]
)
def test_learning_lowers_the_error_and_reports_it_as_it_is(name, layer):
    data = data_of(name, layer, 2, None)
    visit = data.visit
    outcome = learn_unit(data, replace(PLAIN, iterations=300), 0, quiet)
    assert outcome.name == visit.unit.name and not outcome.note
    assert outcome.behind < 0.9 * outcome.before
    graph, errors = fork(visit.student), []
    rows = torch.arange(COUNT)
    for modules in ({}, outcome.modules):
        put_modules(graph, modules)
        with torch.no_grad():
            target = visit.targets(rows)[0]
            errors.append(((graph(*visit.quantized(rows)) - target).square().sum() / target.square().sum()).item())
    assert [outcome.before, outcome.behind] == pytest.approx(errors, rel=1e-5)


def test_a_seed_gives_one_result():
    data = data_of()
    settings = replace(PLAIN, iterations=5, drop=0.5, input_drop=0.5)
    results = [learn_unit(data, settings, seed, quiet) for seed in (0, 0, 1)]
    a, b, c = ([value for part in r.modules.values() for value in part.state_dict().values()] for r in results)
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))


def test_no_iterations():
    outcome = learn_unit(data_of(), replace(PLAIN, iterations=0), 0, quiet)
    assert outcome.note == "nothing to learn" and not outcome.modules and outcome.before == outcome.behind > 0
    outcome = learn_unit(data_of(), replace(PLAIN, rounding_rate=0.0, activation_rate=0.0), 0, quiet)
    assert outcome.note == "nothing to learn" and not outcome.modules


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_batch_larger_than_the_set(sampling):
    learning = UnitLearning(data_of(), replace(PLAIN, batch=1000, sampling=sampling), 0)
    rows = learning.draw()
    assert len(rows) == COUNT
    assert sampling == "random" or sorted(rows.tolist()) == list(range(COUNT))
    assert learn_unit(learning.data, replace(learning.settings, iterations=2), 0, quiet).modules


@pytest.mark.parametrize("batch", [1, 6, 7, 24])
def test_epochs_draw_each_image_once_a_pass(batch):
    learning = UnitLearning(data_of(), replace(PLAIN, batch=batch, sampling="epochs"), 0)
    passes = [torch.cat([learning.draw() for _ in range(COUNT // batch)]).tolist() for _ in range(3)]
    assert all(len(set(drawn)) == len(drawn) == COUNT // batch * batch for drawn in passes)  # a last, smaller batch is left out
    assert passes[0] != passes[1] != passes[2]


def test_random_draws_are_uniform_with_replacement():
    learning = UnitLearning(data_of(), PLAIN, 0)
    counts = torch.bincount(torch.cat([learning.draw() for _ in range(3000)]), minlength=COUNT)
    assert len(counts) == COUNT and (counts - 1000).abs().max() < 150


def dead() -> nn.Module:
    silent = nn.Conv2d(3, 4, 3)
    nn.init.constant_(silent.bias, -100.0)
    return Net(lambda s, x: s.fc(s.conv(s.silent(x).relu()).relu()), silent=silent, conv=nn.Conv2d(4, 4, 3), fc=head(4))


@pytest.mark.parametrize("layer", ["silent", "conv", "fc.3"])
def test_a_unit_with_constant_input(layer):
    outcome = learn_unit(data_of(dead(), layer), replace(PLAIN, drop=0.5, input_drop=0.5), 0, quiet)
    assert outcome.note == "" and outcome.modules
    assert 0 <= outcome.behind <= 1.5 * outcome.before + 1e-12
    for part in outcome.modules.values():
        assert all(torch.isfinite(value).all() for value in part.state_dict().values())


def test_a_loss_that_is_not_finite_is_tried_again_at_a_tenth(monkeypatch):
    data, loss = data_of(), UnitLearning.loss

    def broken(self: UnitLearning, rows: Tensor, done: float) -> Tensor:
        value = loss(self, rows, done)
        return value * float("nan") if self.groups[0]["peak"] == PLAIN.rounding_rate else value

    monkeypatch.setattr(UnitLearning, "loss", broken)
    outcome = learn_unit(data, PLAIN, 5, quiet)
    assert outcome.note == "its loss was not finite at the rates given"
    assert outcome.behind <= 1.5 * outcome.before
    alone = UnitLearning(data, PLAIN, 5, 0.1)
    assert alone.run(quiet)
    expected = alone.learners.fixed()
    assert expected.keys() == outcome.modules.keys()
    for path, part in expected.items():
        assert all(map(torch.equal, part.state_dict().values(), outcome.modules[path].state_dict().values()))


@pytest.mark.parametrize(("size", "parts"), [(1, [1] * 5), (2 * 4 * 512, [2, 2, 1]), (2**20, [5])])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(monkeypatch, size, parts):
    """The largest value of the unit, and of what it reads, has 8 channels of 8 x 8."""
    learning = UnitLearning(data_of(), replace(PLAIN, bias_rate=1e-3, rounding_weight=0.07), 0)
    assert max(node.meta["val"][0].numel() for node in learning.data.visit.nodes) == 512
    learning.loss(ROWS, 0.6).backward()
    wanted = [parameter.grad.clone() for parameter in learning.parameters]
    expected, sizes = learning.loss(ROWS, 0.6).detach(), []
    monkeypatch.setattr(execution, "LARGEST_VALUE", size)
    learning.at_once = UnitLearning(learning.data, learning.settings, 0).at_once
    loss = learning.loss
    monkeypatch.setattr(learning, "loss", lambda rows, done: sizes.append(len(rows)) or loss(rows, done))
    for parameter in learning.parameters:
        parameter.grad = None
    torch.testing.assert_close(learning.backward(ROWS, 0.6), expected)
    assert sizes == parts
    torch.testing.assert_close([parameter.grad for parameter in learning.parameters], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "what"), [({"bias_rate": 1e30, "activations": False}, "not finite"), ({"bias_rate": 50.0}, "its error grew from")]
)
def test_a_unit_that_diverges_twice_is_left_as_it_was(changes, what, untouched):
    data = data_of()
    with untouched(data.visit.student):
        outcome = learn_unit(data, replace(PLAIN, **changes), 0, quiet)
    assert outcome.modules == {} and outcome.behind == outcome.before > 0
    first, second = outcome.note.split("; ")
    assert what in first and what in second
    assert first.endswith("at the rates given")
    assert second.endswith("at a tenth of the rates, so it is left as it was")


def test_infinite_importance_is_caught():
    data = data_of()
    data.gradients = lambda rows: tuple(torch.full_like(target, float("inf")) for target in data.visit.targets(rows))
    outcome = learn_unit(data, replace(PLAIN, fisher="diagonal", iterations=2), 0, quiet)
    assert outcome.modules == {} and outcome.note.count("not finite") == 2


def test_corrected_rows_take_the_place_of_the_float_ones():
    data, seen = data_of(), []
    inputs, targets = data.visit.floats(torch.arange(COUNT)), data.visit.targets(torch.arange(COUNT))
    data.corrected = lambda rows: (tuple(x[rows] + 1 for x in inputs), tuple(y[rows] - 1 for y in targets))
    learning = UnitLearning(data, replace(PLAIN, input_drop=0.5), 0)
    outputs = learning.outputs
    learning.outputs = lambda given: seen.append(given[0]) or outputs(given)
    loss = learning.loss(ROWS, 0.0)
    x, q = inputs[0][ROWS] + 1, data.visit.quantized(ROWS)[0]
    assert ((seen[0] == x) | (seen[0] == q)).all() and (seen[0] == x).any()
    torch.testing.assert_close(loss, distance(learning.learners.graph(seen[0]), targets[0][ROWS] - 1))


def test_bfloat16_multiplies_narrow_and_measures_wide():
    data = data_of()
    wide, narrow = (UnitLearning(data, replace(PLAIN, precision=word), 0).loss(ROWS, 0.0) for word in ("float32", "bfloat16"))
    assert narrow.dtype == torch.float32
    assert wide != narrow and narrow.item() == pytest.approx(wide.item(), rel=0.1)


def test_the_error_before_is_that_of_nearest_rounding():
    teacher, student = pair("residual", 2, 2)
    walk = walk_over(teacher, student, images(COUNT))
    visit = visit_to(walk, "stem.0")  # reads the images: nothing in front of it is quantized
    before = UnitLearning(UnitData(visit, COUNT), PLAIN, 0).error()
    alone = torch.fx.Interpreter(partly(teacher, student, visit.unit))
    alone.garbage_collect_values = False
    alone.run(images(COUNT))
    (name,) = visit.unit.outputs
    got = next(value for node, value in alone.env.items() if node.name == f"activations_{name}")
    target = visit.targets(torch.arange(COUNT))[0]
    assert before == pytest.approx(((got - target).square().sum() / target.square().sum()).item(), rel=1e-5)


def test_the_suffix_takes_what_autocast_gives():
    """The rest of the network is float32; what leaves the unit under autocast is bfloat16."""
    teacher, student = pair("residual", 2, 3)
    walk = walk_over(teacher, student, images(COUNT))
    visit = visit_to(walk, "layers.0.conv1")
    data = UnitData(visit, COUNT, suffix=suffix_of(walk, visit.index), logits=torch.randn(COUNT, 5))
    loss = UnitLearning(data, replace(PLAIN, kl_weight=1.0, precision="bfloat16"), 0).loss(ROWS, 0.0)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
