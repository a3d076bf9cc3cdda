"""The network-wise loop: its loss written out, what is kept, going on where it stopped, and what happens when it diverges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import Net, images
from test_learners import CPU, pair, spread
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant import execution
from fxquant.quantizers.learned import LatentWeight, LearnedQuantizer
from fxquant.reconstruction.learners import Learners, put_modules
from fxquant.reconstruction.losses import powers_of
from fxquant.reconstruction.network import NetworkSettings, NetworkTraining, with_features
from fxquant.reconstruction.views import Views
from fxquant.tree import is_logits, tensors_of
from fxquant.units import cut

COUNT = 20
X = images(COUNT)
HELD = torch.tensor([0, 5, 10, 15])
PLAIN = NetworkSettings(
    iterations=10, warmup=0.1, temperature=2.0, kl_weight=4.0, feature_weight=0.5, mix=0.0, mix_until=0.6, checks=5, averaging=0.0,
    precision="float32",
)  # fmt: skip
RATES = {"latent": 0.02, "weight scales": 1e-3, "activation scales": 1e-3, "biases": 1e-3, "zero points": 0.0}


def quiet(done: float, total: float, text: str) -> None: ...


@pytest.fixture(scope="module")
def nets() -> tuple[GraphModule, GraphModule]:
    return pair(spread("residual"), 2, 3)


def training_of(
    nets: tuple[GraphModule, GraphModule], settings: NetworkSettings = PLAIN, zero_points: bool = False, blend: float = 0.0, **rates: float
) -> NetworkTraining:
    teacher, student = nets
    learners = Learners(student, LatentWeight, lambda q: LearnedQuantizer(q, relative=True, learned_zero_point=zero_points), biases=True)
    rates = {**RATES, **rates}
    weights, activations = learners.weights.values(), learners.activations.values()
    groups = [
        ([learner.latent for learner in weights], rates["latent"]),
        ([learner.scale.value for learner in weights], rates["weight scales"]),
        ([learner.scale.value for learner in activations], rates["activation scales"]),
        (list(learners.biases.values()), rates["biases"]),
        ([learner.zero_point for learner in activations if zero_points], rates["zero points"]),
    ]
    places = [name for unit in cut(teacher) if unit.layers for name in unit.outputs]
    rest = torch.tensor([row for row in range(COUNT) if row not in HELD])
    views = Views([X], rest, [X], "crop", blend, 8, 0)
    return NetworkTraining(learners, teacher, places, views, X[HELD], groups, settings, CPU)


def loss_of(training: NetworkTraining, x: Tensor) -> Tensor:
    """Return what is minimized for a batch, as a whole."""
    taught = training._taught(x)
    return training._loss(x, taught, powers_of(taught.features), 1.0)


def values(training: NetworkTraining) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in training.parameters]


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    p, log_q = (teacher / temperature).softmax(1), (student / temperature).log_softmax(1)
    return (p * (p.log() - log_q)).sum(1).mean()


def test_the_loss_is_the_formula(nets):
    training = training_of(nets, replace(PLAIN, penalty=0.3))
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.add_(0.01)
    x = X[:6]
    places = [name for unit in cut(nets[0]) if unit.layers for name in unit.outputs]
    assert len(places) == 4
    theirs, wanted = with_features(nets[0], places)(x)
    mine, features = with_features(training.learners.graph, places)(x)
    ratio = sum((f - w).square().sum() / w.square().sum() for f, w in zip(features, wanted, strict=True)) / 4
    pull = sum((p - start).square().sum() for p, start in zip(training.parameters, training.start, strict=True))
    expected = 4 * kl(theirs, mine, 2.0) + 0.5 * ratio + 0.3 * pull
    torch.testing.assert_close(loss_of(training, x), expected, rtol=1e-4, atol=1e-5)
    plain = training_of(nets, replace(PLAIN, feature_weight=0.0, temperature=1.0, kl_weight=1.0))
    torch.testing.assert_close(loss_of(plain, x), kl(nets[0](x), nets[1](x)), rtol=1e-4, atol=1e-5)


def test_only_learners_get_gradients(nets):
    for model in nets:
        model.requires_grad_(True)
    training = training_of(nets, zero_points=True, **{"zero points": 0.01})
    loss_of(training, X[:6]).backward()
    assert all(parameter.grad is not None for parameter in training.parameters)
    assert all(part.grad is None for model in nets for part in model.parameters())


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(nets, monkeypatch, at_once, logits):
    training = training_of(nets if logits else without_logits(), replace(PLAIN, penalty=0.3))
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.add_(0.01)
    x = X[:7].clone()
    x[2] *= 1e-3  # an image of which hardly a feature is left
    loss_of(training, x).backward()
    wanted = [parameter.grad.clone() for parameter in training.parameters]
    sizes, part_of = [], training._loss
    monkeypatch.setattr(training, "at_once", at_once)
    monkeypatch.setattr(training, "_loss", lambda images, *more: sizes.append(len(images)) or part_of(images, *more))
    for parameter in training.parameters:
        parameter.grad = None
    torch.testing.assert_close(training.backward(x), loss_of(training, x).detach())
    assert sizes == {1: [1] * 7, 3: [3, 2, 2], 7: [7]}[at_once] + [7]
    torch.testing.assert_close([parameter.grad for parameter in training.parameters], wanted, rtol=1e-4, atol=1e-4)


def without_logits() -> tuple[GraphModule, GraphModule]:
    layers = {"conv": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 4, 3)}
    return pair(Net(lambda s, x: (y := s.conv(x).relu(), s.second(y))[-1], **layers), 2, 3)


def test_how_many_images_are_trained_on_at_once_follows_the_largest_value(nets, monkeypatch):
    assert training_of(nets).at_once == 128
    monkeypatch.setattr(execution, "LARGEST_VALUE", 1)
    assert training_of(nets).at_once == 1
    weights = {"conv": nn.Conv2d(3, 2, 16), "fc": nn.Linear(2, 10_000)}  # 31,538, and 10,772 values an image
    assert training_of(pair(Net(lambda s, x: s.fc(s.conv(x).flatten(1)), **weights), 2, 3)).at_once == 3


def test_the_error_on_the_held_out_images_is_the_kl_at_a_temperature_of_its_own(nets):
    training = training_of(nets, replace(PLAIN, holdout_temperature=3.0))
    for quantizer in training.learners.activations.values():
        quantizer.mix = 0.5
    assert training.held_out_errors().mean().item() == pytest.approx(9 * kl(nets[0](X[HELD]), nets[1](X[HELD]), 3.0).item(), rel=1e-4)
    assert all(quantizer.mix == 0 for quantizer in training.learners.activations.values())


def test_training_lowers_the_error_and_keeps_what_it_says(nets):
    training = training_of(nets, replace(PLAIN, iterations=60, checks=12), blend=0.5)
    outcome = training.run(quiet)
    assert outcome.behind < 0.7 * outcome.before and 0 < outcome.step <= 60 and not outcome.retried
    assert training.held_out_errors().mean().item() == pytest.approx(outcome.behind, rel=1e-6)
    student = nets[1]
    put_modules(copy := with_features(student, []), training.learners.fixed())
    assert torch.equal(copy(X)[0], training.learners.graph(X))


@pytest.mark.parametrize("latent", [0.5, 30.0])
def test_what_is_kept_is_never_worse_than_the_start(nets, latent):
    training = training_of(nets, latent=latent, biases=1.0)
    start = values(training)
    outcome = training.run(quiet)
    assert outcome.behind <= outcome.before
    assert training.held_out_errors().mean().item() == pytest.approx(outcome.behind, rel=1e-6)
    if outcome.step == 0:
        assert all(map(torch.equal, values(training), start)) and outcome.behind == outcome.before


FAR = [[1.0, 1.1, 0.9, 1.0], [0.2, 0.3, 0.1, 0.2], [0.5, 0.6, 0.4, 0.5]]
NOISY = [[1.0, 9.0, 3.0, 2.0], [0.5, 8.0, 2.0, 1.5], [0.9, 7.0, 2.9, 1.5]]


@pytest.mark.parametrize(
    ("errors", "margin", "kept"),
    [
        (FAR, 2.0, 2),  # by .3 on each image, and always the same: the earlier state is the better one
        (NOISY, 2.0, 4),  # .4, .9 and 0 worse, and 1 better: that says nothing, and the last state stays
        (NOISY, 0.0, 2),  # the best
        ([NOISY[0], NOISY[1], [0.4, 13.0, 1.9, 1.4]], 2.0, 2),  # the last one is no better than the start
        ([NOISY[0], NOISY[2], NOISY[1]], 2.0, 4),
        ([[1.0] * 4, [0.5] * 4, [0.6, 0.8, 0.7, 0.9]], 2.0, 2),  # .25 on average, with a standard error of .065
        ([[1.0] * 4, [0.5] * 4, [0.6, 0.8, 0.7, 0.9]], 5.0, 4),
        ([[1.0], [0.4], [0.5]], 2.0, 4),  # a single image has no standard error, and says nothing,
        ([[1.0], [0.4], [0.5]], 0.0, 2),  # unless nothing more is asked for
        ([[1.0] * 4, [1.1] * 4, [1.05] * 4], 2.0, 0),
    ],
)
def test_the_last_state_is_kept_unless_an_earlier_one_is_clearly_better(nets, monkeypatch, errors, margin, kept):
    training = training_of(nets, replace(PLAIN, iterations=4, checks=2, margin=margin))
    told, states = iter(errors), []
    monkeypatch.setattr(training, "held_out_errors", lambda: torch.tensor(next(told, errors[-1])))
    outcome = training.run(quiet, keep=lambda state: states.append([state[f"now.{index}"].clone() for index in range(len(training.start))]))
    assert (outcome.step, outcome.behind) == (kept, pytest.approx(torch.tensor(errors[kept // 2]).mean().item()))
    assert all(map(torch.equal, values(training), [training.start, *states][kept // 2]))


def test_going_on_remembers_the_errors_of_what_was_kept(nets, monkeypatch):
    settings, states = replace(PLAIN, iterations=4, checks=2), []

    def run(errors: list[list[float]], state: dict[str, Tensor] | None) -> int:
        training, told = training_of(nets, settings), iter(errors)
        monkeypatch.setattr(training, "held_out_errors", lambda: torch.tensor(next(told)))
        return training.run(quiet, state, lambda reached: states.append({name: value.clone() for name, value in reached.items()})).step

    assert run(FAR, None) == 2
    assert run([FAR[0], FAR[2]], states[0]) == 2


@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("stop", [2, 6])
def test_going_on_at_a_check_gives_the_same_bit_for_bit(nets, averaging, stop):
    settings = replace(PLAIN, averaging=averaging, mix=0.5)
    straight = training_of(nets, settings, blend=0.5)
    first = straight.run(quiet)
    states: dict[int, dict[str, Tensor]] = {}

    class Stopped(Exception): ...

    def keep(state: dict[str, Tensor]) -> None:
        states[int(state["figures"][0])] = {name: value.clone() for name, value in state.items()}
        if len(states) == stop // 2:
            raise Stopped

    with pytest.raises(Stopped):
        training_of(nets, settings, blend=0.5).run(quiet, keep=keep)
    assert max(states) == stop
    again = training_of(nets, settings, blend=0.5)
    second = again.run(quiet, states[stop])
    assert first == second
    assert all(map(torch.equal, values(straight), values(again)))


def test_going_on_behind_the_last_check(nets):
    states = []
    straight = training_of(nets)
    first = straight.run(quiet, keep=lambda state: states.append({name: value.clone() for name, value in state.items()}))
    assert [int(state["figures"][0]) for state in states] == [2, 4, 6, 8, 10]
    again = training_of(nets)
    assert again.run(quiet, states[-1]) == first
    assert all(map(torch.equal, values(straight), values(again)))


def poison(training: NetworkTraining, times: int) -> None:
    """Make the first `times` attempts give a loss that is not finite, at their first step."""
    loss, seen = training._loss, []

    def broken(*given: Any) -> Tensor:
        value = loss(*given)
        seen.append(0)
        return value * float("nan") if len(seen) <= times else value

    training._loss = broken


def test_a_loss_that_is_not_finite_is_tried_again_at_a_tenth(nets):
    training = training_of(nets)
    poison(training, 1)
    outcome = training.run(quiet)
    assert outcome.retried and outcome.behind <= outcome.before
    slow = training_of(nets)
    slow.groups = [(parameters, 0.1 * rate) for parameters, rate in slow.groups]
    assert replace_retried(slow.run(quiet)) == replace_retried(outcome)
    assert all(map(torch.equal, values(training), values(slow)))


def test_a_loss_that_grows_and_stays_finite_is_tried_again_at_a_tenth(nets):
    training = training_of(nets, biases=0.5)
    outcome = training.run(quiet)
    assert outcome.retried and outcome.behind <= outcome.before
    slow = training_of(nets, biases=0.5)
    slow.groups = [(parameters, 0.1 * rate) for parameters, rate in slow.groups]
    assert slow.run(quiet).behind == outcome.behind


def test_fine_grids_do_not_diverge_where_nothing_is_left_to_learn():
    """The error at eight bits is noise around zero, and its sign says nothing."""
    training = training_of(pair(spread("residual"), 8, 8))
    assert not training.run(quiet).retried


def replace_retried(outcome):
    return replace(outcome, retried=False)


def test_a_training_that_diverges_twice_leaves_all_as_it_was(nets):
    training = training_of(nets)
    start = values(training)
    poison(training, 2)
    outcome = training.run(quiet)
    assert outcome.retried and outcome.step == 0 and outcome.behind == outcome.before
    assert all(map(torch.equal, values(training), start))


@pytest.mark.parametrize("rates", [{"biases": 1e30}, {"biases": float("inf")}])
def test_absurd_rates(nets, rates):
    training = training_of(nets, **rates)
    start = values(training)
    outcome = training.run(quiet)
    assert outcome.behind == outcome.before and outcome.step == 0
    assert all(map(torch.equal, values(training), start))


def test_going_on_within_the_second_attempt(nets):
    """A run that diverged, began again at a tenth of the rates and was stopped there has to go on at a tenth."""
    states = []
    straight = training_of(nets)
    poison(straight, 1)
    first = straight.run(quiet, keep=lambda state: states.append({name: value.clone() for name, value in state.items()}))
    again = training_of(nets)
    second = again.run(quiet, states[1])
    assert all(map(torch.equal, values(straight), values(again)))
    assert first == second


def test_a_huge_penalty_keeps_everything_at_the_start(nets):
    """Adam's steps have the size of the rate whatever the gradient; only their direction tells: they lead back."""
    free, held = (training_of(nets, replace(PLAIN, iterations=40, penalty=penalty), latent=0.0, biases=0.0) for penalty in (0.0, 1e6))
    moved = []
    for training in (free, held):
        last = {}
        training.run(quiet, keep=lambda state, last=last: last.update({name: value.clone() for name, value in state.items()}))
        ends = [last[f"now.{index}"] for index in range(len(training.parameters))]
        moved.append(sum((end - start).abs().sum() for end, start in zip(ends, training.start, strict=True)))
    assert moved[1] < 0.2 * moved[0]


def test_the_average_is_the_moving_average_of_all_steps(nets):
    training, states = training_of(nets, replace(PLAIN, averaging=0.3, checks=10)), []
    training.run(quiet, keep=lambda state: states.append({name: value.clone() for name, value in state.items()}))
    for index, average in enumerate(training.start):
        for step, state in enumerate(states):
            decay = min(0.3, (step + 1) / (step + 10))
            average = decay * average + (1 - decay) * state[f"now.{index}"]
            torch.testing.assert_close(state[f"average.{index}"], average, rtol=1e-4, atol=1e-6)


def test_the_kept_average_is_what_was_measured(nets):
    training = training_of(nets, replace(PLAIN, iterations=40, averaging=0.9))
    outcome = training.run(quiet)
    assert outcome.step > 0 and outcome.behind < outcome.before
    assert training.held_out_errors().mean().item() == pytest.approx(outcome.behind, rel=1e-6)


def test_rates_rise_and_fall_and_the_float_share_falls(nets, monkeypatch):
    rates, shares = [], []

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            shares.append([quantizer.mix for quantizer in training.learners.activations.values()])
            return super().step(closure)

    training = training_of(nets, replace(PLAIN, warmup=0.2, mix=0.4, mix_until=0.5))
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    training.run(quiet)
    peaks = [0.02, 1e-3, 1e-3, 1e-3]
    half = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 8)).item())
    for step, factor in ((0, 0), (1, 0.5), (2, 1), (5, half), (6, 0.5)):
        assert rates[step] == pytest.approx([factor * peak for peak in peaks], rel=1e-5)
    assert [set(share) for share in shares] == [{max(0.0, 0.4 * (1 - step / 10 / 0.5))} for step in range(10)]
    assert {quantizer.mix for quantizer in training.learners.activations.values()} == {0.0}


def test_latent_weights_stay_within_reach(nets):
    training = training_of(nets, latent=5.0)
    states = []
    training.run(quiet, keep=lambda state: states.append([state[f"now.{index}"].clone() for index in range(len(training.latents))]))
    for learner, *ends in zip(training.latents, *states, strict=True):
        zero_point = learner.zero_point.view(-1, *[1] * (learner.latent.ndim - 1))
        for value in ends:
            assert (value >= learner.spec.qmin - zero_point - 0.5).all() and (value <= learner.spec.qmax - zero_point + 0.5).all()


def test_a_network_without_logits_is_trained_by_its_features():
    teacher, student = pair("several_outputs", 2, 3)
    learners = Learners(student, LatentWeight, LearnedQuantizer, biases=True)
    views = Views([X], torch.arange(4, COUNT), [X], "none", 0.0, 8, 0)
    groups = [([learner.latent for learner in learners.weights.values()], 0.02), (list(learners.biases.values()), 1e-3)]
    training = NetworkTraining(learners, teacher, [], views, X[:4], groups, replace(PLAIN, feature_weight=0.0), CPU)
    mine, theirs = tensors_of(student(X[:4])), tensors_of(teacher(X[:4]))
    assert len(mine) == 3 and not is_logits(student(X[:4]))
    expected = sum((m - t).square().sum() / t.square().sum() for m, t in zip(mine, theirs, strict=True)).item() / 3
    assert training.held_out_errors().mean().item() == pytest.approx(expected, rel=1e-4)
    assert loss_of(training, X[:4]).item() == pytest.approx(expected, rel=1e-4)
    outcome = training.run(quiet)
    assert outcome.behind <= outcome.before == pytest.approx(expected, rel=1e-4)


def test_progress_is_told(nets):
    told = []
    training_of(nets, replace(PLAIN, iterations=20)).run(lambda done, total, text: told.append((done, total, text)))
    assert [(done, total) for done, total, _ in told] == [(10, 20), (20, 20)]
    assert all("loss" in text and "held out" in text for _, _, text in told)


@pytest.mark.parametrize("match", [False, True])
def test_compiled_steps_are_the_steps(nets, monkeypatch, match):
    """The share that stays float changes at every step; code is compiled for mixed steps, for plain ones, and for the teacher."""
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def counting(graph: GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, mode: compile_(network, backend=counting, fullgraph=True))
    settings = replace(PLAIN, mix=0.5, match=match)
    eager, compiled = training_of(nets, settings), training_of(nets, replace(settings, compile=True))
    outcomes = [training.run(quiet) for training in (eager, compiled)]
    assert len(graphs) == 3
    assert outcomes[0].step == outcomes[1].step > 0
    assert outcomes[1].behind == pytest.approx(outcomes[0].behind, rel=1e-3)
    for mine, theirs in zip(values(compiled), values(eager), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
